"""Zeroth-order steps by their coefficients: recorded in a file, and taken again from it."""
