"""Programs and machinery that train, unlearn, evaluate and report."""
