"""Captions of a subject's images: part of the editing-oriented data augmentation.

Liu et al. 2024 (section 2.1) caption the images with LLaVA, including the subject's action, view and attire, so that
the prior separates the identity from what an edit may change. Any image-text-to-text model of transformers works here;
without a model, captions come from text files or from the user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..networks.language_models import IMAGE_AND_TEXT, LanguageModel, load_language_model
from ..shared.errors import IdentityEditError, check_finite
from .images import SubjectImages
from .words import has_word, with_token

INSTRUCTION = (
    "Enhance your image captioning skills by providing detailed captions. Structure your response to include: "
    "Perspective (e.g., headshot, medium-shot), Art Style (e.g., digital artwork, Ghibli-inspired screencap, photo), "
    "subject's view(facing to the camera), Main Subject (e.g., a person, an object, a woman), Action (if any, running),"
    " Attire Details, Hair Description, and Setting. Aim for concise yet descriptive captions, ideally under 70 words. "
    "For example: 'Close-up, Ghibli-style digital art, a young lady, gazing thoughtfully, adorned in a vintage dress, "
    "her hair styled in a loose bun, amidst a whimsical forest backdrop.' Now tell me the caption of this image."
)
"""Liu et al. 2024, table 3, word for word."""

MAX_NEW_TOKENS = 160
"""[choice] Room for the 70 words that the instruction asks for."""


def caption_images(
    subject: SubjectImages,
    *,
    model_path: str | None = None,
    lines: list[str] | None = None,
    keep_existing: bool = True,
    instruction: str = INSTRUCTION,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SubjectImages, list[str]]:
    """Caption all images of a subject, with its token and class word in every caption.

    The user's line has priority, then the existing caption (with `keep_existing`), then the model's. The token is
    inserted before the class word of captions that lack it; without the class word, both are put in front.

    Args:
        subject: the images, with or without captions; the test image is captioned like the others.
        model_path: folder of an image-text-to-text model, or None.
        lines: captions in the order of the images, the test image's last; "" for none.
        keep_existing: keep existing captions; otherwise the model replaces them.
        instruction: the prompt for the model. `INSTRUCTION` is left out for a plain captioner
            (`LanguageModel.follows_instructions`), which would continue it; any other text starts its captions.
        max_new_tokens, temperature, seed: see `LanguageModel.ask`.
        progress: called with (captions written by the model, their total).

    Returns:
        the subject with captions, and notes for the user.

    Raises:
        IdentityEditError: when an image is left without a caption, there are more lines than images, or the model
            cannot be used.
    """
    names, captions, images = list(subject.names), list(subject.captions), list(subject.images)
    if subject.test_image is not None:
        names.append(subject.test_name)
        captions.append(subject.test_caption)
        images.append(subject.test_image)
    for name, image in zip(names, images, strict=True):
        check_finite(image, name)
    lines = lines or []
    if len(lines) > len(names):
        raise IdentityEditError(
            f"captions holds {len(lines)} lines for {len(names)} images; write one line for each image, in the "
            f"order {', '.join(names)}."
        )
    lines = lines + [""] * (len(names) - len(lines))
    captions = [line.strip() or caption for line, caption in zip(lines, captions, strict=True)]

    if model_path is not None:
        asked = [
            number
            for number, line in enumerate(lines)
            if not line.strip() and not (keep_existing and captions[number].strip())
        ]
        if asked:
            with load_language_model(model_path, IMAGE_AND_TEXT) as model:
                for done, number in enumerate(asked, start=1):
                    captions[number] = _ask(
                        model, names[number], images[number], instruction, max_new_tokens, temperature, seed
                    )
                    if progress is not None:
                        progress(done, len(asked))

    notes = []
    for number, (name, caption) in enumerate(zip(names, captions, strict=True)):
        if not caption:
            if number < len(subject.images):
                raise IdentityEditError(
                    f"{name} has no caption; choose a model, write its line in captions, or put a caption file beside "
                    f"it."
                )
            notes.append(
                f"{name}, the test image, has no caption, so its source prompt is empty; choose a model, write its "
                f"line in captions, or put a caption file beside it."
            )
            continue
        captions[number] = identity_caption(caption, subject.class_word, subject.token)
        if not has_word(caption, subject.class_word):
            notes.append(
                f"The caption of {name} did not contain '{subject.class_word}': '{subject.identity_prompt}' was "
                f"inserted at its beginning; check that it reads well."
            )
    count = len(subject.images)
    test_caption = captions[count] if subject.test_image is not None else ""
    return replace(subject, captions=captions[:count], test_caption=test_caption), notes


def identity_caption(caption: str, class_word: str, token: str) -> str:
    """The caption with "<token> <class word>" as the subject's name."""
    if not has_word(caption, class_word):
        name = class_word if not token or has_word(caption, token) else f"{token} {class_word}"
        return f"{name}, {caption}"
    return with_token(caption, class_word, token)


def _ask(
    model: LanguageModel,
    name: str,
    image: torch.Tensor,
    instruction: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """The model's caption as one line, without quotation marks around it."""
    if instruction.strip() == INSTRUCTION and not model.follows_instructions:
        instruction = ""
    answer = model.ask(instruction, image, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    caption = " ".join(answer.split())
    if len(caption) > 1 and caption[0] == caption[-1] and caption[0] in "\"'":
        caption = caption[1:-1].strip()
    if not caption:
        raise IdentityEditError(
            f"The model returned nothing for {name}; change the instruction, choose another model, or write the "
            f"caption's line."
        )
    return caption
