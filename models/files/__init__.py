"""Models in files: safetensors, GGUF, diffusers folders, the Hub, export."""
