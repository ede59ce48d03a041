"""What pre-training has of its own: configuration, command line, and the parts of a run."""
