"""Operations inside transformer blocks, on tensors and transformer_options; no prompts, files or samplers."""
