"""Turns Hugging Face checkpoints into small files that stock runtimes load, and says what that cost."""

__version__ = "0.1.0"
