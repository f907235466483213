"""File -> numbers."""
