"""Thin products instead of matrices. Each module here is a method; its name is its path."""
