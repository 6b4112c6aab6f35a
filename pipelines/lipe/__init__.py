"""LIPE (Liu et al. 2024): identity prior, identity-aware masks, masked edit."""
