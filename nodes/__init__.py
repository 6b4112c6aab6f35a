"""What the user sees: one file for each category of nodes, and the list of them all."""

from __future__ import annotations

from comfy_api.latest import io

from . import demo, measure, text
from .attention_control import mutual_self_attention as attention_control
from .attention_control import prompt_to_prompt
from .hifi_tuner import reference, reference_guidance, segmentation, subject_embedding
from .inversion import inversion
from .lipe import identity_prior, masks
from .mcdm import identity_words, pairs, portrait, train_mcdm
from .pidiff import face, style_attention, w_plus
from .subjects import subject

NODE_CLASSES: list[type[io.ComfyNode]] = [
    *inversion.NODES,
    *text.NODES,
    *masks.NODES,
    *segmentation.NODES,
    *subject.NODES,
    *identity_prior.NODES,
    *subject_embedding.NODES,
    *reference.NODES,
    *reference_guidance.NODES,
    *attention_control.NODES,
    *prompt_to_prompt.NODES,
    *pairs.NODES,
    *identity_words.NODES,
    *train_mcdm.NODES,
    *portrait.NODES,
    *face.NODES,
    *w_plus.NODES,
    *style_attention.NODES,
    *measure.NODES,
    *demo.NODES,
]
