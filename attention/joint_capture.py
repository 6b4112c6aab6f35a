"""Records the joint attention of text and image during sampling, without changing the result.

Attention to the subject's word alone does not outline it in these networks. What does is a contrast in the space of
the attention's outputs (ConceptAttention, Helbling et al. 2025): the scalar product of the outputs at an image position
and at the subject's tokens, minus that with the tokens of another concept. The map of a block is standardized, because
outputs of different blocks differ in size, and the mean of the maps is refined by self-attention as in a UNet. By
default the maps are those of all blocks and the self-attention that of the last third, whose image positions attend
within one object: in the demo world this outlines a subject best (benchmarks/results/segment_subject_flow.md).

The identity prompt has to run through the blocks to have outputs, so it is evaluated as a prompt of its own, in a few
additional model calls on the sampled latent. Read on ComfyUI 0.3.75 and 0.33.0: comfy/samplers.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .capture import MAXIMUM_SELF_ATTENTION_POSITIONS, IdentityAttention, Recorder, Run, check_columns
from .errors import IdentityEditError
from .joint import Attend, joint_sites, side_prompts, with_tap
from .maps import output_scores, standardized
from .sites import AUTOMATIC, LAST, Attended, Site, choose_blocks

_KEY = "identity_edit_joint_attention"
_SIDE = "identity_edit_identity"
"""Start of an identity prompt's name among the guider's conditionings."""

_SHARED = ("reference_latents", "reference_latents_method", "guidance", "concat_latent_image", "concat_mask")
"""Options of the sampled prompt that the identity prompt is evaluated with, too: what the network sees beside the
text."""

EVALUATIONS = 4
"""Additional model calls of a run for the identity prompt, evenly spread over its steps. Our choice: the noise level
hardly matters."""


def capture_joint_attention(
    model: Any,
    prompt: list[list[Any]] | None,
    columns: Sequence[int],
    contrast: Sequence[int] = (),
    layers: str = AUTOMATIC,
    self_attention: bool = True,
    by_step: bool = False,
) -> tuple[Any, IdentityAttention]:
    """A clone of `model` that records where it sees the identity prompt's tokens during sampling.

    The counterpart of `capture.capture_attention`. Maps have mean 0 and standard deviation 1 for each block; without a
    contrast they are attention probabilities.

    Args:
        model: MODEL with joint attention; not modified.
        prompt: the identity prompt's CONDITIONING, one entry, which is evaluated beside the sampled prompt in up to
            `EVALUATIONS` steps (in all with `by_step`); None reads the sampled prompt in every step, without additional
            model calls.
        columns: the subject's tokens in that prompt, from 0, or from -1 for the last; the mean of their scores is used.
        contrast: the tokens of the other concept, likewise.
        layers: see `sites.choose_blocks`.
        self_attention: also record the attention between image positions, on a grid of at most 32x32.
        by_step: also keep the map of every token at every step (`IdentityAttention.steps`).

    Returns:
        the clone, and the object that its runs fill.

    Raises:
        IdentityEditError: for an unsupported model, missing blocks, or tokens outside the embedding; while sampling,
            see `joint.with_tap`.
    """
    choose_blocks(joint_sites(model.get_model_object("diffusion_model")), layers)  # raises early for invalid choices
    if prompt is not None:
        for positions in (columns, contrast):
            if positions is columns or len(contrast) > 0:
                check_columns(positions, prompt[0][0], "identity prompt")
    attention = IdentityAttention(columns, layers, self_attention, by_step, is_joint=True)
    return _JointRecorder(attention, prompt, contrast).on(model), attention


class _JointRecorder(Recorder):
    """Reads the blocks by a tap."""

    def __init__(self, attention: IdentityAttention, prompt: list[list[Any]] | None, contrast: Sequence[int]) -> None:
        super().__init__(attention)
        self._prompt, self._contrast = prompt, tuple(contrast)
        self._side = f"{_SIDE}_{uuid.uuid4()}"  # another recorder of the same run has another prompt
        self._evaluated: set[int] = set()  # steps with an additional model call

    def _with_hooks(self, model: Any) -> Any:
        return with_tap(model, _KEY, self._read, lambda: self._run is not None and self._run.side is not None)

    def _begin(self, network: Any, noise: torch.Tensor) -> Run:
        batch, height, width = noise.shape[0], noise.shape[-2], noise.shape[-1]
        if self._prompt is not None and self._prompt[0][0].shape[0] not in (1, batch):
            raise IdentityEditError(
                f"The identity prompt has {self._prompt[0][0].shape[0]} embeddings for a batch of {batch} latents; "
                f"give one for all, or one for each."
            )
        sites, choice = joint_sites(network), self._attention.choice
        mapped, refining = choose_blocks(sites, choice), choose_blocks(sites, LAST if choice == AUTOMATIC else choice)
        self._evaluated = set()
        return Run(
            batch,
            height,
            width,
            {site.key: site for site in mapped},
            {site.key: site for site in refining} if self._attention.reads_self_attention else {},
        )

    def _outer_sample(self, executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        guider, prompts = executor.class_obj, {}
        if self._prompt is not None:
            ((embedding, options),) = self._prompt
            sampled: dict[str, Any] = next(iter(guider.conds.get("positive") or ()), {})
            shared = {name: sampled[name] for name in _SHARED if name in sampled}
            prompts = {self._side: [[embedding, {**options, **shared}]]}
        with side_prompts(guider, prompts):
            return super()._outer_sample(executor, noise, *args, **kwargs)

    def _evaluate(
        self, run: Run, guider: Any, side: int, executor: Any, network: Any, conds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self._prompt is None:
            return super()._evaluate(run, guider, side, executor, network, conds, *args, **kwargs)
        result = executor(network, conds, *args, **kwargs)
        if run.step not in self._evaluated and (self._attention.by_step or run.step in _evaluated_steps(run)):
            self._evaluated.add(run.step)
            whole = guider.conds[self._side][:1]  # ComfyUI adds an entry for each area of the sampled prompt
            super()._evaluate(run, guider, 0, executor, network, [whole], *args, **kwargs)
        return result

    def _read(
        self,
        site: Site,
        attended: Attended,
        value: torch.Tensor,
        attend: Attend,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        output = attend(attended.query, attended.key, value)
        run = self._run
        if run is not None and site.key in run.cross_layers:
            with torch.no_grad():
                for rows, entry in run.rows_to_read(options):
                    self._add(run, site, attended.part(rows), output[rows], entry)
        return output

    def _add(self, run: Run, site: Site, attended: Attended, output: torch.Tensor, entry: dict[str, Any]) -> None:
        columns, contrast = self._tokens(attended, entry)
        region, weight = run.region(entry, attended.grid, output.device)
        self._attention.add_cross_attention(_map(attended, output, columns, contrast), region, weight, run.batch)
        run.fired.add(("cross", site.key))
        if self._attention.by_step:
            each = torch.stack([_map(attended, output, [column], contrast) for column in columns], dim=1).flatten(0, 1)
            weights = weight.expand(run.batch, -1, -1).repeat_interleave(len(columns), dim=0)
            self._attention.at_step(run.step).add_cross_attention(each, region, weights, len(each))
        if site.key in run.self_layers:
            factor = _factor(attended.grid)
            region, weight = run.region(entry, [-(-size // factor) for size in attended.grid], output.device)
            if self._attention.self_grid in (None, region.grid):
                maps = attended.to_image(factor)
                maps = maps / maps.sum(dim=-1, keepdim=True)  # without the text's part
                self._attention.add_self_attention(maps, region, weight, run.batch)
            run.fired.add(("self", site.key))

    def _tokens(self, attended: Attended, entry: dict[str, Any]) -> tuple[list[int], list[int]]:
        """The subject's tokens and those of the contrast among the text tokens of the sequence."""
        own = entry["cross_attn"] if self._prompt is None else self._prompt[0][0]
        if self._prompt is None:
            check_columns(self._attention.columns, own, "prompt")
        count = own.shape[1]
        before = entry["model_conds"]["c_crossattn"].cond.shape[1] - count  # Flux.2 pads texts at the start
        columns, contrast = (
            [before + column % count for column in positions] for positions in (self._attention.columns, self._contrast)
        )
        return columns, contrast


def _map(attended: Attended, output: torch.Tensor, columns: list[int], contrast: list[int]) -> torch.Tensor:
    """[B, rows, columns]: the standardized contrast of both concepts, or without one the attention to the tokens."""
    if not contrast:
        return attended.to_text(columns)
    tokens = [attended.text.start + column for column in (*columns, *contrast)]
    scores = output_scores(output, attended.image, tokens)
    subject, other = scores[..., : len(columns)].mean(dim=-1), scores[..., len(columns) :].mean(dim=-1)
    return standardized((subject - other).unflatten(1, attended.grid))


def _factor(grid: tuple[int, int]) -> int:
    """Positions per cell and side, so that there are at most 32x32 cells."""
    factor = 1
    while -(-grid[0] // factor) * -(-grid[1] // factor) > MAXIMUM_SELF_ATTENTION_POSITIONS:
        factor += 1
    return factor


def _evaluated_steps(run: Run) -> set[int]:
    """The steps with an additional model call."""
    last = len(run.sigmas) - 2
    if last < EVALUATIONS:
        return set(range(last + 2))
    return {round(number * last / (EVALUATIONS - 1)) for number in range(EVALUATIONS)}
