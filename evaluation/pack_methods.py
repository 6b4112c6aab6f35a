"""Editing with the pack: the papers' methods with the settings of the shipped workflows."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from identity_edit_pack.pipelines.attention_control.mutual_self_attention import mutual_self_attention
from identity_edit_pack.pipelines.attention_control.prompt_to_prompt import REFINE, prompt_to_prompt
from identity_edit_pack.pipelines.inversion.edit_friendly import edit_friendly_ddpm_inversion
from identity_edit_pack.pipelines.inversion.inversion import Inversion, invert_image, sample_inversion
from identity_edit_pack.pipelines.inversion.null_text import (
    ADAPTIVE,
    GUIDANCE_SCALE,
    PAPER,
    negative_prompt_inversion,
    null_text_optimization,
)
from identity_edit_pack.pipelines.lipe.identity_mask_blend import BlendSettings, identity_mask_blend
from identity_edit_pack.pipelines.lipe.identity_prior import apply_identity_prior
from identity_edit_pack.pipelines.lipe.identity_prompt import encode_identity_prompt
from identity_edit_pack.pipelines.lipe.train_identity_prior import PriorSettings, train_identity_prior
from identity_edit_pack.pipelines.mcdm import model as mcdm
from identity_edit_pack.pipelines.mcdm.edit_mask import EditMaskSettings, edit_mask
from identity_edit_pack.pipelines.mcdm.guidance import GuidanceScales, mcdm_guider
from identity_edit_pack.pipelines.shared.conditioning import Conditioning
from identity_edit_pack.pipelines.subjects.regularization_prompts import shipped_prompts
from identity_edit_pack.pipelines.timestep_aware.text_injection import edit_conditioning, timestep_aware_sampling
from identity_edit_pack.pipelines.timestep_aware.text_optimization import optimize_text_embedding
from identity_edit_pack.pipelines.training.images import TrainingImages, encode_images

from ..benchmarks.edits import composite, embed
from .cases import EditCase
from .method import PREPARATION, SUBJECT, Checkpoint, Method, MethodSettings
from .stock_methods import eight_channel_checkpoint

REGULARIZATION = 16
MCDM_STEPS = 20
MCDM_SCALES = GuidanceScales(3.0, 3.0, 4.0)
MCDM_MASK = EditMaskSettings(kernel=3, threshold=0.2)
"""Of the workflow `mcdm_edit`; steps of UniPC."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What every edit begins with."""

    latent: torch.Tensor
    source: Conditioning
    target: Conditioning
    empty: Conditioning


@torch.no_grad()
def start(checkpoint: Checkpoint, case: EditCase) -> Start:
    latent = checkpoint.vae.encode(case.load_image(checkpoint.size))
    source, target, empty = (embed(checkpoint.clip, [text]) for text in (case.source_prompt, case.target_prompt, ""))
    return Start(latent, source, target, empty)


@torch.no_grad()
def decoded(checkpoint: Checkpoint, latent: torch.Tensor) -> torch.Tensor:
    return checkpoint.vae.decode(latent).cpu()


