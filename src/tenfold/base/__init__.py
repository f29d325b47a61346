"""Errors, directories, storage URIs, checkpoint formats, the allocator: what every package may use and nothing more."""
