"""Nodes of `pipelines.attention_control`."""

from . import mutual_self_attention, prompt_to_prompt

NODES = [*mutual_self_attention.NODES, *prompt_to_prompt.NODES]
