"""Placing arrays on meshes of devices."""
