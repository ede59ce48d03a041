"""The programs of every job as shapes, compiled for accelerators that are not present."""
