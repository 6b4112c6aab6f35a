"""Does timestep-aware injection keep more and still edit? `python -m benchmarks timestep_aware_edit`.

Non-rigid edits (pose, expression, costume) of images of subjects that the demo checkpoint has never seen, by every
stage of Jung et al. 2024: DDIM inversion with the target prompt, null-text inversion with the target prompt, text
optimization added, and timestep-aware injection at 10, 20 and 40 % added; beside them null-text inversion with an
empty source prompt (figure 7), with guidance in the inversion too (section 4), MasaCtrl after null-text inversion
(figure 6), and Imagic (figure 8). The renderer knows the true edit, so that the background is what lies outside the
subject in both images. Scores: share of edits that the attribute classifier sees, share of images whose species, color
and pattern it all sees kept, PSNR of the background and of the whole image against the source image, SSIM against the
true edit, and the papers' own in the form of `paper_scores.py`.
Writes benchmarks/results/timestep_aware_edit.json, .md, .png (the trade-off) and .jpg (the first pairs, as they came).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from typing import Any

import torch
from identity_edit_pack.demo_world.attributes import ATTRIBUTES_OF, caption, random_attributes
from identity_edit_pack.demo_world.images import EVALUATION_SEED
from identity_edit_pack.pipelines.attention_control.mutual_self_attention import mutual_self_attention
from identity_edit_pack.pipelines.inversion.inversion import invert_image, sample_inversion
from identity_edit_pack.pipelines.inversion.null_text import METHODS as NULL_TEXT_METHODS
from identity_edit_pack.pipelines.inversion.null_text import null_text_optimization
from identity_edit_pack.pipelines.timestep_aware.text_injection import edit_conditioning, timestep_aware_sampling
from identity_edit_pack.pipelines.timestep_aware.text_optimization import optimize_text_embedding
from matplotlib import pyplot
from tqdm import tqdm

from .edits import PAPER_SCORES, Pair, edits_table, embed, render_pair, save_sheet, score_edits
from .harness import CHECKPOINT, RESULTS, SEED, Options, load_checkpoint
from .imagic import IMAGIC, IMAGIC_OPTIONS, imagic
from .orders import Cases, Claim, Published, orders_section, shared_options

DDIM, NULL_TEXT, OPTIMIZED = "DDIM + target", "null-text + target", "+ text optimization"
UNNAMED, MASACTRL = "null-text + target, empty source prompt", "null-text + MasaCtrl"
GUIDED = "null-text + target, inversion guided too"
INJECTED = {ratio: f"+ injection {ratio * 100:.0f} %" for ratio in (0.1, 0.2, 0.4)}
PUBLISHED: tuple[Published, ...] = ()
"""The paper prints no table."""
CLAIMS = (
    Claim("figure 6, CLIP-T", INJECTED[0.2], MASACTRL, "clip_t"),
    Claim("figure 6, LPIPS", INJECTED[0.2], MASACTRL, "feature_distance"),
    Claim("figure 6, CLIP-T", MASACTRL, IMAGIC, "clip_t"),
    *(Claim("figure 6, CLIP-T", name, IMAGIC, "clip_t") for name in INJECTED.values()),
    Claim("figure 6, LPIPS", INJECTED[0.4], IMAGIC, "feature_distance"),
    Claim("figure 7, editing", NULL_TEXT, DDIM, "edit_done"),
    Claim("figure 7, editing", NULL_TEXT, DDIM, "clip_t"),
    Claim("figure 7, structure", UNNAMED, NULL_TEXT, "feature_distance"),
    Claim("figure 7, structure", UNNAMED, NULL_TEXT, "background_psnr_db"),
    Claim("section 4, text optimization", OPTIMIZED, NULL_TEXT, "feature_distance"),
    Claim("section 4, text optimization", OPTIMIZED, NULL_TEXT, "background_psnr_db"),
    *(
        Claim(f"figure 2, {ratio * 100:.0f} %", name, OPTIMIZED, score)
        for ratio, name in INJECTED.items()
        for score in ("feature_distance", "background_psnr_db", "identity_kept", "edit_done")
    ),
)
"""Of figure 6, what one setting of each method can show. Injection is not meant to raise `edit_done`: its interval says
how many edits are lost."""
EDITED = ("pose", "expression", "costume")
GUIDANCE_SCALE = 4.0
"""Of the shipped workflows: the demo checkpoint needs less guidance than the 7.5 of Stable Diffusion and the paper."""


def draw_pair(seed: int, index: int) -> Pair:
    generator = random.Random(f"pair {seed} {index}")
    source = random_attributes(generator, "figure", held_out=True)
    edited = EDITED[index % len(EDITED)]
    if edited == "costume":
        source = source.replace(costume="none")
    others = [choice for choice in ATTRIBUTES_OF["figure"][edited] if choice != getattr(source, edited)]
    target = source.replace(**{edited: generator.choice(others)})
    return render_pair(source, target, edited, EVALUATION_SEED + index)


def batches_of_pairs(arguments: argparse.Namespace) -> dict[str, list[Pair]]:
    """The pairs of all seeds, by the name of their batch."""
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    pairs = [draw_pair(seed, index) for seed in seeds for index in range(arguments.pairs)]
    starts = range(0, len(pairs), arguments.batch)
    return {f"pairs from {start} on": pairs[start : start + arguments.batch] for start in starts}


def edit_batch(
    model: Any, clip: Any, vae: Any, pairs: list[Pair], arguments: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """The images [B, 128, 128, 3] of every method, in the order of the paper's stages."""
    with torch.no_grad():
        latent = vae.encode(torch.stack([pair.before for pair in pairs]))
    source = embed(clip, [caption(pair.source) for pair in pairs])
    target = embed(clip, [caption(pair.target) for pair in pairs])
    empty, without = embed(clip, [""]), embed(clip, [""] * len(pairs))
    scale = arguments.guidance_scale

    inversion = invert_image(model, latent, source, steps=arguments.steps)
    null_text = null_text_optimization(
        model, inversion, source, empty, guidance_scale=scale, method=arguments.null_text
    )
    pivot = inversion.with_embeddings(null_text.embeddings)
    optimized = optimize_text_embedding(model, latent, target).embedding
    edit = edit_conditioning(target, [[optimized, {}]], arguments.eta)
    others = {
        UNNAMED: (without, invert_image(model, latent, without, steps=arguments.steps)),
        GUIDED: (source, invert_image(model, latent, source, empty, steps=arguments.steps, guidance_scale=scale)),
    }
    masactrl = mutual_self_attention(model, pivot, source)
    latents = {
        "source image, autoencoder only": latent,
        "null-text reconstruction": null_text.reconstruction,
        DDIM: sample_inversion(model, inversion, target),
        MASACTRL: sample_inversion(masactrl, pivot, target, guidance_scale=scale),
        NULL_TEXT: timestep_aware_sampling(model, pivot, source, target, None, 0.0, scale).latent,
        OPTIMIZED: timestep_aware_sampling(model, pivot, source, edit, None, 0.0, scale).latent,
        IMAGIC: imagic(model, latent, optimized, target, empty, arguments.steps, arguments),
    }
    for name, (prompt, other) in others.items():
        found = null_text_optimization(model, other, prompt, empty, guidance_scale=scale, method=arguments.null_text)
        other = other.with_embeddings(found.embeddings)
        latents[name] = timestep_aware_sampling(model, other, prompt, target, None, 0.0, scale).latent
    for ratio, name in INJECTED.items():
        latents[name] = timestep_aware_sampling(model, pivot, source, edit, None, ratio, scale).latent
    with torch.no_grad():
        return {name: vae.decode(value).cpu() for name, value in latents.items()}


