"""What unlearning has of its own: command line, parts of a run, what a model says before it."""
