"""What belongs to the Lightning Trainer: the callback with its parts, and compiled training steps of a module."""
