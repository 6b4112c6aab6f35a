"""Per-step embeddings: one text embedding for each sampling step, and a model clone that uses them.

They are the output of null-text optimization, timestep-aware injection and step-wise learned subjects. The row is
chosen by noise level, not by counting calls, because a sampler may evaluate the network several times per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import engine
from ..engine.families.schedule import step_at
from ..shared.comfy_types import Model
from ..shared.errors import IdentityEditError, check_batch_matches, check_finite


@dataclass(frozen=True)
class StepEmbeddings:
    """One cross-attention embedding for each step of a sampling run.

    Attributes:
        sigmas: [N + 1] float32, descending: row i is used at noise levels in the interval (sigmas[i + 1], sigmas[i]].
            Above the first level the first row is used, below the last level the last row.
        embeddings: [N, B, T, C] float32, B either 1 (the same for all latents of a batch) or the batch size.
        pooled: [1 or N, B, P] float32, the pooled outputs of the embeddings (SDXL), or None to keep the conditioning's.
        guidance_scale: the guidance scale they were optimized for, or None for any.
        lengths: [N] tokens of each row, followed by padding that is not used; or None for T.
    """

    sigmas: torch.Tensor
    embeddings: torch.Tensor
    pooled: torch.Tensor | None = None
    guidance_scale: float | None = None
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 4 or self.embeddings.shape[0] < 1:
            raise IdentityEditError(
                f"Per-step embeddings must be [steps, batch, tokens, channels], not {tuple(self.embeddings.shape)}."
            )
        if self.sigmas.ndim != 1 or self.sigmas.shape[0] != self.embeddings.shape[0] + 1:
            raise IdentityEditError(
                f"Per-step embeddings of {self.embeddings.shape[0]} steps need {self.embeddings.shape[0] + 1} sigmas, "
                f"not {tuple(self.sigmas.shape)}."
            )
        if not bool((self.sigmas[:-1] > self.sigmas[1:]).all()):
            raise IdentityEditError(
                "The sigmas of per-step embeddings must descend; use a sampling schedule without changes."
            )
        if self.pooled is not None and (
            self.pooled.ndim != 3 or self.pooled.shape[0] not in (1, self.steps) or self.pooled.shape[1] != self.batch
        ):
            raise IdentityEditError(
                f"The pooled outputs {tuple(self.pooled.shape)} do not match the embeddings "
                f"{tuple(self.embeddings.shape)}; use both from the same prompt."
            )
        check_finite(self.embeddings, "The per-step embeddings", "optimize them again with a lower learning rate")

    @property
    def steps(self) -> int:
        """N, the number of rows."""
        return int(self.embeddings.shape[0])

    @property
    def batch(self) -> int:
        """B, the number of embeddings in a row."""
        return int(self.embeddings.shape[1])

    def row(self, sigma: float) -> int:
        """The row for a noise level, see `schedule.step_at`."""
        return step_at(self.sigmas, sigma)

    def embedding_row(self, row: int) -> torch.Tensor:
        """The embedding [B, T', C] of a row."""
        return self.embeddings[row] if self.lengths is None else self.embeddings[row, :, : self.lengths[row]]

    def pooled_row(self, row: int) -> torch.Tensor | None:
        """The pooled output [B, P] of a row, or None."""
        if self.pooled is None:
            return None
        return self.pooled[min(row, self.pooled.shape[0] - 1)]

    def guidance_warning(self, guidance_scale: float) -> str | None:
        """A warning if they were optimized for a guidance scale other than that of sampling, or None."""
        if self.guidance_scale is None or abs(self.guidance_scale - guidance_scale) <= 1e-6:
            return None
        return (
            f"The guidance scale is {guidance_scale:g} but the inversion's null-text embeddings were optimized for "
            f"{self.guidance_scale:g}; use the same scale, or the result drifts away from the image."
        )


def constant_embedding(
    sigmas: torch.Tensor, embedding: torch.Tensor, pooled: torch.Tensor | None = None
) -> StepEmbeddings:
    """Per-step embeddings with the same embedding [B, T, C] (and pooled output [B, P]) at every step of `sigmas`
    [N + 1]."""
    steps = sigmas.shape[0] - 1
    return StepEmbeddings(
        sigmas=sigmas,
        embeddings=embedding.unsqueeze(0).expand(steps, -1, -1, -1),
        pooled=None if pooled is None else pooled.unsqueeze(0),
    )


def apply_step_embeddings(model: Model, table: StepEmbeddings, which: str = "negative") -> Model:
    """A clone of `model` that uses per-step embeddings for one side.

    Works with any stock sampler and guider: a PREDICT_NOISE wrapper replaces the embedding of the guider's
    conditionings for each model call and restores it afterwards. Their other options (size, ControlNets, areas) are
    kept. Embeddings for different sides can be combined; for the same side, the later ones replace the earlier. A
    guider without that side ("negative" in BasicGuider, or at guidance scale 1) is not affected, nor is a source prompt
    that another node evaluates alongside (`engine.KEEPS_EMBEDDING`).

    Args:
        model: MODEL (a ModelPatcher); not modified.
        table: the embeddings; their batch must be 1 or that of the sampled latents.
        which: the guider's name of the side: "positive", "negative", or "middle" in Dual CFG Guider.

    Raises:
        IdentityEditError: for an unsupported model or another embedding width; while sampling, for another batch size.
    """
    channels = engine.require(model, engine.Capability.ONE_TEXT).text_width
    if channels and table.embeddings.shape[-1] != channels:
        raise IdentityEditError(
            f"The per-step embeddings have {table.embeddings.shape[-1]} channels but the model takes {channels}; "
            "use the model they were made with."
        )

    def exchange_embedding(executor: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        original = guider.conds
        side = original.get(which)
        if not side or any(engine.KEEPS_EMBEDDING in conditioning for conditioning in side):
            return executor(x, timestep, *args, **kwargs)
        check_batch_matches(table.batch, x.shape[0], "The per-step embeddings")
        row = table.row(float(timestep.max()))
        exchanged = engine.conditionings_with_embedding(
            guider.inner_model, side, table.embedding_row(row).to(x.device), table.pooled_row(row)
        )
        guider.conds = {**original, which: exchanged}
        try:
            return executor(x, timestep, *args, **kwargs)
        finally:
            guider.conds = original

    return engine.with_wrappers(model, f"identity_edit_step_embeddings_{which}", exchange_embedding)
