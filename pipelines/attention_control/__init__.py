"""Prompt-to-Prompt (Hertz et al. 2023) and mutual self-attention (Cao et al. 2023)."""
