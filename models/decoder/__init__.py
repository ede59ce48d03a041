"""Decoder language models: architecture, learner, labels, adapters, generation."""
