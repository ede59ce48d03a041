"""The engine: everything that takes a step, and the runs that hold its results."""
