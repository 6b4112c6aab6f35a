"""What does the demo MCDM do to portraits it has never seen? `python -m benchmarks portrait_edit`.

Table 1 of Chen et al. 2024 in small. Neutral portraits of held-out identities, each with one of the six edits that the
demo MCDM has learned from generated pairs (three expressions, three costumes); the renderer knows the true edit.

- SDEdit (Meng et al. 2022) at two strengths, prompt-to-prompt after DDIM inversion, and DiffEdit with the
  ordinary demo checkpoint: told the same as MCDM, the edit's words alone; DiffEdit once more told everything, the whole
  caption of the image and of its edit.
- MCDM without a condition means with its null value at inference, by the same weights. The paper trained without it:
  these rows are "MCDM trained without", where `--retrained` names such checkpoints (see docs/demo-world.md).
  All but "without mask" have the mask's guidance (eq. 3), as the paper's rows, and the mask is that of the whole MCDM.
- Every row twice: as it is, and with the source's own pixels pasted outside of a mask, which is the pack's addition
  (workflow `mcdm_edit`) and not the paper's. DiffEdit has its own mask, all others have MCDM's.

Scores: share of edits that the attribute classifier sees; share of images of which it sees the same hair, eyes, skin
and face (not the color of closed eyes); SSIM against the true edit; distance of the classifier's feature maps in the
manner of LPIPS (unit length in each cell, mean square over four depths; LPIPS itself needs weights that no package
carries); PSNR against the source where the true edit changes nothing; Frechet distance of the classifier's features to
those of the true edits, as FID of Inception's (of a whole row, so without an interval). A run that was stopped goes on
from the images in `--keep`.
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
from identity_edit_pack.pipelines.inversion.inversion import invert_image, sample_inversion
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
)
from .orders import Cases, Claim, Published, orders_section, shared_options
from .paper_scores import feature_distances, scores_of_edits
from .paper_scores import raw_features as classifier_features

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
RETRAINED = {
    mcdm.IMAGE_ALONE: "MCDM trained without spatial",
    mcdm.SPATIAL_ALONE: "MCDM trained without image embedding",
}
"""By the conditions that an MCDM was trained with, its row."""
SDEDIT, DIFFEDIT, TOLD = ("SDEdit 0.5", "SDEdit 0.8"), "DiffEdit", "DiffEdit, told everything"
PASTED = ", pasted"
SCORES = {
    "SSIM costumes": "ssim",
    "SSIM expressions": "ssim",
    "LPIPS costumes": "feature_distance",
    "LPIPS expressions": "feature_distance",
    "FID costumes": "frechet_distance",
    "FID expressions": "frechet_distance",
}
"""Both datasets of the paper stand beside both kinds of edit here, together."""
VALUES: dict[str, tuple[float | None, ...]] = {
    P2P: (0.764, 0.936, 0.694, 0.426, 83.94, 33.13),
    "pix2pix-zero": (0.695, 0.897, 0.812, 0.517, 120.8, 46.65),
    DIFFEDIT: (0.722, 0.922, 0.721, 0.423, 93.52, 32.20),
    SDEDIT[1]: (0.681, 0.914, 0.766, 0.461, 93.17, 38.59),
    SDEDIT[0]: (0.713, 0.925, 0.712, 0.445, 68.85, 38.99),
    "SPADE": (0.761, 0.936, 0.651, 0.427, 67.96, 31.02),
    "BBDM": (0.776, 0.937, 0.676, 0.432, 64.17, 27.26),
    "MCDM without pretraining": (0.734, 0.940, 0.672, 0.420, 84.58, 28.82),
    RETRAINED[mcdm.IMAGE_ALONE]: (0.767, 0.735, 0.665, 0.430, 78.38, 24.56),
    RETRAINED[mcdm.SPATIAL_ALONE]: (0.785, 0.941, 0.636, 0.408, 65.74, 23.07),
    WITHOUT_MASK: (0.788, 0.940, 0.639, 0.421, 63.52, 26.61),
    FULL: (0.791, 0.943, 0.633, 0.400, 52.56, 22.09),
}
BELOW = (*SDEDIT, P2P, DIFFEDIT, *RETRAINED.values(), WITHOUT_MASK)
NULL_VALUES = (WITHOUT_SPATIAL, WITHOUT_IMAGE)
PUBLISHED = (Published("Table 1", SCORES, VALUES, tuple((FULL, name) for name in BELOW)),)
CLAIMS = (
    *(
        Claim("table 1, null values", FULL, name, score)
        for name in NULL_VALUES
        for score in ("ssim", "feature_distance")
    ),
    *(
        Claim("table 1, all pasted", FULL + PASTED, name + PASTED, score)
        for name in (*BELOW, *NULL_VALUES)
        for score in ("ssim", "feature_distance")
    ),
    *(
        Claim("figure 6, identity", FULL + pasted, name + pasted, "identity_kept")
        for pasted in ("", PASTED)
        for name in (*RETRAINED.values(), *NULL_VALUES, WITHOUT_MASK)
    ),
)


@dataclass(frozen=True)
class Parts:
    """The networks: the ordinary checkpoint's, the MCDM's, and by row those of MCDMs that lack a condition."""

    model: Any
    clip: Any
    vae: Any
    edit_model: Any
    vision: Any
    mcdm: Any
    retrained: dict[str, tuple[Any, Any]]


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
    inversion = invert_image(parts.model, latent, source, steps=INVERSION_STEPS)
    made = []
    for index, pair in enumerate(pairs):
        own = dataclasses.replace(inversion, trajectory=inversion.trajectory[:, index : index + 1])
        model, positive = prompt_to_prompt(parts.model, parts.clip, *words(pair), REFINE, inversion=own)
        made.append(sample_inversion(model, own, positive))
    return parts.vae.decode(torch.cat(made))


def by_diffedit(parts: Parts, pairs: list[Pair], words: Words, seed: int, name: str) -> dict[str, torch.Tensor]:
    source, target, empty = prompts(parts, pairs, words)
    images = torch.stack([pair.before for pair in pairs])
    latent = parts.vae.encode(images)
    settings = EditMaskSettings(outliers=3.0)
    mask = edit_mask(parts.model, target, source, latent, settings, seed=seed).mask
    inversion = invert_image(parts.model, latent, empty, steps=INVERSION_STEPS)
    result = identity_mask_blend(
        parts.model, inversion, target, target, None, empty, guidance_scale=GUIDANCE_SCALE,
        settings=BlendSettings(skip=0.3), source_mask=mask, target_mask=mask,
    )  # fmt: skip
    made = parts.vae.decode(result.latent)
    return {name: made, name + PASTED: composite(images, made, mask)}


def by_mcdm(parts: Parts, pairs: list[Pair], seed: int, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """All four, those of other trainings, and the mask; the latter and what is seen of the images are made once."""
    model, images = parts.edit_model, torch.stack([pair.before for pair in pairs])
    seen = mcdm.see_images(parts.mcdm, model, parts.vision, parts.vae, images)
    source, target, empty = (mcdm.with_images(each, seen) for each in prompts(parts, pairs, edit_words))
    settings = EditMaskSettings(kernel=arguments.kernel)
    contrast = edit_mask(model, target, source, seen.latent, settings, seed=seed).contrast
    limits = [arguments.threshold if pair.edited == "expression" else arguments.costume_threshold for pair in pairs]
    mask = (contrast > torch.tensor(limits)[:, None, None]).float()

    scales = GuidanceScales(arguments.image_scale, arguments.spatial_scale, arguments.text_scale)

    def guided(spatial: bool = True, image: bool = True) -> Any:
        positive, negative, same = (
            mcdm.without_images(c, spatial=not spatial, image=not image, name="prompt") for c in (target, empty, source)
        )
        return mcdm_guider(model, positive, negative, scales, same, mask)

    guiders = {
        WITHOUT_SPATIAL: guided(spatial=False),
        WITHOUT_IMAGE: guided(image=False),
        WITHOUT_MASK: mcdm_guider(model, target, empty, scales),
        FULL: guided(),
    }
    for name, (other, learned) in parts.retrained.items():
        of_other = mcdm.see_images(learned, other, parts.vision, parts.vae, images)
        same, positive, negative = (
            mcdm.only_with(mcdm.with_images(each, of_other), learned, mcdm.trained_with(learned))
            for each in prompts(parts, pairs, edit_words)
        )
        guiders[name] = mcdm_guider(other, positive, negative, scales, same, mask)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    zeros = torch.zeros_like(seen.latent)
    made = {}
    for name, guider in guiders.items():
        sampler = comfy.samplers.sampler_object("uni_pc")
        noise = comfy.sample.prepare_noise(zeros, seed)
        made[name] = parts.vae.decode(guider.sample(noise, zeros, sampler, sigmas, disable_pbar=True, seed=seed))
    made["mask"] = mask
    return made


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


def score(images: torch.Tensor, pairs: list[Pair]) -> list[dict[str, Any]]:
    """`score_each`, the distance to the true edit in the manner of LPIPS, and CLIP's scores."""
    prompts, sources = ([caption(getattr(pair, side)) for pair in pairs] for side in ("target", "source"))
    before, after = (torch.stack([getattr(pair, side) for pair in pairs]) for side in ("before", "after"))
    seen, papers = score_each(load_classifier(), images, pairs), scores_of_edits(images, before, prompts, sources)
    distances = feature_distances(images, after).tolist()
    return [
        {**paper, **row, "feature_distance": distance}
        for row, paper, distance in zip(seen, papers, distances, strict=True)
    ]


