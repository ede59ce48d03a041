"""Spectral optimizers: directions from the polar factors of matrices."""
