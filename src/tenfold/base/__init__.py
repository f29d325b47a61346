"""Errors, storage URIs and directories: what every other package may use and nothing more."""
