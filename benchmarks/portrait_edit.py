"""What does the demo MCDM do to portraits it has never seen? `python -m benchmarks portrait_edit`.

Table 1 of Chen et al. 2024 in small. Neutral portraits of held-out identities, each with one of the six edits that the
demo MCDM has learned from generated pairs (three expressions, three costumes); the renderer knows the true edit.

- SDEdit (Meng et al. 2022) at two strengths, prompt-to-prompt after DDIM inversion, and DiffEdit with the
  ordinary demo checkpoint: told the same as MCDM, the edit's words alone; DiffEdit once more told everything, the whole
  caption of the image and of its edit.
- MCDM without a condition means with its null value at inference, by the same weights; the paper trained without it.
  The full method is that of the workflow `mcdm_edit`: the mask's guidance, and the source's own pixels outside of it.

Scores: share of edits that the attribute classifier sees; share of images of which it sees the same hair, eyes, skin
and face (not the color of closed eyes); SSIM against the true edit; distance of the classifier's feature maps in the
manner of LPIPS (unit length in each cell, mean square over four depths; LPIPS itself needs weights that no package
carries); PSNR against the source where the true edit changes nothing; Frechet distance of the classifier's features to
those of the true edits, as FID of Inception's.
Writes benchmarks/results/portrait_edit.json, .md and .jpg (the first portraits, as they came).
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd
import numpy as np
import scipy.linalg
import torch
from identity_edit_pack.demo_world.attributes import IDENTITY_OF, caption, random_attributes
from identity_edit_pack.demo_world.classifier import AttributeClassifier, classify, load_classifier
from identity_edit_pack.demo_world.clip_vision import load_clip_vision
from identity_edit_pack.demo_world.images import EVALUATION_SEED, HEADS
from identity_edit_pack.pipelines.attention_control.prompt_to_prompt import REFINE, prompt_to_prompt
from identity_edit_pack.pipelines.inversion.inversion import ddim_inversion, sample_inversion
from identity_edit_pack.pipelines.lipe.identity_mask_blend import BlendSettings, identity_mask_blend
from identity_edit_pack.pipelines.mcdm import model as mcdm
from identity_edit_pack.pipelines.mcdm.edit_mask import EditMaskSettings, edit_mask
from identity_edit_pack.pipelines.mcdm.guidance import GuidanceScales, mcdm_guider
from identity_edit_pack.pipelines.shared.conditioning import Conditioning
from safetensors.numpy import load_file, save_file
from skimage.metrics import structural_similarity

from .edits import Pair, composite, embed, mean_psnr, render_pair, save_sheet
from .harness import (
    CHECKPOINT,
    DEMO_MCDM,
    RESULTS,
    SEED,
    THREADS,
    Options,
    in_processes,
    load_checkpoint,
    markdown,
    means,
)

EDITS = {
    "smiling": ("expression", "a portrait of a smiling person"),
    "santa hat": ("costume", "a portrait of a person wearing a santa hat"),
    "angry": ("expression", "a portrait of an angry person"),
    "crown": ("costume", "a portrait of a person wearing a crown"),
    "crying": ("expression", "a portrait of a crying person"),
    "scarf": ("costume", "a portrait of a person wearing a scarf"),
}
SOURCE_PROMPT = "a portrait of a person"
STEPS = 20
INVERSION_STEPS = 20
P2P, TRUTH = "prompt-to-prompt", "true edit (renderer)"
GUIDANCE_SCALE = 4.0
"""Of the shipped workflows with the ordinary demo checkpoint; 1 with prompt-to-prompt, after plain DDIM inversion."""
NAMES = ("MCDM without spatial", "MCDM without image embedding", "MCDM without mask", "MCDM")
WITHOUT_SPATIAL, WITHOUT_IMAGE, WITHOUT_MASK, FULL = NAMES


@dataclass(frozen=True)
class Parts:
    """The networks: the ordinary checkpoint's, and the MCDM's."""

    model: Any
    clip: Any
    vae: Any
    edit_model: Any
    vision: Any
    mcdm: Any


def draw_pair(seed: int, index: int) -> Pair:
    generator = random.Random(f"portrait {seed} {index}")
    source = random_attributes(generator, "portrait", held_out=True).replace(expression="neutral", costume="none")
    edit = list(EDITS)[index % len(EDITS)]
    kind = EDITS[edit][0]
    return render_pair(source, source.replace(**{kind: edit}), kind, EVALUATION_SEED + 3_000_000 * (seed + 1) + index)


def edit_of(pair: Pair) -> str:
    return str(getattr(pair.target, pair.edited))


Words = Callable[[Pair], tuple[str, str]]
"""The source and the target prompt of a pair."""


def edit_words(pair: Pair) -> tuple[str, str]:
    """What MCDM is told."""
    return SOURCE_PROMPT, EDITS[edit_of(pair)][1]


def whole_captions(pair: Pair) -> tuple[str, str]:
    """All that can be said of the image and of its edit."""
    return caption(pair.source), caption(pair.target)


def prompts(parts: Parts, pairs: list[Pair], words: Words) -> tuple[Conditioning, Conditioning, Conditioning]:
    """Of the images, of their edits, and the empty one."""
    sources, targets = zip(*map(words, pairs), strict=True)
    source, target, empty = (embed(parts.clip, list(texts)) for texts in (sources, targets, [""] * len(pairs)))
    return source, target, empty


def by_sdedit(parts: Parts, pairs: list[Pair], words: Words, strength: float, seed: int) -> torch.Tensor:
    _, target, empty = prompts(parts, pairs, words)
    latent = parts.vae.encode(torch.stack([pair.before for pair in pairs]))
    made = comfy.sample.sample(
        parts.model, comfy.sample.prepare_noise(latent, seed), STEPS, GUIDANCE_SCALE, "ddim", "ddim_uniform", target,
        empty, latent, denoise=strength, disable_pbar=True, seed=seed,
    )  # fmt: skip
    return parts.vae.decode(made)


def by_prompt_to_prompt(parts: Parts, pairs: list[Pair], words: Words) -> torch.Tensor:
    source, _, _ = prompts(parts, pairs, words)
    latent = parts.vae.encode(torch.stack([pair.before for pair in pairs]))
    inversion = ddim_inversion(parts.model, latent, source, steps=INVERSION_STEPS)
    made = []
    for index, pair in enumerate(pairs):
        own = dataclasses.replace(inversion, trajectory=inversion.trajectory[:, index : index + 1])
        model, positive = prompt_to_prompt(parts.model, parts.clip, *words(pair), REFINE, inversion=own)
        made.append(sample_inversion(model, own, positive))
    return parts.vae.decode(torch.cat(made))


def by_diffedit(parts: Parts, pairs: list[Pair], words: Words, seed: int) -> torch.Tensor:
    source, target, empty = prompts(parts, pairs, words)
    images = torch.stack([pair.before for pair in pairs])
    latent = parts.vae.encode(images)
    settings = EditMaskSettings(outliers=3.0)
    mask = edit_mask(parts.model, target, source, latent, settings, seed=seed).mask
    inversion = ddim_inversion(parts.model, latent, empty, steps=INVERSION_STEPS)
    result = identity_mask_blend(
        parts.model, inversion, target, target, None, empty, guidance_scale=GUIDANCE_SCALE,
        settings=BlendSettings(skip=0.3), source_mask=mask, target_mask=mask,
    )  # fmt: skip
    return composite(images, parts.vae.decode(result.latent), mask)


def by_mcdm(parts: Parts, pairs: list[Pair], seed: int, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """All four; the mask and what is seen of the images are made once."""
    model, images = parts.edit_model, torch.stack([pair.before for pair in pairs])
    seen = mcdm.see_images(parts.mcdm, model, parts.vision, parts.vae, images)
    source, target, empty = (mcdm.with_images(each, seen) for each in prompts(parts, pairs, edit_words))
    settings = EditMaskSettings(kernel=arguments.kernel)
    contrast = edit_mask(model, target, source, seen.latent, settings, seed=seed).contrast
    limits = [arguments.threshold if pair.edited == "expression" else arguments.costume_threshold for pair in pairs]
    mask = (contrast > torch.tensor(limits)[:, None, None]).float()

    scales = GuidanceScales(arguments.image_scale, arguments.spatial_scale, arguments.text_scale)

    def without(spatial: bool, image: bool) -> Any:
        positive, negative = (
            mcdm.without_images(c, spatial=spatial, image=image, name="prompt") for c in (target, empty)
        )
        return mcdm_guider(model, positive, negative, scales)

    guiders = {
        WITHOUT_SPATIAL: without(spatial=True, image=False),
        WITHOUT_IMAGE: without(spatial=False, image=True),
        WITHOUT_MASK: mcdm_guider(model, target, empty, scales),
        FULL: mcdm_guider(model, target, empty, scales, source, mask),
    }
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    zeros = torch.zeros_like(seen.latent)
    made = {}
    for name, guider in guiders.items():
        sampler = comfy.samplers.sampler_object("uni_pc")
        noise = comfy.sample.prepare_noise(zeros, seed)
        made[name] = parts.vae.decode(guider.sample(noise, zeros, sampler, sigmas, disable_pbar=True, seed=seed))
    made[FULL] = composite(images, made[FULL], mask)
    made["mask"] = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[..., None].expand(-1, -1, -1, 3)
    return made


def features(classifier: torch.nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The classifier's feature maps at four depths [B, C, h, w], and the features that its answers are made of."""
    x = images.permute(0, 3, 1, 2) * 2 - 1
    maps = []
    for layer in classifier.features:  # type: ignore[union-attr]
        x = layer(x)
        if isinstance(layer, torch.nn.ReLU):
            maps.append(x)
    return maps, classifier.squeeze(x)  # type: ignore[operator]


