"""Training loop with checkpoints, batches, and multi-process training."""
