"""What happens inside a transformer block: tensors and transformer_options; no prompt, no file, no sampler."""
