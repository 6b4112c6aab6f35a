"""Which way of editing does most and harms least? `python -m benchmarks flow_editing`.

Non-rigid edits (pose, expression, costume) of images of subjects that the checkpoint has never seen, by methods with
and without inversion that were published for flow models, on any checkpoint of the demo world: fresh noise and
image-to-image as bounds, inversions by every method of Noise Inversion, RF-Inversion with its sampler, edit-friendly
DDPM inversion, with and without the identity-aware mask blend, direct inversion, FlowEdit, Uni-Edit, negative-prompt
inversion, null-text optimization (adaptive), timestep-aware injection, with and without the mask blend, mutual
self-attention and Prompt-to-Prompt. The renderer knows the true edit.
Scores: share of edits that the attribute classifier sees, share of images whose species, color and pattern it all sees
kept, PSNR of the background and to the true edit, and model calls per image, inversion included.
Writes benchmarks/results/flow_editing.json, .md and .jpg (the first pairs, as they came).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import torch
from identity_edit_pack.demo_world.attributes import PLACE_PHRASES, caption
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.attention_control.mutual_self_attention import mutual_self_attention
from identity_edit_pack.pipelines.attention_control.prompt_to_prompt import REFINE, prompt_to_prompt
from identity_edit_pack.pipelines.flow_editing.direct_inversion import direct_inversion_sampler
from identity_edit_pack.pipelines.flow_editing.flow_edit import flow_edit_sampler
from identity_edit_pack.pipelines.flow_editing.uni_edit import uni_edit_sampler
from identity_edit_pack.pipelines.inversion import inversion as inversions
from identity_edit_pack.pipelines.inversion import methods, null_text, rf_inversion
from identity_edit_pack.pipelines.inversion.edit_friendly import edit_friendly_ddpm_inversion, skipped_steps
from identity_edit_pack.pipelines.inversion.inverted_noise import InvertedNoise
from identity_edit_pack.pipelines.lipe.identity_mask_blend import BlendSettings, identity_mask_blend
from identity_edit_pack.pipelines.lipe.identity_prompt import encode_identity_prompt, identity_in_caption
from identity_edit_pack.pipelines.shared.conditioning import Conditioning
from identity_edit_pack.pipelines.timestep_aware.text_injection import injected_conditioning, timestep_aware_sampling
from tqdm import tqdm

from .edits import Pair, embed, mean_psnr, save_sheet, score_edits
from .harness import CHECKPOINT, RESULTS, SEED, Options, load_checkpoint, markdown
from .orders import Cases, order, shared_options
from .timestep_aware_edit import batches_of_pairs

COLUMNS = {
    "edit_done": "edit done",
    "identity_kept": "identity kept",
    "edit_done_and_identity_kept": "both",
    "background_psnr_db": "background PSNR",
    "psnr_to_true_edit_db": "PSNR to true edit",
    "model_calls": "model calls",
}
OPTIONS: Options = {
    **shared_options(1, "flow_editing"),
    "pairs": (102, "(image, edit) pairs for each seed, a third of each kind (102)"),
    "steps": (28, "sampling steps (28)"),
    "guidance_scale": (4.0, "of the target prompt (4)"),
    "batch": (17, "images at once"),
    **SEED,
    **CHECKPOINT,
}


@dataclass
class Editor:
    """The images of one batch, edited by every method.

    Attributes:
        inverted_by: inversions by method, each with its model calls; several methods begin with the same one.
        calls: model calls of the method that ran last, on each image.
    """

    model: Any
    clip: Any
    pairs: list[Pair]
    latent: torch.Tensor
    steps: int
    scale: float
    seed: int
    inverted_by: dict[str, tuple[inversions.Inversion, int]] = field(default_factory=dict)
    calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.source, self.target = (
            embed(self.clip, [caption(getattr(pair, side)) for pair in self.pairs]) for side in ("source", "target")
        )
        self.empty = embed(self.clip, [""] * len(self.pairs))
        self.model = self.model.clone()
        self.model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "count", self._count)
        self.sigmas = engine.require(self.model).schedule(self.steps, end_at_zero=True).sigmas

    def _count(self, executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += x.shape[0] // self.latent.shape[0]
        return executor(x, *args, **kwargs)

    def methods(self) -> dict[str, Callable[[], torch.Tensor]]:
        """By name; each returns the edited latents in the scale of LATENT sockets."""
        by_inversion = {
            f"inversion by {method}": lambda method=method: self.sampled(self.inverted(method))
            for method in methods.METHODS
        }
        injected = {
            f"timestep-aware injection, {ratio * 100:.0f} %": lambda ratio=ratio: (
                timestep_aware_sampling(
                    self.model,
                    self.inverted(methods.FIXED_POINT),
                    self.source,
                    self.target,
                    self.empty,
                    ratio,
                    self.scale,
                ).latent
            )
            for ratio in (0.1, 0.25, 0.4)
        }
        found: dict[str, Callable[[], torch.Tensor]] = {
            "fresh noise": lambda: self.stock(self.fresh_noise, torch.zeros_like(self.latent), self.sigmas),
            "image-to-image, 60 %": lambda: self.stock(self.fresh_noise, self.latent, self.later_sigmas(0.4)),
            **by_inversion,
            "negative-prompt inversion": lambda: self.with_embeddings(null_text.negative_prompt_inversion),
            "edit-friendly DDPM": self.edit_friendly,
            "direct inversion": self.direct_inversion,
            "FlowEdit": lambda: self.edited(flow_edit_sampler(0.34)),
            "Uni-Edit": lambda: self.edited(uni_edit_sampler(), guided=False),
            **injected,
            "edit-friendly DDPM + mask blend": lambda: self.each(Editor.masked),
            "timestep-aware injection, 25 % + mask blend": lambda: self.each(Editor.injected_and_masked),
            "mutual self-attention": self.mutual,
            "Prompt-to-Prompt": lambda: self.each(Editor.controlled),
        }
        capabilities = engine.require(self.model).capabilities
        if engine.Capability.VELOCITY in capabilities:
            found["RF-Inversion"] = self.rf_inversion
        if engine.Capability.TRUE_GUIDANCE in capabilities:
            found["null-text (adaptive)"] = self.null_text
        return found

    @property
    def fresh_noise(self) -> torch.Tensor:
        return torch.randn(self.latent.shape, generator=torch.Generator().manual_seed(self.seed))

    def later_sigmas(self, skip: float) -> torch.Tensor:
        return self.sigmas[round(skip * self.steps) :]

    def stock(
        self, noise: torch.Tensor, latent: torch.Tensor, sigmas: torch.Tensor, sampler: Any = None
    ) -> torch.Tensor:
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(self.target, self.empty)
        guider.set_cfg(self.scale)
        sampler = sampler or comfy.samplers.sampler_object("euler")
        return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=self.seed).cpu()

    def inverted(self, method: str) -> inversions.Inversion:
        if method not in self.inverted_by:
            before = self.calls
            made = inversions.invert_image(
                self.model, self.latent, self.source, self.empty, self.steps, end_at_zero=True, method=method
            )
            self.inverted_by[method], self.calls = (made, self.calls - before), before
        made, calls = self.inverted_by[method]
        self.calls += calls
        return made

    def sampled(self, inversion: inversions.Inversion) -> torch.Tensor:
        return inversions.sample_inversion(self.model, inversion, self.target, self.empty, self.scale)

    def with_embeddings(self, make: Callable[..., Any]) -> torch.Tensor:
        pivot = self.inverted(methods.FIXED_POINT)
        return self.sampled(pivot.with_embeddings(make(pivot, self.source)))

    def null_text(self) -> torch.Tensor:
        pivot = self.inverted(methods.FIXED_POINT)
        found = null_text.null_text_optimization(
            self.model, pivot, self.source, self.empty, self.scale, method=null_text.ADAPTIVE
        )
        return self.sampled(pivot.with_embeddings(found.embeddings))

    def noised(self) -> inversions.Inversion:
        return edit_friendly_ddpm_inversion(
            self.model, self.latent, self.source, self.empty, self.steps, 1.0, seed=self.seed
        )

    def edit_friendly(self) -> torch.Tensor:
        made = self.noised()
        skip = skipped_steps(self.steps, 0.2)
        return inversions.sample_inversion(self.model, made, self.target, self.empty, self.scale, skip)

    def rf_inversion(self) -> torch.Tensor:
        made = rf_inversion.rf_inversion(self.model, self.latent, self.empty, steps=self.steps, seed=self.seed)
        noise = InvertedNoise(self.model, made).generate_noise({"samples": self.latent})
        return self.stock(noise, self.latent, made.sigmas, rf_inversion.rf_inversion_sampler())

    def direct_inversion(self) -> torch.Tensor:
        pivot = self.inverted(methods.DDIM)
        return self.edited(direct_inversion_sampler(self.model, pivot))

    def mutual(self) -> torch.Tensor:
        pivot = self.inverted(methods.FIXED_POINT)
        model = mutual_self_attention(self.model, pivot, self.source, self.empty)
        return inversions.sample_inversion(model, pivot, self.target, self.empty, self.scale)

    def each(self, edit: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """Of methods whose words are one image's: every image alone."""
        edited = []
        for row, pair in enumerate(self.pairs):
            one = slice(row, row + 1)
            inverted_by = {
                method: (dataclasses.replace(made, trajectory=made.trajectory[:, one]), calls)
                for method, (made, calls) in self.inverted_by.items()
            }
            alone = dataclasses.replace(self, pairs=[pair], latent=self.latent[one], inverted_by=inverted_by)
            edited.append(edit(alone))
            self.calls = alone.calls
        return torch.cat(edited)

    def controlled(self) -> torch.Tensor:
        pivot, pair = self.inverted(methods.FIXED_POINT), self.pairs[0]
        prompts = caption(pair.source), caption(pair.target)
        model, target = prompt_to_prompt(self.model, self.clip, *prompts, REFINE, inversion=pivot)
        return inversions.sample_inversion(model, pivot, target, self.empty, self.scale)

    def masked(self) -> torch.Tensor:
        return self.blended(self.noised(), self.target, skip=0.2)

    def injected_and_masked(self) -> torch.Tensor:
        pivot = self.inverted(methods.FIXED_POINT)
        injected = injected_conditioning(self.model, pivot.sigmas, self.source, self.target, 0.25)
        return self.blended(pivot, injected)

    def blended(self, made: inversions.Inversion, target: Conditioning, skip: float = 0.0) -> torch.Tensor:
        shown = self.pairs[0].source
        if engine.is_joint(self.model):
            place = PLACE_PHRASES[shown.place]
            identity = identity_in_caption(self.clip, shown.species, caption(shown), place)
        else:
            identity = encode_identity_prompt(self.clip, shown.species)
        settings = BlendSettings(skip=skip, blend_until=0.8)
        return identity_mask_blend(
            self.model, made, self.source, target, identity, self.empty, guidance_scale=self.scale, settings=settings
        ).latent

    def edited(self, sampler: engine.EditSampler, guided: bool = True) -> torch.Tensor:
        scales = (1.5, self.scale) if guided else (1.0, 1.0)
        guider = engine.EditGuider(self.model, self.source, self.target, self.empty, *scales)
        noise = torch.zeros_like(self.latent)
        return guider.sample(noise, self.latent, sampler, self.sigmas, disable_pbar=True, seed=self.seed).cpu()