def feature_distances(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """[B] from two lists of feature maps, in the manner of LPIPS (Zhang et al. 2018, equation 1) without its learned
    weights of channels."""
    total = torch.zeros(len(a[0]))
    for of_a, of_b in zip(a, b, strict=True):
        first, second = (torch.nn.functional.normalize(each, dim=1) for each in (of_a, of_b))
        total += (first - second).square().sum(1).mean((1, 2))
    return total


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of two Gaussians fitted to features [N, D] (Heusel et al. 2017)."""
    of_a, of_b = (np.cov(each, rowvar=False) for each in (a, b))
    root = scipy.linalg.sqrtm(of_a @ of_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(of_a + of_b - 2 * np.real(root)))


def score_each(classifier: AttributeClassifier, images: torch.Tensor, pairs: list[Pair]) -> list[dict[str, Any]]:
    """For each pair: whether the classifier sees the edit done and the identity kept, SSIM against the true edit, and
    PSNR against the source where the true edit changes nothing."""
    answers = classify(classifier, images)
    rows = []
    for index, (image, pair) in enumerate(zip(images, pairs, strict=True)):
        sees = {head: HEADS[head][int(answers[head][index])] for head in HEADS}
        compared = [n for n in IDENTITY_OF["portrait"] if not (n == "eye_color" and edit_of(pair) == "crying")]
        done = sees["framing"] == "portrait" and sees[pair.edited] == edit_of(pair)
        kept = sees["framing"] == "portrait" and all(sees[n] == getattr(pair.source, n) for n in compared)
        same = (pair.before - pair.after).abs().amax(-1) == 0.0
        rows.append(
            {
                "edit_done": done,
                f"{pair.edited}_done": done,
                "identity_kept": kept,
                "both": done and kept,
                "ssim": structural_similarity(image.numpy(), pair.after.numpy(), channel_axis=2, data_range=1),
                "psnr_outside_db": mean_psnr(image[same], pair.before[same]),
            }
        )
    return rows


def score(images: torch.Tensor, pairs: list[Pair]) -> dict[str, Any]:
    classifier = load_classifier()
    truths = torch.stack([pair.after for pair in pairs])
    distances, ours, theirs = [], [], []
    with torch.no_grad():
        for some, true in zip(images.split(32), truths.split(32), strict=True):
            (maps, own), (true_maps, their) = features(classifier, some), features(classifier, true)
            distances.append(feature_distances(maps, true_maps))
            ours.append(own)
            theirs.append(their)
    frechet = frechet_distance(*(torch.cat(each).double().numpy() for each in (ours, theirs)))
    found = {"feature_distance": float(torch.cat(distances).mean()), "frechet_distance": frechet}
    return means(score_each(classifier, images, pairs)) | found


def orderings(report: dict[str, dict[str, Any]]) -> list[str]:
    """Which of the orderings of the paper's table 1 appear: by SSIM, distance of features and Frechet distance."""
    lines = []
    better = {"ssim": 1, "feature_distance": -1, "frechet_distance": -1}
    for other in [name for name in report if name not in (FULL, TRUTH)]:
        seen = [
            "yes" if sign * (report[FULL][name] - report[other][name]) > 0 else "no" for name, sign in better.items()
        ]
        lines.append(f"- MCDM better than {other}: {' / '.join(seen)}")
    return lines


_worker: tuple[Parts, argparse.Namespace] | None = None


def load(arguments: argparse.Namespace) -> None:
    """Load the networks in a worker process."""
    global _worker
    checkpoint = load_checkpoint(arguments.checkpoint)
    edit_model = comfy.sd.load_diffusion_model(str(arguments.mcdm))
    _worker = Parts(*checkpoint, edit_model, load_clip_vision(), mcdm.load_mcdm(str(arguments.mcdm))), arguments


def edit_batch(task: tuple[list[Pair], int]) -> dict[str, np.ndarray]:
    """The images [B, 128, 128, 3] of every method for some portraits and a seed."""
    assert _worker is not None
    (parts, arguments), (pairs, seed) = _worker, task
    ways: dict[str, Callable[[], torch.Tensor | dict[str, torch.Tensor]]] = {
        **{f"SDEdit {s}": partial(by_sdedit, parts, pairs, edit_words, s, seed) for s in (0.5, 0.8)},
        P2P: partial(by_prompt_to_prompt, parts, pairs, edit_words),
        "DiffEdit": partial(by_diffedit, parts, pairs, edit_words, seed),
        "DiffEdit, told everything": partial(by_diffedit, parts, pairs, whole_captions, seed),
        f"MCDM {mcdm_settings(arguments)}": partial(by_mcdm, parts, pairs, seed, arguments),
    }
    made: dict[str, np.ndarray] = {}
    for name, way in ways.items():
        path = arguments.keep / f"{name} {seed} {len(pairs)}.safetensors" if arguments.keep else None
        if path is not None and path.exists():
            made |= load_file(path)
            continue
        with torch.no_grad():
            found = way()
        of_names = found if isinstance(found, dict) else {name: found}
        images = {key: value.detach().cpu().contiguous().numpy() for key, value in of_names.items()}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(images, path)
        made |= images
    return made


def mcdm_settings(arguments: argparse.Namespace) -> tuple[float, ...]:
    """For which its images are kept."""
    names = ("image_scale", "spatial_scale", "text_scale", "threshold", "costume_threshold", "kernel")
    return tuple(getattr(arguments, name) for name in names)


OPTIONS: Options = {
    "portraits": (204, "a sixth for each edit (204)"),
    "batch": (12, "portraits at once (12)"),
    "threshold": (0.2, "of the mask for expressions; 0.35 in the paper"),
    "costume_threshold": (0.2, "and for costumes, as in the paper"),
    "kernel": (3, "of the mask's Gaussian; 5 in the paper, on 64x64 latent pixels"),
    "image_scale": (3.0, "of MCDM's image embedding (3)"),
    "spatial_scale": (3.0, "of its spatial condition (3)"),
    "text_scale": (4.0, "of its text; 5 in the paper"),
    "keep": (None, "a folder in which images are kept, so that a run that was stopped goes on", {"type": Path}),
    "mcdm": (DEMO_MCDM, "a checkpoint of Train MCDM (the demo world's)"),
    "processes": (1, "that share the portraits (1)"),
    **SEED,
    **CHECKPOINT,
    **THREADS,
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    pairs = [draw_pair(arguments.seed, index) for index in range(arguments.portraits)]
    starts = range(0, len(pairs), arguments.batch)
    tasks = [(pairs[start : start + arguments.batch], arguments.seed + start) for start in starts]
    made: dict[str, list[torch.Tensor]] = {}
    for result in in_processes(edit_batch, tasks, arguments, load):
        for name, images in result.items():
            made.setdefault(name, []).append(torch.from_numpy(images))
    columns = {name: torch.cat(images).clamp(0, 1) for name, images in made.items()}
    masks = columns.pop("mask")
    before, after = (torch.stack([getattr(pair, side) for pair in pairs]) for side in ("before", "after"))
    save_sheet(RESULTS / "portrait_edit.jpg", [before, *columns.values(), masks, after])
    report = {name: score(images, pairs) for name, images in (columns | {TRUTH: after}).items()}
    return {"portraits": len(pairs), "methods": report}


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    rows = [
        (name, f"{row['edit_done']:.2f}", f"{row['expression_done']:.2f} / {row['costume_done']:.2f}",
         f"{row['identity_kept']:.2f}", f"{row['both']:.2f}", f"{row['ssim']:.3f}", f"{row['feature_distance']:.3f}",
         f"{row['psnr_outside_db']:.1f} dB", f"{row['frechet_distance']:.1f}")
        for name, row in figures["methods"].items()
    ]  # fmt: skip
    scores = "SSIM", "feature distance", "PSNR outside", "Frechet distance"
    return [
        "Portrait edits of held-out identities of the demo world",
        f"{arguments.portraits} portraits, six edits, seed {arguments.seed}; MCDM with scales "
        f"{arguments.image_scale:g}, {arguments.spatial_scale:g}, {arguments.text_scale:g}, {STEPS} steps of UniPC, "
        f"mask thresholds {arguments.threshold:g} and {arguments.costume_threshold:g} (costumes), kernel "
        f"{arguments.kernel}" + (f"; {figures['minutes']:.0f} minutes." if arguments.keep is None else "."),
        *markdown(("method", "edit done", "expression / costume", "identity kept", "both", *scores), rows),
        "",
        "The paper's orderings, by SSIM / feature distance / Frechet distance:",
        "",
        *orderings(figures["methods"]),
    ]