def inverted(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> Inversion:
    """By DDIM with the source prompt; made once."""

    def make() -> Inversion:
        begin = start(checkpoint, case)
        return invert_image(checkpoint.model, begin.latent, begin.source, steps=settings.steps)

    return settings.work.once(("case", "inversion", case.image, case.source_prompt, settings.steps), make)


def with_null_text(
    checkpoint: Checkpoint, case: EditCase, settings: MethodSettings, method: str, guidance_scale: float
) -> Inversion:
    """The inversion with its null-text embeddings; made once."""
    inversion = inverted(checkpoint, case, settings)
    key = ("case", "null-text", case.image, case.source_prompt, method, guidance_scale, settings.steps)

    def make() -> Inversion:
        begin = start(checkpoint, case)
        found = null_text_optimization(
            checkpoint.model, inversion, begin.source, begin.empty, guidance_scale, method=method
        )
        return inversion.with_embeddings(found.embeddings)

    return settings.work.once(key, make)


def by_ddim(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    inversion = inverted(checkpoint, case, settings)
    return decoded(checkpoint, sample_inversion(checkpoint.model, inversion, start(checkpoint, case).target))


def by_negative_prompt_inversion(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    begin, inversion = start(checkpoint, case), inverted(checkpoint, case, settings)
    pivot = inversion.with_embeddings(negative_prompt_inversion(inversion, begin.source))
    made = sample_inversion(checkpoint.model, pivot, begin.target, begin.empty, settings.guidance_scale)
    return decoded(checkpoint, made)


def by_null_text(
    checkpoint: Checkpoint, case: EditCase, settings: MethodSettings, method: str = ADAPTIVE
) -> torch.Tensor:
    begin = start(checkpoint, case)
    pivot = with_null_text(checkpoint, case, settings, method, settings.guidance_scale)
    made = sample_inversion(checkpoint.model, pivot, begin.target, begin.empty, settings.guidance_scale)
    return decoded(checkpoint, made)


def by_null_text_of_the_paper(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """With the guidance scale that the reference implementation has built in."""
    return by_null_text(checkpoint, case, dataclasses.replace(settings, guidance_scale=GUIDANCE_SCALE), PAPER)


def by_prompt_to_prompt(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    begin = start(checkpoint, case)
    pivot = with_null_text(checkpoint, case, settings, ADAPTIVE, settings.guidance_scale)
    model, target = prompt_to_prompt(
        checkpoint.model, checkpoint.clip, case.source_prompt, case.target_prompt, REFINE, inversion=pivot
    )
    return decoded(checkpoint, sample_inversion(model, pivot, target, begin.empty, settings.guidance_scale))


def by_timestep_aware_injection(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    begin = start(checkpoint, case)
    pivot = with_null_text(checkpoint, case, settings, ADAPTIVE, settings.guidance_scale)
    found = optimize_text_embedding(
        checkpoint.model, begin.latent, begin.target, settings.text_steps, seed=settings.seed
    )
    edit = edit_conditioning(begin.target, [[found.embedding, {}]], settings.eta)
    made = timestep_aware_sampling(
        checkpoint.model, pivot, begin.source, edit, None, settings.ratio, settings.guidance_scale
    )
    return decoded(checkpoint, made.latent)


def by_masactrl(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    begin, inversion = start(checkpoint, case), inverted(checkpoint, case, settings)
    model = mutual_self_attention(checkpoint.model, inversion, begin.source)
    made = sample_inversion(model, inversion, begin.target, begin.empty, settings.guidance_scale)
    return decoded(checkpoint, made)


def by_diffedit(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """With diffusers' settings of the mask: no blur, differences cut at three times their mean, half of that."""
    begin = start(checkpoint, case)
    of_mask = EditMaskSettings(seeds=settings.mask_seeds, outliers=3.0, kernel=1, threshold=0.5)
    mask = edit_mask(checkpoint.model, begin.target, begin.source, begin.latent, of_mask, seed=settings.seed).mask
    inversion = invert_image(checkpoint.model, begin.latent, begin.empty, steps=settings.steps)
    made = identity_mask_blend(
        checkpoint.model, inversion, begin.target, begin.target, None, begin.empty,
        guidance_scale=settings.guidance_scale, settings=BlendSettings(skip=1.0 - settings.encoding_ratio),
        source_mask=mask, target_mask=mask,
    )  # fmt: skip
    return decoded(checkpoint, made.latent)


def by_masked_edit(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """Liu et al. 2024, section 2.2, on the checkpoint as it is; the class word says what is masked."""
    return _by_masks(checkpoint, case, settings, case.class_word)


def by_lipe(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """The same with an identity prior of the subject, learned once for all of its images."""
    case = case.named()
    key = ("subject", case.references)
    seen = settings.work.once(("class", case.class_word), lambda: class_images(checkpoint, case, settings), SUBJECT)
    model, clip = settings.work.once(key, lambda: with_prior(checkpoint, case, settings, seen), SUBJECT)
    own = dataclasses.replace(checkpoint, model=model, clip=clip)
    return _by_masks(own, case, settings, f"{case.subject_word} {case.class_word}")


def _by_masks(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings, name: str) -> torch.Tensor:
    begin = start(checkpoint, case)
    inversion = edit_friendly_ddpm_inversion(
        checkpoint.model, begin.latent, begin.source, begin.empty, steps=settings.steps,
        guidance_scale=settings.source_guidance_scale, seed=settings.seed,
    )  # fmt: skip
    made = identity_mask_blend(
        checkpoint.model, inversion, begin.source, begin.target, encode_identity_prompt(checkpoint.clip, name),
        begin.empty, guidance_scale=settings.guidance_scale, settings=BlendSettings(skip=settings.skip),
    )  # fmt: skip
    return decoded(checkpoint, made.latent)


def by_edit_friendly(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    begin = start(checkpoint, case)
    inversion = edit_friendly_ddpm_inversion(
        checkpoint.model, begin.latent, begin.source, begin.empty, steps=settings.steps,
        guidance_scale=settings.source_guidance_scale, seed=settings.seed,
    )  # fmt: skip
    made = sample_inversion(
        checkpoint.model, inversion, begin.target, begin.empty, guidance_scale=settings.guidance_scale,
        skip=round(settings.skip * settings.steps),
    )  # fmt: skip
    return decoded(checkpoint, made)


@torch.no_grad()
def class_images(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> TrainingImages:
    """The regularization set: images of the class that the checkpoint draws."""
    if settings.regularization is not None:
        return settings.regularization(checkpoint, case)
    prompts = shipped_prompts(case.class_word, REGULARIZATION, settings.seed)
    images = []
    for index, prompt in enumerate(prompts):
        latent = torch.zeros(1, 4, checkpoint.size // 8, checkpoint.size // 8)
        noise = comfy.sample.prepare_noise(latent, settings.seed + index)
        made = comfy.sample.sample(
            checkpoint.model, noise, settings.steps, settings.guidance_scale, "ddim", "ddim_uniform",
            embed(checkpoint.clip, [prompt]), embed(checkpoint.clip, [""]), latent, disable_pbar=True,
        )  # fmt: skip
        images.append(decoded(checkpoint, made)[0])
    return encode_images(checkpoint.vae, images, prompts)


def described_captions(case: EditCase) -> list[str]:
    """The captions beside the references, and "a sks dog" where there is none."""
    named = f"a {case.subject_word} {case.class_word}"
    files = [path.with_suffix(".txt") for path in case.references]
    return [file.read_text(encoding="utf-8").strip() if file.exists() else named for file in files]


def with_prior(
    checkpoint: Checkpoint,
    case: EditCase,
    settings: MethodSettings,
    regularization: TrainingImages,
    captions: list[str] | None = None,
) -> tuple[Any, Any]:
    """MODEL and CLIP with a prior learned from the case's references, with these captions or those beside them."""
    captions = described_captions(case) if captions is None else captions
    with torch.no_grad():
        identity = encode_images(checkpoint.vae, case.load_references(checkpoint.size), captions)
    own = PriorSettings(
        token=case.subject_word, class_word=case.class_word, precision="float32", weight_decay=0.0,
        steps=settings.training_steps, learning_rate=settings.learning_rate, seed=settings.seed,
    )  # fmt: skip
    prior, _ = train_identity_prior(checkpoint.model, checkpoint.clip, identity, regularization, own)
    return apply_identity_prior(checkpoint.model, checkpoint.clip, prior)


@torch.no_grad()
def by_mcdm(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """The workflow `mcdm_edit`: the mask's guidance, and the source's own pixels outside of the mask."""
    from identity_edit_pack.demo_world.clip_vision import load_clip_vision

    edit, path = eight_channel_checkpoint(settings, checkpoint), settings.mcdm
    file = settings.work.once(("mcdm", path), lambda: mcdm.load_mcdm(str(path)), PREPARATION)
    vision = settings.work.once(("vision",), load_clip_vision, PREPARATION)
    image = case.load_image(edit.size)
    seen = mcdm.see_images(file, edit.model, vision, edit.vae, image)
    source, target, empty = (
        mcdm.with_images(embed(edit.clip, [text]), seen) for text in (settings.mcdm_source_prompt, case.instruction, "")
    )
    mask = edit_mask(edit.model, target, source, seen.latent, MCDM_MASK, seed=settings.seed).mask
    guider = mcdm_guider(edit.model, target, empty, MCDM_SCALES, source, mask)
    sigmas = comfy.samplers.calculate_sigmas(edit.model.get_model_object("model_sampling"), "simple", MCDM_STEPS)
    zeros = torch.zeros_like(seen.latent)
    noise, sampler = comfy.sample.prepare_noise(zeros, settings.seed), comfy.samplers.sampler_object("uni_pc")
    latent = guider.sample(noise, zeros, sampler, sigmas, disable_pbar=True, seed=settings.seed)
    return composite(image, decoded(edit, latent), mask)


METHODS = {
    "ddim": Method("pack", "DDIM inversion and the target prompt, guidance 1", "Song et al. 2021", by_ddim),
    "negative-prompt": Method(
        "pack", "DDIM inversion, the source prompt as the negative side", "Miyake et al. 2023",
        by_negative_prompt_inversion,
    ),
    "null-text": Method("pack", "null-text optimization (adaptive) and the target prompt", "Mokady et al. 2023",
                        by_null_text),
    "null-text-7.5": Method(
        "pack", "the same by the paper's method, with its guidance scale of 7.5", "Mokady et al. 2023",
        by_null_text_of_the_paper,
    ),
    "prompt-to-prompt": Method(
        "pack", "null-text optimization (adaptive) and prompt-to-prompt", "Hertz et al. 2023", by_prompt_to_prompt
    ),
    "timestep-aware": Method(
        "pack", "text optimization, null-text optimization and timestep-aware injection", "Jung et al. 2024",
        by_timestep_aware_injection,
    ),
    "edit-friendly": Method(
        "pack", "edit-friendly DDPM inversion and the target prompt", "Huberman-Spiegelglas et al. 2024",
        by_edit_friendly,
    ),
    "masactrl": Method("pack", "Mutual Self-Attention on a DDIM inversion", "Cao et al. 2023", by_masactrl),
    "diffedit": Method("pack", "MCDM Edit Mask and DiffEdit", "Couairon et al. 2023", by_diffedit),
    "masks": Method("pack", "identity-aware masks without a prior", "Liu et al. 2024", by_masked_edit,
                    ("class word",)),
    "lipe": Method("pack", "an identity prior and identity-aware masks", "Liu et al. 2024", by_lipe,
                   ("references", "class word")),
    "mcdm": Method("pack", "a model that learned edits of portraits", "Chen et al. 2024", by_mcdm,
                   ("mcdm", "instruction")),
}  # fmt: skip
