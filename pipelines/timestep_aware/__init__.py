"""Timestep-aware text injection (Jung et al. 2024)."""
