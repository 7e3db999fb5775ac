"""The training loop and the comparison behind the command."""
