"""What a program costs on an accelerator that is not here: counted on jaxprs and compiled text."""
