"""How a model is judged: from a model and rows to per-item logs and numbers."""
