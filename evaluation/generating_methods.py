"""New images of a subject from its references: the methods of table 1 of Wang et al. 2023 and of Gu et al. 2025.

They do not edit the case's image. Defaults are the papers'; `--set` of the command changes numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.sample
import torch
from identity_edit_pack.pipelines.engine.families.schedule import ddim_schedule
from identity_edit_pack.pipelines.faces.alignment import align_ffhq
from identity_edit_pack.pipelines.faces.detection import detect_faces
from identity_edit_pack.pipelines.hifi_tuner.reference_alignment import align_reference
from identity_edit_pack.pipelines.hifi_tuner.reference_guidance import first_pass_latent, reference_guided_sampling
from identity_edit_pack.pipelines.hifi_tuner.reference_selection import histogram_features, select_reference
from identity_edit_pack.pipelines.hifi_tuner.subject_embedding import (
    OUTPUT,
    WORD,
    SubjectEmbedding,
    apply_subject,
    subject_conditioning,
)
from identity_edit_pack.pipelines.hifi_tuner.train_subject_embedding import SubjectSettings, train_subject_embedding
from identity_edit_pack.pipelines.inversion.inversion import invert_image
from identity_edit_pack.pipelines.lipe.attention_segmentation import attention_masks
from identity_edit_pack.pipelines.lipe.identity_prompt import encode_identity_prompt
from identity_edit_pack.pipelines.pidiff.style_attention import StyleAttention, apply_style_attention
from identity_edit_pack.pipelines.pidiff.train import StyleSettings, train_style_attention
from identity_edit_pack.pipelines.pidiff.w_plus import WPlus
from identity_edit_pack.pipelines.pidiff.w_plus_encoder import encode_w_plus, fitted, load_w_plus_encoder
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.training.images import encode_images

from ..benchmarks.edits import embed
from .cases import EditCase
from .method import PREPARATION, SUBJECT, Checkpoint, Method, MethodSettings
from .pack_methods import class_images, decoded, with_prior

PRECISION = "float32"


def by_class_word(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """The checkpoint as it is, which knows the class and not the subject."""
    return decoded(checkpoint, _sampled(checkpoint, settings, embed(checkpoint.clip, [case.target_prompt])))


def by_dreambooth(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """Ruiz et al. 2023 on the attention layers alone, as LIPE's prior trains them."""
    own = _with_prior(checkpoint, case, settings)
    return decoded(own, _sampled(own, settings, embed(own.clip, [case.named().target_prompt])))


