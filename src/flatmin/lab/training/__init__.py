"""One run in memory: the trainer and its parts."""
