"""The cost of a program on an accelerator that is not present, from jaxprs and compiled text."""

# The programs that a plan compiles.
PROGRAMS = ("train", "score", "generate")
