"""Tensor mathematics and the runtimes' own functions; nothing here knows a checkpoint."""
