"""Every op in plain PyTorch: the definition that the other backends are tested against."""
