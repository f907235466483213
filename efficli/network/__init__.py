"""A checkpoint in PyTorch, float32: its matrices watched, measured and replaced where they are computed with."""