def by_hifi_tuner_of_dreambooth(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """Reference guidance (Wang et al. 2023, section 3.3) on the same."""
    own, case = _with_prior(checkpoint, case, settings), case.named()
    positive = embed(own.clip, [case.target_prompt])
    return _guided(checkpoint, own, own, case, settings, positive, f"a {case.subject_word} {case.class_word}")


def by_textual_inversion(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """Gal et al. 2023: word vectors, without masks."""
    subject = _subject(
        checkpoint, case, settings, kind=WORD, masked=False, regularization_weight=0.0, updates_per_step=0
    )
    with torch.no_grad():
        positive = subject_conditioning(checkpoint.clip, subject, case.named().target_prompt)
    return decoded(checkpoint, _sampled(checkpoint, settings, positive))


def by_hifi_tuner(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """Wang et al. 2023 in whole: masked per-step embeddings, and guidance by the most similar reference."""
    subject = _subject(
        checkpoint, case, settings, kind=OUTPUT, masked=True, updates_per_step=settings.updates_per_step,
        sampling_steps=settings.steps,
    )  # fmt: skip
    with torch.no_grad():
        applied = apply_subject(checkpoint.model, checkpoint.clip, subject, case.named().target_prompt)
    own = dataclasses.replace(checkpoint, model=applied[0])
    return _guided(checkpoint, own, checkpoint, case, settings, applied[1], f"a {case.class_word}")


def by_pidiff(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """Gu et al. 2025: style cross-attention with the W+ codes of the references; one of them is shown in sampling."""
    key = ("subject", "style attention", case.references)
    style, styles = settings.work.once(key, lambda: _style_attention(checkpoint, case, settings), SUBJECT)
    shown = dataclasses.replace(styles, rows=styles.rows[:1])
    model = apply_style_attention(checkpoint.model, style, shown, strength=settings.style_strength)
    own = dataclasses.replace(checkpoint, model=model)
    return decoded(own, _sampled(own, settings, embed(own.clip, [case.named().target_prompt])))


# -- sampling ----------------------------------------------------------------------------------------------------------


def _noise(checkpoint: Checkpoint, settings: MethodSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """An empty latent of the checkpoint's size, and noise."""
    latent = torch.zeros(1, 4, checkpoint.size // 8, checkpoint.size // 8)
    return latent, comfy.sample.prepare_noise(latent, settings.seed)


@torch.no_grad()
def _sampled(checkpoint: Checkpoint, settings: MethodSettings, positive: Any) -> torch.Tensor:
    latent, noise = _noise(checkpoint, settings)
    return comfy.sample.sample(
        checkpoint.model, noise, settings.steps, settings.guidance_scale, "ddim", "ddim_uniform", positive,
        embed(checkpoint.clip, [""]), latent, disable_pbar=True, seed=settings.seed,
    )  # fmt: skip


def _guided(
    plain: Checkpoint,
    own: Checkpoint,
    inverting: Checkpoint,
    case: EditCase,
    settings: MethodSettings,
    positive: Any,
    caption: str,
) -> torch.Tensor:
    """The second pass of Wang et al. 2023: aligned reference, its inversion with a caption, algorithm 2.

    Args:
        plain: the checkpoint that segments by its attention.
        own: the one that samples, perhaps with per-step embeddings, which `inverting` has not.
    """
    first = _sampled(own, settings, positive)
    image, size = decoded(own, first)[0], (plain.size, plain.size)
    identity, words = encode_identity_prompt(plain.clip, case.class_word), embed(plain.clip, [f"a {case.class_word}"])
    sources, masks = _references(plain, case, settings)
    generated = attention_masks(plain.model, first, identity, words, size)[0]
    if not bool(generated.any()):
        return image[None]  # no subject is found, so nothing can be aligned with it
    choice = select_reference([image], sources, histogram_features, generated_masks=[generated], source_masks=masks)
    aligned = align_reference(sources[choice.index], masks[choice.index], generated, image)
    with torch.no_grad():
        latent = plain.vae.encode(aligned.image[None])
    inversion = invert_image(inverting.model, latent, embed(inverting.clip, [caption]), steps=settings.steps)
    schedule = ddim_schedule(plain.model.get_model_object("model_sampling"), settings.steps)
    start = first_pass_latent(plain.model, torch.zeros_like(latent), schedule.sigmas, settings.seed)
    found = reference_guided_sampling(
        own.model, start, inversion, aligned.mask[None], positive, embed(own.clip, [""]),
        guidance_scale=settings.guidance_scale, inner_steps=settings.inner_steps,
    )  # fmt: skip
    return decoded(own, found.latent)


# -- what is learned of a subject, once for all of its prompts ---------------------------------------------------------


def _references(
    checkpoint: Checkpoint, case: EditCase, settings: MethodSettings
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The references and their masks by the checkpoint's attention, as Segment Subject finds them without a network;
    the whole image where it finds nothing."""

    def make() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        images = case.load_references(checkpoint.size)
        identity = encode_identity_prompt(checkpoint.clip, case.class_word)
        masks = []
        with torch.no_grad():
            words = embed(checkpoint.clip, [f"a {case.class_word}"])
            for image in images:
                latent = checkpoint.vae.encode(image[None])
                mask = attention_masks(checkpoint.model, latent, identity, words, (checkpoint.size, checkpoint.size))[0]
                masks.append(mask if bool(mask.any()) else torch.ones_like(mask))
        return images, masks

    return settings.work.once(("subject", "references", case.references), make, SUBJECT)


def _captions(case: EditCase) -> list[str]:
    return [f"a {case.subject_word} {case.class_word}"] * len(case.references)


def _with_prior(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> Checkpoint:
    seen = settings.work.once(("class", case.class_word), lambda: class_images(checkpoint, case, settings), SUBJECT)
    key = ("subject", "dreambooth", case.references)
    captions = _captions(case)
    model, clip = settings.work.once(key, lambda: with_prior(checkpoint, case, settings, seen, captions), SUBJECT)
    return dataclasses.replace(checkpoint, model=model, clip=clip)


def _subject(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings, **chosen: Any) -> SubjectEmbedding:
    sources, masks = _references(checkpoint, case, settings) if chosen["masked"] else (None, None)

    def train() -> SubjectEmbedding:
        with torch.no_grad():
            images = sources or case.load_references(checkpoint.size)
            encoded = encode_images(checkpoint.vae, images, _captions(case), masks)
        own = SubjectSettings(
            class_word=case.class_word, token=case.subject_word, precision=PRECISION, steps=settings.subject_steps,
            learning_rate=settings.subject_learning_rate, seed=settings.seed, sample_steps=1, **chosen,
        )  # fmt: skip
        return train_subject_embedding(checkpoint.model, checkpoint.clip, encoded, own)[0]

    return settings.work.once(("subject", chosen["kind"], case.references), train, SUBJECT)


def _style_attention(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> tuple[StyleAttention, WPlus]:
    path = str(settings.w_plus_encoder)
    encoder = settings.work.once(("encoder", path), lambda: load_w_plus_encoder(path), PREPARATION)
    photos = case.load_references(checkpoint.size)
    aligned = torch.stack([_aligned(settings, photo, encoder.size) for photo in photos])
    styles = encode_w_plus(encoder, fitted(aligned, encoder.size))
    with torch.no_grad():
        encoded = encode_images(checkpoint.vae, photos, _captions(case))
    own = StyleSettings(
        pseudo_word=f"{case.subject_word} {case.class_word}", precision=PRECISION, steps=settings.style_steps,
        learning_rate=settings.style_learning_rate, seed=settings.seed, sample_steps=1,
    )  # fmt: skip
    return train_style_attention(checkpoint.model, checkpoint.clip, encoded, styles, own)[0], styles


def _aligned(settings: MethodSettings, photo: torch.Tensor, size: int) -> torch.Tensor:
    """The largest face of a photo as FFHQ aligns it; without a detector, photos are aligned already."""
    if settings.face_detector is None:
        return photo
    faces = detect_faces(settings.face_detector, photo)
    if not faces:
        raise IdentityEditError("The detector finds no face in a reference; remove that photo.")
    return align_ffhq(photo, faces[0].points, size).image


_KNOWN = ("references", "class word")
METHODS = {
    "stable-diffusion": Method("pack", "new images of the class by the checkpoint", "Rombach et al. 2022",
                               by_class_word),
    "textual-inversion": Method("pack", "new images with learned word vectors", "Gal et al. 2023",
                                by_textual_inversion, _KNOWN),
    "dreambooth": Method("pack", "new images with an identity prior (attention layers alone)", "Ruiz et al. 2023",
                         by_dreambooth, _KNOWN),
    "hifi-tuner": Method("pack", "new images with per-step embeddings and reference guidance", "Wang et al. 2023",
                         by_hifi_tuner, _KNOWN),
    "hifi-tuner-dreambooth": Method("pack", "dreambooth with reference guidance", "Wang et al. 2023",
                                    by_hifi_tuner_of_dreambooth, _KNOWN),
    "pidiff": Method("pack", "new images of a person with style cross-attention", "Gu et al. 2025", by_pidiff,
                     (*_KNOWN, "w_plus_encoder")),
}  # fmt: skip
