"""Compressed checkpoint -> a file that a stock runtime loads."""
