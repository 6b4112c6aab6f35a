"""PIDiff (Gu et al. 2025): W+ codes and style cross-attention."""
