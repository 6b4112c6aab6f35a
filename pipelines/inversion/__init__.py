"""From an image to noise and back: DDIM, edit-friendly DDPM, null-text optimization."""
