"""What classification has of its own: configuration, kinds of models, and the parts of a run."""
