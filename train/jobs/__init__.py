"""The jobs: what each program does, from its configuration to its report."""
