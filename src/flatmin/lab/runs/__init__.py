"""One run on disk: its folder, checkpoints, and how it is resumed."""
