"""Methods that take fewer bits for each weight."""
