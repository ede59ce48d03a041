"""Zeroth-order optimizers: directions from values of the loss alone."""
