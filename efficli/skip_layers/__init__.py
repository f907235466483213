"""Fewer blocks: methods that leave layers out. Each module here is a method; its name is its path."""