def plot_trade_off(report: dict[str, Any], count: int, name: str) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    for method, row in report.items():
        if "+" in method:
            axes.scatter(row["background_psnr_db"], row["edit_done"], label=method)
    axes.set_xlabel("background PSNR against the source image [dB]")
    axes.set_ylabel("share of edits done")
    axes.set_title(f"{count} edits of unseen subjects")
    axes.margins(0.2)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


OPTIONS: Options = {
    **shared_options(2, "timestep_aware_edit"),
    "pairs": (24, "(image, edit) pairs for each seed, a third of each kind (24)"),
    "steps": (50, "DDIM steps (50)"),
    "guidance_scale": (GUIDANCE_SCALE, "default 4; 7.5 in the paper"),
    "null_text": ("adaptive", "method of optimization", {"choices": NULL_TEXT_METHODS}),
    "eta": (0.7, "interpolation toward the target prompt (0.7)"),
    "batch": (12, "images at once"),
    **IMAGIC_OPTIONS,
    **SEED,
    **CHECKPOINT,
}


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    checkpoint = load_checkpoint(arguments.checkpoint)
    batches = batches_of_pairs(arguments)
    cases = Cases(arguments, list(batches))
    for unit in tqdm(cases.left, unit="batch"):
        batch = batches[unit]
        columns = edit_batch(*checkpoint, batch, arguments)
        columns["true edit (renderer)"] = torch.stack([pair.after for pair in batch])
        if unit == cases.units[0]:
            befores = torch.stack([pair.before for pair in batch])
            save_sheet(RESULTS / f"{arguments.name}.jpg", [befores, *columns.values()])
        prompts, sources = ([caption(getattr(pair, side)) for pair in batch] for side in ("target", "source"))
        scored = {name: score_edits(images, batch, prompts, sources) for name, images in columns.items()}
        cases.add(scored, independent=True)
        figures = cases.figures()
        plot_trade_off(figures["rows"], figures["cases"], arguments.name)
        yield figures


def table(figures: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    return [
        "Timestep-aware text injection on unseen subjects of the demo world",
        f"{arguments.seeds} seeds from {arguments.seed} on, {figures['cases']} pairs, DDIM {arguments.steps} steps, "
        f"guidance scale {arguments.guidance_scale}, eta {arguments.eta}, 200 steps of text optimization, null-text "
        f"optimization by the {arguments.null_text} method; {figures['minutes']:.0f} minutes. DDIM + target is sampled "
        "with guidance scale 1, as in the paper.",
        *edits_table(figures["rows"], {"psnr_to_source_db": "PSNR to source", **PAPER_SCORES}),
        *orders_section(PUBLISHED, CLAIMS, figures, "Jung et al. 2024"),
    ]
