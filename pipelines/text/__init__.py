"""Prompts as token rows and word vectors, and embeddings that change from step to step."""
