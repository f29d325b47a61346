"""Errors, directories, storage URIs and checkpoint formats: what every other package may use and nothing more."""
