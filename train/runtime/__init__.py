"""Shared by all programs: processes, meshes, memory, folders, stages, checkpoints, logs."""
