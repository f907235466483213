"""The embedded reference checkpoint, its awkward twin, their held-out text, and the scripts that made them."""
