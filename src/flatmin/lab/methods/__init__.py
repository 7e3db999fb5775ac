"""The training methods by name."""
