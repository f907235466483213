"""Tests mirror efficli/; `from tests.pico import write_llama` makes the small models."""
