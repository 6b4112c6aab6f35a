"""MCDM (Chen et al. 2024): pairs of portraits, identity words, the model trained on them, its guidance."""
