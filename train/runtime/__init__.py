"""What every program stands on: processes, meshes, memory, folders, stages, checkpoints, logs."""
