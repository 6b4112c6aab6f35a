"""Personalized subject replacement (Wang et al. 2023, section 3.4, algorithm 3).

The subject of a real image is replaced by a learned one by editing the caption: all other words keep the image's
cross-attention, which preserves the scene, while the new subject's place, pose and outline are free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...attention.prompt_to_prompt import TokenMap
from .. import engine
from ..attention_control.prompt_to_prompt import BLEND_THRESHOLD, ControlSettings, encode, with_attention_control
from ..inversion.inversion import Inversion, check_deterministic, follow_back
from ..shared.comfy_types import Clip, Model
from ..shared.conditioning import Conditioning, single_embedding, with_embedding
from ..shared.errors import IdentityEditError, check_batch_matches
from ..shared.parsing import split_words
from ..text.prompt_tokens import Pair, PromptTokens, aligned_tokens, positions_of, prompt_tokens, token_mapper

SUBJECT_TOKENS = 5
"""n, the number of learned tokens in the last positions (Wang et al. 2023, section 4)."""
CROSS_REPLACE_STEPS = 1.0
SELF_REPLACE_STEPS = 0.0
"""Algorithm 3 controls cross-attention in all steps and self-attention in none."""


@dataclass(frozen=True)
class SubjectReplacement:
    """The result of algorithm 3.

    Attributes:
        latent: x_0^g [B, C, H, W] in the scale of LATENT sockets.
        free_tokens: positions in c^g that kept their own attention.
        evaluations: model calls.
        warning: a sentence about a likely problem, else None.
    """

    latent: torch.Tensor
    free_tokens: tuple[int, ...]
    evaluations: int
    warning: str | None = None


def subject_replacement(
    model: Model,
    clip: Clip,
    inversion: Inversion,
    source_prompt: str,
    target_prompt: str,
    target: Conditioning | None = None,
    subject_words: str = "",
    subject_tokens: int = SUBJECT_TOKENS,
    *,
    guidance_scale: float | None = None,
    cross_replace_steps: float = CROSS_REPLACE_STEPS,
    self_replace_steps: float = SELF_REPLACE_STEPS,
    local_blend: bool = False,
    blend_threshold: float = BLEND_THRESHOLD,
    callback: engine.Callback | None = None,
) -> SubjectReplacement:
    """Replace an image's subject (Wang et al. 2023, algorithm 3).

    The algorithm's first two loops, x_0^r* to x_T^r* and phi_T to phi_1, are `invert_image` and
    `null_text_optimization`; the inversion contains both results.

    Args:
        model: MODEL that made the inversion, optionally with step-wise embeddings on its positive side (Apply Subject),
            [c^g, c_s^t].
        clip: CLIP of the model.
        inversion: DDIM inversion of x_0^r with c^r, with its null-text embeddings.
        source_prompt: c^r, the image's caption.
        target_prompt: c^g, the caption with the subject's word replaced by the new one's.
        target: [c^g, c_s], CONDITIONING with the learned subject in the last positions; None for c^g alone.
        subject_words: w_g, words of the target prompt that keep their own attention, separated by spaces. Empty: those
            that the source prompt lacks.
        subject_tokens: n, the number of last positions of `target` with the learned subject; 0 for a subject that the
            model knows by its word.
        guidance_scale: guidance scale of the new image; None for that of the null-text embeddings (7.5 in the paper).
        cross_replace_steps, self_replace_steps: fractions of the steps, see `ControlSettings`.
        local_blend: also preserve the latent outside both subjects, located by their words' attention; not in the
            paper.
        blend_threshold: see `ControlSettings`.
        callback: progress with preview.

    Returns:
        the image, in 3 N model calls: at each step one for the source's attention, and two for the target.
    """
    check_deterministic(inversion, "connect one from Noise Inversion and Null-Text Optimization")
    table = inversion.embeddings
    if table is None:
        raise IdentityEditError(
            "The inversion has no null-text embeddings; put Null-Text Optimization between Noise Inversion and Replace "
            "Subject."
        )
    if guidance_scale is None:
        guidance_scale = table.guidance_scale or 7.5
    source_tokens, target_tokens = prompt_tokens(clip, source_prompt), prompt_tokens(clip, target_prompt)
    learned = 0 if target is None else subject_tokens
    target = encode(clip, target_prompt) if target is None else target
    _check_target(target, target_tokens, learned, inversion.batch)
    tokens, blend = _subject_tokens(clip, source_tokens, target_tokens, subject_words, learned)
    settings = ControlSettings(cross_replace_steps, self_replace_steps, blend_threshold=blend_threshold)
    # A^(t)(x_t^r, c^r, phi_t) and F~: the source is evaluated at x_t^r* before every evaluation of the target, which
    # uses its weights a_t^r*. Maps are kept for one step only.
    controlled = with_attention_control(
        model, tokens, encode(clip, source_prompt), settings, blend if local_blend else None, inversion
    )
    negative = with_embedding(target, table.embeddings[0], table.pooled_row(0))  # replaced by phi_t at every step

    # x_T^g = x_T^r*; for t = T, ..., 1: x_{t-1}^g = F~_[c_s^t, w_g](x_t^g, [c^g, c_s^t], phi_t*, a_t^r*)
    latent, evaluations = follow_back(controlled, inversion, target, negative, guidance_scale, callback=callback)
    free = tuple(torch.nonzero(~tokens.mapped).flatten().tolist())
    return SubjectReplacement(latent, free, evaluations, table.guidance_warning(guidance_scale))


def _check_target(target: Conditioning, prompt: PromptTokens, learned: int, batch: int) -> None:
    embedding, _ = single_embedding(target, "The target")
    check_batch_matches(embedding.shape[0], batch, "The target")
    if embedding.shape[1] != prompt.count:
        raise IdentityEditError(
            f"The target has {embedding.shape[1]} tokens but the target prompt has {prompt.count}; write the prompt "
            f"that the target was encoded from."
        )
    if not 0 <= learned < prompt.count:
        raise IdentityEditError(
            f"subject_tokens is {learned}; choose the number of tokens that the subject was trained with (0 for none)."
        )
    end = prompt.chunks[-1].end  # the end token must be kept too
    if end >= prompt.count - learned:
        raise IdentityEditError(
            f"The target prompt overlaps the last {learned} positions, which are used by the learned subject; shorten "
            f"it by {end - (prompt.count - learned) + 1} tokens."
        )


def _subject_tokens(
    clip: Clip, source: PromptTokens, target: PromptTokens, subject_words: str, learned: int
) -> tuple[TokenMap, Pair]:
    """The token map, in which all tokens but [c_s^t, w_g] use the source's weights; and the tokens of both subjects."""
    mapper = token_mapper(source, target, aligned_tokens(source, target))
    mapped = mapper.sum(dim=0) > 0
    words = [p for word in split_words(subject_words) for p in positions_of(clip, target, word, "The target prompt")]
    if not words:
        words = [position for position in target.positions if not mapped[position]]
    last = list(range(target.count - learned, target.count))
    free = [*words, *last]
    if not free:
        raise IdentityEditError(
            "The target prompt has no word that the source prompt lacks; replace the subject's word, or list it in "
            "subject_words."
        )
    mapped[free] = False
    old = [position for position in source.positions if not bool(mapper[position, mapped].any())]
    return TokenMap(mapper, mapped, torch.ones(target.count)), (tuple(old), tuple(free))
