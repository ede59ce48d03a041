"""The jobs: the work of each program, from its configuration to its report."""
