"""Faces in images: detection, alignment, background, similarity."""