_worker: tuple[Parts, argparse.Namespace] | None = None


def load(arguments: argparse.Namespace) -> None:
    """Load the networks in a worker process."""
    global _worker
    checkpoint = load_checkpoint(arguments.checkpoint)
    (edit_model, learned), *others = (
        (comfy.sd.load_diffusion_model(str(file)), mcdm.load_mcdm(str(file)))
        for file in (arguments.mcdm, *arguments.retrained)
    )
    retrained = {RETRAINED[mcdm.trained_with(each[1])]: each for each in others}
    _worker = Parts(*checkpoint, edit_model, load_clip_vision(), learned, retrained), arguments


def edit_batch(task: tuple[list[Pair], int, str]) -> dict[str, np.ndarray]:
    """The images [B, 128, 128, 3] of every method for some portraits, a seed of noise and a name."""
    assert _worker is not None
    (parts, arguments), (pairs, seed, batch) = _worker, task
    ways: dict[str, Callable[[], torch.Tensor | dict[str, torch.Tensor]]] = {
        **{
            name: partial(by_sdedit, parts, pairs, edit_words, strength, seed)
            for name, strength in zip(SDEDIT, (0.5, 0.8), strict=True)
        },
        P2P: partial(by_prompt_to_prompt, parts, pairs, edit_words),
        DIFFEDIT: partial(by_diffedit, parts, pairs, edit_words, seed, DIFFEDIT),
        TOLD: partial(by_diffedit, parts, pairs, whole_captions, seed, TOLD),
        f"MCDM {mcdm_settings(arguments)}": partial(by_mcdm, parts, pairs, seed, arguments),
    }
    made: dict[str, np.ndarray] = {}
    for name, way in ways.items():
        path = arguments.keep / f"{name}, unpasted, {batch} {len(pairs)}.safetensors" if arguments.keep else None
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
    before, mask = torch.stack([pair.before for pair in pairs]), torch.from_numpy(made["mask"])
    for name in (*SDEDIT, P2P, *NAMES, *parts.retrained):
        made[name + PASTED] = composite(before, torch.from_numpy(made[name]), mask).numpy()
    return made


