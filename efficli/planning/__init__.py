"""What a model will be on another device, reckoned from small files alone."""
