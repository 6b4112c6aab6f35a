"""Prompt tokens and per-step embeddings."""
