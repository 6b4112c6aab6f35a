"""The training loop with its checkpoints, the batches, and training on several processes."""
