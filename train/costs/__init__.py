"""What a program costs on an accelerator that is not here: counted on jaxprs and compiled text."""

# What a plan compiles.
PROGRAMS = ("train", "score", "generate")
