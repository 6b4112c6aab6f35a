"""Inversion and reconstruction: DDIM, edit-friendly DDPM, null-text optimization."""
