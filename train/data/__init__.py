"""Data on the host: generators, readers, tokenised examples and batches."""
