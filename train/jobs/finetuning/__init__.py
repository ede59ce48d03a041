"""What fine-tuning on traces has of its own: configuration, command line, parts of a run."""