def edit_batch(
    model: Any, clip: Any, vae: Any, pairs: list[Pair], seed: int, arguments: argparse.Namespace, kind: type[Editor]
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The images [B, 128, 128, 3] of every method, and its model calls on each of them."""
    with torch.no_grad():
        latent = vae.encode(torch.stack([pair.before for pair in pairs]))
        true_edit = vae.encode(torch.stack([pair.after for pair in pairs]))
    editor = kind(model, clip, pairs, latent, arguments.steps, arguments.guidance_scale, seed)
    latents, calls = {"source, autoencoded": latent, "true edit, autoencoded": true_edit}, {}
    for name, edit in editor.methods().items():
        editor.calls = 0
        latents[name] = edit()
        calls[name] = editor.calls
    with torch.no_grad():
        return {name: vae.decode(value).cpu() for name, value in latents.items()}, calls


def measure(arguments: argparse.Namespace, kind: type[Editor] = Editor) -> Iterator[dict[str, Any]]:
    checkpoint = load_checkpoint(arguments.checkpoint)
    batches = batches_of_pairs(arguments)
    cases = Cases(arguments, list(batches))
    for unit in tqdm(cases.left, unit="batch"):
        batch = batches[unit]
        # Each batch has noise of its own.
        seed = arguments.seed + cases.units.index(unit)
        columns, calls = edit_batch(*checkpoint, batch, seed, arguments, kind)
        if unit == cases.units[0]:
            befores = torch.stack([pair.before for pair in batch])
            save_sheet(RESULTS / f"{arguments.name}.jpg", [befores, *columns.values()])
        prompts, sources = ([caption(getattr(pair, side)) for pair in batch] for side in ("target", "source"))
        scored = {}
        for name, images in columns.items():
            rows = score_edits(images, batch, prompts, sources)
            scored[name] = [
                {
                    **row,
                    "psnr_to_true_edit_db": mean_psnr(image, pair.after),
                    "model_calls": calls.get(name, 0),
                }
                for row, image, pair in zip(rows, images, batch, strict=True)
            ]
        cases.add(scored, independent=True)
        yield cases.figures()


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    rows = []
    for name, scores in figures["values"].items():
        cells = []
        for key in COLUMNS:
            mean = order(scores[key], [0.0] * figures["cases"])
            digits = 0 if key == "model_calls" else 1 if key.endswith("_db") else 2
            interval = f" [{mean.low:.{digits}f}, {mean.high:.{digits}f}]" if mean.low < mean.high else ""
            cells.append(f"{mean.difference:.{digits}f}{interval}")
        rows.append((name, *cells))
    return [
        "Editing with and without inversion on unseen subjects of the demo world",
        f"{figures['cases']} pairs by {arguments.checkpoint.name}, {arguments.steps} steps, guidance scale "
        f"{arguments.guidance_scale} of the target prompt; {figures['minutes']:.0f} minutes. In brackets: the 95 % "
        "bootstrap interval of the mean over pairs.",
        *markdown(("", *COLUMNS.values()), rows),
    ]
