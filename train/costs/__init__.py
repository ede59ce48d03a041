"""The cost of a program on an accelerator that is not present, from jaxprs and compiled text."""

# What a plan compiles.
PROGRAMS = ("train", "score", "generate")
