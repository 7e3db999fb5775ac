"""Several methods on the same splits, initial weights and batches, and what that means."""
