"""Errors, directories, storage URIs, checkpoint formats and the allocator: what every other package may use and nothing more."""
