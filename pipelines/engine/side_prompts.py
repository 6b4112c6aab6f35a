"""Prompts that are evaluated beside those of a guider.

ComfyUI makes a model's inputs of a CONDITIONING when a run begins: text embedding, pooled output, masks, lengths, texts
of further encoders. A prompt that is among the guider's conditionings then gets all of them, in any model family.

Read on ComfyUI 0.3.75, 0.33.0 and 0.38.1: comfy/samplers.py (process_conds), comfy/model_base.py (extra_conds).
"""

from __future__ import annotations

import uuid
from typing import Any

from ...attention.joint import side_prompts as side_prompts
from .model import KEEPS_EMBEDDING

_TEXT = (
    "c_crossattn", "y", "attention_mask", "num_tokens", "encoder_hidden_states_llama3", "clip_text_pooled",
    "txt_byt5", "direct_context",
)  # fmt: skip
"""Inputs that belong to a text, and not to the sampled image or its guidance."""


def conditionings_with_text(
    conditionings: list[dict[str, Any]], prompt: list[dict[str, Any]], *, with_guidance: bool = False
) -> list[dict[str, Any]]:
    """A copy of a guider's conditionings of one side with the text of a side prompt of one entry, which per-step
    embeddings do not replace; their distilled guidance (FluxGuidance) is the prompt's or their own."""
    taken = (*_TEXT, "guidance") if with_guidance else _TEXT
    text = {name: value for name, value in prompt[0]["model_conds"].items() if name in taken}
    return [
        {
            **conditioning,
            "cross_attn": prompt[0].get("cross_attn"),
            "model_conds": {
                **{name: value for name, value in conditioning["model_conds"].items() if name not in _TEXT},
                **text,
            },
            KEEPS_EMBEDDING: True,
        }
        for conditioning in conditionings
    ]


def with_own_uuids(conds: dict[str, Any]) -> dict[str, Any]:
    """A guider's conditionings in which every entry has a uuid of its own.

    For an area on one side ComfyUI adds an entry to the others, with the uuid of the entry that has the area.
    """
    return {side: entries and [{**entry, "uuid": uuid.uuid4()} for entry in entries] for side, entries in conds.items()}
