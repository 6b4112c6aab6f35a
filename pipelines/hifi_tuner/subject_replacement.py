"""Personalised subject replacement (Wang et al. 2023, section 3.4, algorithm 3).

The subject of a real image is exchanged for a learned one by editing the caption alone: the cross-attention of every
other word is that of the image, so the scene stays, and the new subject finds its own place, pose and outline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...attention.prompt_to_prompt import TokenMap
from .. import engine
from ..attention_control.prompt_to_prompt import BLEND_THRESHOLD, ControlSettings, encode, with_attention_control
from ..inversion.inversion import DDIM, Inversion, check_method, follow_back
from ..shared.conditioning import Conditioning, single_embedding, with_embedding
from ..shared.errors import IdentityEditError, check_batch_matches
from ..shared.parsing import split_words
from ..text.prompt_tokens import Pair, PromptTokens, aligned_tokens, positions_of, prompt_tokens, token_mapper

SUBJECT_TOKENS = 5
"""n, the learned tokens in the last positions (Wang et al. 2023, section 4)."""
CROSS_REPLACE_STEPS = 1.0
SELF_REPLACE_STEPS = 0.0
"""Algorithm 3 fixes cross-attention in all steps, and leaves self-attention free."""


@dataclass(frozen=True)
class SubjectReplacement:
    """What algorithm 3 made.

    Attributes:
        latent: x_0^g [B, C, H, W] in the scale of LATENT sockets.
        free_tokens: positions in c^g whose attention was its own.
        evaluations: model calls.
        warning: one sentence where something is likely to go wrong, else None.
    """

    latent: torch.Tensor
    free_tokens: tuple[int, ...]
    evaluations: int
    warning: str | None = None


def subject_replacement(
    model: Any,
    clip: Any,
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
    """Put another subject in the place of an image's (Wang et al. 2023, algorithm 3).

    Its first two loops, x_0^r* to x_T^r* and phi_T to phi_1, are `ddim_inversion` and `null_text_optimization`: the
    inversion carries both.

    Args:
        model: MODEL that made the inversion; it may carry a table of step-wise embeddings on its positive side (Apply
            Subject), which is [c^g, c_s^t].
        clip: CLIP of the model.
        inversion: of x_0^r with c^r by DDIM, with its null-text embeddings.
        source_prompt: c^r, the image's caption.
        target_prompt: c^g, the same with the subject's word exchanged for the new one's.
        target: [c^g, c_s], CONDITIONING with the learned subject in the last positions; None is c^g alone.
        subject_words: w_g, words of the target prompt whose attention is their own, separated by spaces. Empty: those
            that the source prompt lacks.
        subject_tokens: n, how many of the last positions `target` holds the learned subject in; 0 for a subject that
            the model knows by its word.
        guidance_scale: of the new image; None is what the null-text embeddings were optimized for (7.5 in the paper).
        cross_replace_steps, self_replace_steps: shares of the steps, see `ControlSettings`.
        local_blend: also keep the latent outside of both subjects, where their words' attention says; the paper does
            not.
        blend_threshold: see `ControlSettings`.
        callback: progress with preview.

    Returns:
        the image, of 3 N model calls: at each step one of the source, for its attention, and two of the
        target.

    Raises:
        IdentityEditError: when an input cannot be used.
    """
    check_method(inversion, DDIM, "connect one from DDIM Inversion and Null-Text Optimization")
    table = inversion.embeddings
    if table is None:
        raise IdentityEditError(
            "The inversion has no null-text embeddings; put Null-Text Optimization between DDIM Inversion and Replace "
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
    # A^(t)(x_t^r, c^r, phi_t) and F~: the model evaluates the source at x_t^r* before every evaluation of the target
    # and gives the target its weights a_t^r*. Maps are kept for one step and never all of them.
    controlled = with_attention_control(
        model, tokens, encode(clip, source_prompt), settings, blend if local_blend else None, inversion
    )
    negative = with_embedding(target, table.embeddings[0], table.pooled_row(0))  # phi_t takes its place at every step

    # x_T^g = x_T^r*; for t = T, ..., 1: x_{t-1}^g = F~_[c_s^t, w_g](x_t^g, [c^g, c_s^t], phi_t*, a_t^r*)
    latent, evaluations = follow_back(controlled, inversion, target, negative, guidance_scale, callback=callback)
    free = tuple(torch.nonzero(~tokens.mapped).flatten().tolist())
    return SubjectReplacement(latent, free, evaluations, table.guidance_warning(guidance_scale))


def _check_target(target: Conditioning, prompt: PromptTokens, learned: int, batch: int) -> None:
    embedding, _ = single_embedding(target, "The target")
    check_batch_matches(embedding.shape[0], batch, "The target")
    if embedding.shape[1] != prompt.count:
        raise IdentityEditError(
            f"The target has {embedding.shape[1]} tokens but the target prompt {prompt.count}; write the prompt that "
            f"the target was encoded from."
        )
    if not 0 <= learned < prompt.count:
        raise IdentityEditError(
            f"subject_tokens is {learned}; choose the number of tokens that the subject was trained with (0 for none)."
        )
    end = prompt.chunks[-1].end  # the mark behind the last word counts for the text encoder too
    if end >= prompt.count - learned:
        raise IdentityEditError(
            f"The target prompt reaches into the last {learned} positions, which hold the learned subject; shorten it "
            f"by {end - (prompt.count - learned) + 1} tokens."
        )


def _subject_tokens(
    clip: Any, source: PromptTokens, target: PromptTokens, subject_words: str, learned: int
) -> tuple[TokenMap, Pair]:
    """All tokens take the source's weights but [c_s^t, w_g]; and the tokens of the old and the new subject."""
    mapper = token_mapper(source, target, aligned_tokens(source, target))
    mapped = mapper.sum(dim=0) > 0
    words = [p for word in split_words(subject_words) for p in positions_of(clip, target, word, "The target prompt")]
    if not words:
        words = [position for position in target.positions if not mapped[position]]
    last = list(range(target.count - learned, target.count))
    free = [*words, *last]
    if not free:
        raise IdentityEditError(
            "The target prompt has no word that the source prompt lacks; exchange the subject's word, or name it in "
            "subject_words."
        )
    mapped[free] = False
    old = [position for position in source.positions if not bool(mapper[position, mapped].any())]
    return TokenMap(mapper, mapped, torch.ones(target.count)), (tuple(old), tuple(free))