def mcdm_settings(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """For which its images are kept."""
    names = ("image_scale", "spatial_scale", "text_scale", "threshold", "costume_threshold", "kernel")
    return *(getattr(arguments, name) for name in names), *(file.stem for file in arguments.retrained)


OPTIONS: Options = {
    **shared_options(2, "portrait_edit"),
    "portraits": (60, "for each seed, a sixth of each edit (60)"),
    "batch": (12, "portraits at once (12)"),
    "threshold": (0.2, "of the mask for expressions; 0.35 in the paper"),
    "costume_threshold": (0.2, "and for costumes, as in the paper"),
    "kernel": (3, "of the mask's Gaussian; 5 in the paper, on 64x64 latent pixels"),
    "image_scale": (3.0, "of MCDM's image embedding (3)"),
    "spatial_scale": (3.0, "of its spatial condition (3)"),
    "text_scale": (4.0, "of its text; 5 in the paper"),
    "keep": (None, "a folder in which images are kept, so that a run that was stopped goes on", {"type": Path}),
    "mcdm": (DEMO_MCDM, "a checkpoint of Train MCDM (the demo world's)"),
    "retrained": ([], "checkpoints trained without a condition (none)", {"nargs": "*", "type": Path}),
    "processes": (1, "that share the portraits (1)"),
    **SEED,
    **CHECKPOINT,
    **THREADS,
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    seeds, numbers = range(arguments.seed, arguments.seed + arguments.seeds), range(arguments.portraits)
    tasks = [
        (
            [draw_pair(seed, index) for index in numbers[start : start + arguments.batch]],
            seed + start,
            f"{seed} {start}",
        )
        for seed in seeds
        for start in numbers[:: arguments.batch]
    ]
    made: dict[str, list[torch.Tensor]] = {}
    for result in in_processes(edit_batch, tasks, arguments, load):
        for name, images in result.items():
            made.setdefault(name, []).append(torch.from_numpy(images))
    pairs = [pair for some, *_ in tasks for pair in some]
    columns = {name: torch.cat(images).clamp(0, 1) for name, images in made.items()}
    masks = columns.pop("mask")[:12].repeat_interleave(8, 1).repeat_interleave(8, 2)[..., None].expand(-1, -1, -1, 3)
    before, after = (torch.stack([getattr(pair, side) for pair in pairs]) for side in ("before", "after"))
    save_sheet(RESULTS / f"{arguments.name}.jpg", [before, *columns.values(), masks, after])
    columns[TRUTH] = after
    cases = Cases(arguments, ["all portraits"], resume=False)
    cases.add({name: score(images, pairs) for name, images in columns.items()}, independent=True)
    figures = cases.figures()
    for name, images in columns.items():
        found, true = (classifier_features(each).double().numpy() for each in (images, after))
        figures["rows"][name]["frechet_distance"] = frechet_distance(found, true)
    return figures


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    rows = [
        (name, f"{row['edit_done']:.2f}", f"{row['expression_done']:.2f} / {row['costume_done']:.2f}",
         f"{row['identity_kept']:.2f}", f"{row['both']:.2f}", f"{row['ssim']:.3f}", f"{row['feature_distance']:.3f}",
         f"{row['psnr_outside_db']:.1f} dB", f"{row['frechet_distance']:.1f}",
         *(f"{row[key]:.3f}" for key in ("feature_similarity", "clip_i", "clip_t", "clip_d")))
        for name, row in figures["rows"].items()
    ]  # fmt: skip
    scores = "SSIM", "feature distance", "PSNR outside", "Frechet distance"
    papers = "feature similarity", "CLIP-I", "CLIP-T", "CLIP-D"
    return [
        "Portrait edits of held-out identities of the demo world",
        f"{arguments.seeds} seeds from {arguments.seed} on, {figures['cases']} portraits, six edits; MCDM with scales "
        f"{arguments.image_scale:g}, {arguments.spatial_scale:g}, {arguments.text_scale:g}, {STEPS} steps of UniPC, "
        f"mask thresholds {arguments.threshold:g} and {arguments.costume_threshold:g} (costumes), kernel "
        f"{arguments.kernel}"
        + (f"; {figures['minutes']:.0f} minutes." if arguments.keep is None else ".")
        + " *pasted*: with the source's pixels outside of the mask, which the paper does not do. MCDM without a "
        "condition has its null value at inference; *trained without* is the paper's.",
        *markdown(("method", "edit done", "expression / costume", "identity kept", "both", *scores, *papers), rows),
        *orders_section(PUBLISHED, CLAIMS, figures, "Chen et al. 2024"),
    ]
