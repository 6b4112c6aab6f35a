"""What the user sees: one file for each category of nodes, and the list of them all."""

from __future__ import annotations

from comfy_api.latest import io

from . import attention_control, demo, identity_prior, inversion, masks, measure, subject, text

NODE_CLASSES: list[type[io.ComfyNode]] = [
    *inversion.NODES,
    *text.NODES,
    *masks.NODES,
    *subject.NODES,
    *identity_prior.NODES,
    *attention_control.NODES,
    *measure.NODES,
    *demo.NODES,
]
