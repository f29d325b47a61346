"""Meshes of devices: where arrays lie on them, the schedules of pipelines, and hosts."""
