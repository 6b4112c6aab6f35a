"""HiFi Tuner (Wang et al. 2023): subject embeddings, reference guidance, subject replacement."""
