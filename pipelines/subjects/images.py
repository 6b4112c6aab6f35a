"""Images of a subject with captions and masks, for training.

The identity dataset of Liu et al. 2024 (section 2.1) has three to five images of one subject, each with a caption that
describes what an edit may change (action, view, expression) and names the subject by a rare token and its class word,
"sks dog". The layout of its folder:

    dog/                     the subject
        1.jpg  1.txt         an image, in any format that Pillow reads, and its caption
        2.png  2.txt  2.mask.png     with an optional mask: white on the subject, of any size
        class_word.txt       optional: the class word, "dog"
        test/9.jpg  9.txt    optional: the image to edit, and its caption

Masks may also have the names of other trainers: 2-masklabel.png, 2_mask.png, 2-mask.png, or mask/2.png and
masks/2.png.
"""

from __future__ import annotations

import codecs
import mimetypes
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..engine.host import cut_and_scaled
from ..shared.errors import IdentityEditError
from ..shared.files import atomic_write
from ..shared.images import from_pillow, image_formats, on_white, open_image, read_image, to_pillow
from ..shared.masks import as_masks, is_placeholder_mask, masks_for
from .words import CLASS_WORD_FILE, check_caption, check_words, identity_prompt, one_line, with_article

if TYPE_CHECKING:
    from PIL.Image import Image

MASK_MARK = ".mask"
_MASK_MARKS = (MASK_MARK, "-masklabel", "_mask", "-mask")
"""Suffixes of mask names, before the extension: this pack's, OneTrainer's, and common ones."""
_ALWAYS_MASKS = (MASK_MARK, "-masklabel")
"""The others may also end an image's name, as in dog_with_mask.png; they mark a mask only if its image exists."""
_MASK_FOLDERS = ("mask", "masks")
_NO_IMAGE_OF_THE_SUBJECT = "-condlabel"
"""OneTrainer's conditioning images."""
TEST_FOLDER = "test"
FEWEST, MOST = 3, 5
"""The number of reference images in Liu et al. 2024 (section 2); any number from one on is accepted, with a note."""

_LONGEST_TEXT = 100_000
"""Characters of a caption file; captions have some hundred."""
_PHOTO_ENDINGS = (".avif", ".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".exr", ".hdr")
"""Image extensions that are not in every Python's list of types."""
_ENCODING_OF_MARK = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
"""Notepad's "Unicode" and PowerShell's redirection write UTF-16 with a byte order mark."""

CAPTION_FILES = "caption files"
CLASS_WORD_ONLY = "class word only (DreamBooth)"
NO_CAPTIONS_YET = "none yet (Caption Images)"
CAPTION_SOURCES = (CAPTION_FILES, CLASS_WORD_ONLY, NO_CAPTIONS_YET)


@dataclass(frozen=True)
class SubjectImages:
    """The images of one subject; the lists have one entry for each image, in the same order.

    Attributes:
        images: float32 tensors [height, width, 3] on the CPU, values 0 to 1; the sizes may differ.
        captions: what each image shows; "" where there is no caption yet.
        masks: float32 tensors [height, width], 1 on the subject, of the image's size; None where there is no mask.
        names: each image's file name or number, for messages.
        class_word: what the subject is, such as "dog".
        token: the rare token that stands for its identity (V* in Liu et al. 2024), such as "sks"; "" for images of
            the class in general, a regularization set.
        folder: where the images were read, or None.
        test_image: the image to edit, [height, width, 3], or None.
        test_name: its file name below `folder`.
        test_caption: what it shows: the source prompt of an edit; "" where there is none.
        notes: what the user should know about the folder, one sentence each.
    """

    images: list[torch.Tensor]
    captions: list[str]
    masks: list[torch.Tensor | None]
    names: list[str]
    class_word: str
    token: str
    folder: str | None = None
    test_image: torch.Tensor | None = None
    test_name: str = ""
    test_caption: str = ""
    notes: tuple[str, ...] = ()

    @property
    def identity_prompt(self) -> str:
        """The subject's name in prompts (P^e in Liu et al. 2024): the token and the class word."""
        return identity_prompt(self.class_word, self.token)


def load_subject_folder(
    path: str,
    class_word: str = "",
    token: str = "sks",
    *,
    captions: str = CAPTION_FILES,
    add_token: bool = False,
    size: int | None = None,
) -> SubjectImages:
    """Read a subject's folder; its form is at the top of this file.

    EXIF orientation is applied. Transparent images are composited over white; without a mask file, the opaque part is
    the mask.

    Args:
        path: the folder.
        class_word: what the subject is; "" reads it from `class_word.txt`.
        token: the rare token for the subject's identity, one word; "" for a regularization set.
        captions: CAPTION_FILES needs one file for each image; CLASS_WORD_ONLY reads none and calls every image
            "a photo of <token> <class word>" (Ruiz et al. 2023); NO_CAPTIONS_YET reads those that are there.
        add_token: put the token before the class word of captions that lack it, instead of refusing them.
        size: cut every image to a centered square and scale it to this side in pixels; None keeps all sizes.

    Raises:
        IdentityEditError: naming the file and the remedy, when an image, caption or mask cannot be used.
    """
    if not os.path.isdir(path):
        raise IdentityEditError(
            f"The folder {path} does not exist; put {FEWEST} to {MOST} images of the subject, each with a caption "
            f"file, into a folder below ComfyUI's input folder."
        )
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    images, masks = _images_and_masks(path, names)
    if not images:
        unreadable = _unreadable(names)
        of_them = f", but {', '.join(unreadable)}, which Pillow cannot read here" if unreadable else ""
        raise IdentityEditError(
            f"The folder {path} contains no image{of_them}; put {FEWEST} to {MOST} images of the subject into it, "
            f"such as .png or .jpg."
        )
    class_word, token = check_words(class_word.strip() or _read_class_word(path), token)
    _check_stems(images, masks)

    read = [_read_image(path, name, masks.get(_stem(name)), size) for name in images]
    texts = [_caption(path, name, captions, class_word, token, add_token, required=True) for name in images]
    notes = _count_notes(len(images), token) + _ignored_notes(names, images, masks)
    subject = SubjectImages(
        images=[image for image, _ in read],
        captions=texts,
        masks=[mask for _, mask in read],
        names=images,
        class_word=class_word,
        token=token,
        folder=path,
    )
    return _with_test_image(subject, path, captions, add_token, size, notes)


def from_batch(
    images: torch.Tensor | list[torch.Tensor],
    captions: list[str],
    class_word: str,
    token: str = "sks",
    *,
    masks: torch.Tensor | list[torch.Tensor] | None = None,
    add_token: bool = False,
) -> SubjectImages:
    """Make a subject's images from tensors.

    Args:
        images: [batch, height, width, 1 to 4], or a list of such batches, values 0 to 1; gray ones become colors. A
            second or fourth channel is opacity: such an image is laid on white, and without a mask of its own its
            opaque part is the mask.
        captions: one for each image, one for all, or none yet (an empty list).
        class_word, token: as for `load_subject_folder`.
        masks: [batch, height, width] or a list of such batches, 1 on the subject; one for each image or one for
            all, of any size. One that is empty as Load Image's is counts as none.
        add_token: put the token before the class word of captions that lack it, instead of refusing them.

    Raises:
        IdentityEditError: when an image, caption or mask cannot be used, or their numbers differ.
    """
    class_word, token = check_words(class_word, token)
    singles: list[torch.Tensor] = []
    found: list[torch.Tensor | None] = []
    for batch in _as_list(images):
        flat, opaque = on_white(batch[None] if getattr(batch, "ndim", 0) == 3 else batch, "images")
        singles += flat
        found += opaque
    names = [f"image {number}" for number in range(1, len(singles) + 1)]
    if len(captions) not in (0, 1, len(singles)):
        raise IdentityEditError(
            f"There are {len(captions)} captions for {len(singles)} images; write one caption per line, one for all "
            f"images, or none."
        )
    texts = [""] * len(singles)
    if captions:
        every = captions * len(singles) if len(captions) == 1 else captions
        texts = [
            check_caption(one_line(text), f"The caption of {name}", class_word, token, add_token)
            for text, name in zip(every, names, strict=True)
        ]
    if masks is not None:
        given = [mask for batch in _as_list(masks) for mask in as_masks(batch, "masks")]
        if len(given) not in (1, len(singles)):
            raise IdentityEditError(
                f"There are {len(given)} masks for {len(singles)} images; give one for each image, one for all, "
                f"or no masks."
            )
        given = given * len(singles) if len(given) == 1 else given
        found = [
            own if is_placeholder_mask(mask[None]) else _mask_of(image, mask, f"The mask of {name}")
            for image, mask, own, name in zip(singles, given, found, names, strict=True)
        ]
    notes = tuple(_count_notes(len(singles), token))
    return SubjectImages(singles, texts, found, names, class_word, token, notes=notes)


def check_captions(subject: SubjectImages) -> None:
    """Check before a training that every image has a caption with the token and the class word.

    Raises:
        IdentityEditError: when the images have no token, or naming the first image whose caption is missing or
            lacks a word.
    """
    if not subject.token:
        raise IdentityEditError(
            "The subject's images have no token; write one rare word, such as 'sks', as token where they are loaded."
        )
    for caption, name in zip(subject.captions, subject.names, strict=True):
        if not caption.strip():
            raise IdentityEditError(
                f"{name} has no caption; connect Caption Images before the training, or write the caption file."
            )
        check_caption(caption, f"The caption of {name}", subject.class_word, subject.token)


def image_batch(subject: SubjectImages) -> torch.Tensor:
    """All images as one IMAGE batch [batch, height, width, 3], cut and scaled to the first one's size."""
    size = subject.images[0].shape[:2]
    return torch.stack([image if image.shape[:2] == size else cut_and_scaled(image, *size) for image in subject.images])


def check_can_save(subject: SubjectImages) -> str:
    """The folder beside whose images the captions go.

    Raises:
        IdentityEditError: when the images come from no folder.
    """
    if subject.folder is None:
        raise IdentityEditError(
            "The images come from no folder, so captions cannot be saved beside them; use Load Subject Images, or "
            "do not save."
        )
    return subject.folder


def save_captions(subject: SubjectImages, *, overwrite: bool = False) -> list[str]:
    """Write each caption into its file beside its image, the test image's too; each file whole or not at all.

    Args:
        subject: from `load_subject_folder`.
        overwrite: also replace files that are there and say something else.

    Returns:
        the names of the files that were written, below the subject's folder.

    Raises:
        IdentityEditError: when the images come from no folder, or a file cannot be written.
    """
    folder = check_can_save(subject)
    names, captions = list(subject.names), list(subject.captions)
    if subject.test_name:
        names.append(subject.test_name)
        captions.append(subject.test_caption)
    written = []
    for name, caption in zip(names, captions, strict=True):
        file = f"{_stem(name)}.txt"
        path = os.path.join(folder, file)
        if not caption.strip() or (os.path.exists(path) and not overwrite):
            continue
        if os.path.exists(path) and _read_text(path, file) == caption:
            continue
        write_text(path, caption + "\n")
        written.append(file)
    return written


def write_text(path: str, text: str) -> None:
    """Write a caption file, whole or not at all; raises `IdentityEditError` when it cannot be written."""
    try:
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise IdentityEditError(
            f"The caption {path} cannot be written ({error.strerror}); make its folder writable, or do not save."
        ) from error


# --- Reading a folder ------------------------------------------------------------------------------------------------


def _images_and_masks(path: str, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The names of a folder's images, and the masks, with their folder, by the stem of their image."""
    endings = image_formats()
    shown = [name for name in names if _ending(name) in endings and os.path.isfile(os.path.join(path, name))]
    stems = {_stem(name) for name in shown}
    images: list[str] = []
    masks: dict[str, str] = {}
    for name in shown:
        marks = [mark for mark in _MASK_MARKS if _stem(name).lower().endswith(mark)]
        of = [(mark, _stem(name)[: -len(mark)]) for mark in marks]
        stem = next((stem for mark, stem in of if mark in _ALWAYS_MASKS or stem in stems), None)
        if stem is not None:
            masks.setdefault(stem, name)
        elif not _stem(name).lower().endswith(_NO_IMAGE_OF_THE_SUBJECT):
            images.append(name)
    for folder in (name for name in names if name.lower() in _MASK_FOLDERS and os.path.isdir(os.path.join(path, name))):
        for name in sorted(os.listdir(os.path.join(path, folder))):
            if _ending(name) in endings and _stem(name) in {_stem(image) for image in images}:
                masks.setdefault(_stem(name), f"{folder}/{name}")
    return images, masks


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _unreadable(names: list[str]) -> list[str]:
    """Files that are images by their ending, which Pillow cannot read here."""
    known = image_formats()
    kinds = {name: mimetypes.guess_type(name)[0] or "" for name in names if _ending(name) not in known}
    return [name for name, kind in kinds.items() if kind.startswith("image/") or _ending(name) in _PHOTO_ENDINGS]


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _check_stems(images: list[str], masks: dict[str, str]) -> None:
    """Every image has a name of its own, and every mask an image."""
    by_stem: dict[str, str] = {}
    for name in images:
        other = by_stem.setdefault(_stem(name), name)
        if other != name:
            raise IdentityEditError(
                f"{other} and {name} would share the caption {_stem(name)}.txt; rename one of them."
            )
    for stem, mask in masks.items():
        if stem not in by_stem:
            raise IdentityEditError(
                f"The mask {mask} has no image; name it as its image, {MASK_MARK}.png at the end, or delete it."
            )


def _read_class_word(path: str) -> str:
    if not os.path.isfile(os.path.join(path, CLASS_WORD_FILE)):
        return ""
    return _read_text(_inside(path, CLASS_WORD_FILE), CLASS_WORD_FILE)


def _read_text(path: str, name: str) -> str:
    """A text file as one line."""
    try:
        with open(path, "rb") as file:
            content = file.read(4 * _LONGEST_TEXT + 4)  # a character has at most four bytes
        encoding = next((encoding for mark, encoding in _ENCODING_OF_MARK if content.startswith(mark)), "utf-8")
        text = content.decode(encoding) if len(content) <= 4 * _LONGEST_TEXT else ""
    except UnicodeDecodeError as error:
        raise IdentityEditError(f"{name} is not UTF-8 text; save it as UTF-8.") from error
    except OSError as error:
        raise IdentityEditError(f"{name} cannot be read ({error.strerror}); make it readable.") from error
    if "\0" in text:  # UTF-16 without its mark, UTF-32
        raise IdentityEditError(f"{name} is not UTF-8 text; save it as UTF-8.")
    if len(content) > 4 * _LONGEST_TEXT or len(text) > _LONGEST_TEXT:
        raise IdentityEditError(f"{name} is no caption or class word, but something larger; write a line of text.")
    return one_line(text)


def _caption(path: str, name: str, source: str, class_word: str, token: str, add_token: bool, *, required: bool) -> str:
    """The caption of one image, from where `source` says."""
    if source == CLASS_WORD_ONLY:
        return f"a photo of {identity_prompt(class_word, token) if token else with_article(class_word)}"
    if source not in CAPTION_SOURCES:
        raise IdentityEditError(f"captions is '{source}'; choose one of {', '.join(CAPTION_SOURCES)}.")
    file = f"{_stem(name)}.txt"
    full = os.path.join(path, file)
    if not os.path.isfile(full):
        if required and source == CAPTION_FILES:
            raise IdentityEditError(
                f"{name} has no caption file {file}; write it, or set captions to '{NO_CAPTIONS_YET}' and connect "
                f"Caption Images."
            )
        return ""
    text = _read_text(_inside(path, file), file)
    if not text:
        raise IdentityEditError(
            f"The caption file {file} is empty; write what {name} shows into it, with "
            f"'{identity_prompt(class_word, token)}', or delete it."
        )
    if source == NO_CAPTIONS_YET:  # Caption Images puts the token in
        return text
    return check_caption(text, f"The caption file {file}", class_word, token, add_token)


def _ignored_notes(names: list[str], images: list[str], masks: dict[str, str]) -> list[str]:
    known = {*images, *masks.values(), CLASS_WORD_FILE, TEST_FOLDER, *(f"{_stem(name)}.txt" for name in images)}
    known |= {os.path.dirname(mask) for mask in masks.values()}
    unknown = [name for name in names if name not in known]
    unreadable = _unreadable(unknown)
    others = [name for name in unknown if name not in unreadable]
    notes = []
    if unreadable:
        notes.append(f"Left out, because Pillow cannot read them here: {', '.join(unreadable)}; save them as .png.")
    if others:
        notes.append(f"Ignored, because they are neither image, caption nor mask of one: {', '.join(others)}.")
    return notes


def _count_notes(count: int, token: str) -> list[str]:
    if not token or FEWEST <= count <= MOST:
        return []
    return [f"{count} image{'s' if count > 1 else ''}; Liu et al. 2024 use {FEWEST} to {MOST}."]


def _with_test_image(
    subject: SubjectImages, path: str, captions: str, add_token: bool, size: int | None, notes: list[str]
) -> SubjectImages:
    """The subject with the image of its test folder, where there is one, and with its notes."""
    folder = os.path.join(path, TEST_FOLDER)
    if not os.path.isdir(folder):
        return replace(subject, notes=tuple(notes))
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    images, _ = _images_and_masks(folder, names)
    if not images:
        return replace(subject, notes=(*notes, f"The folder {TEST_FOLDER} contains no image."))
    if len(images) > 1:
        raise IdentityEditError(
            f"The folder {TEST_FOLDER} holds {len(images)} images ({', '.join(images)}); keep the one to edit."
        )
    name = f"{TEST_FOLDER}/{images[0]}"
    image, _ = _read_image(path, name, None, size)
    caption = _caption(path, name, captions, subject.class_word, subject.token, add_token, required=False)
    return replace(subject, test_image=image, test_name=name, test_caption=caption, notes=tuple(notes))


def _read_image(
    path: str, name: str, mask_name: str | None, size: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An image [height, width, 3] and its mask [height, width] or None, both of the wanted size."""
    flat, opaque = on_white(read_image(_inside(path, name), name), name)
    image, mask, what = flat[0], opaque[0], f"The transparency of {name}"
    if mask_name is not None:
        mask = from_pillow(_on_black(open_image(_inside(path, mask_name), mask_name)).convert("L"))
        what = f"The mask {mask_name}"
    if mask is not None:
        mask = _mask_of(image, mask, what)
    if size is not None:
        image = _square(image, size, smooth=True)
        if mask is not None:
            mask = _square(mask, size, smooth=False)
            if not bool(mask.any()):
                raise IdentityEditError(
                    f"{what} marks nothing within the centered square of {name}; crop the image around the subject."
                )
    return image, mask


def _inside(folder: str, name: str) -> str:
    """The path of a file in a folder. A link that leads out of it, as an unpacked archive may bring, is not followed.

    Raises:
        IdentityEditError: for such a link.
    """
    path = os.path.join(folder, name)
    if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise IdentityEditError(f"{name} is a link to a file outside of its folder; copy the file there.")
    return path


def _on_black(image: Image) -> Image:
    """A mask's image without transparency: where it is transparent it marks nothing."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer)


def _square(pixels: torch.Tensor, size: int, *, smooth: bool) -> torch.Tensor:
    """The centered square of an image [height, width, 3] or mask [height, width], scaled to a side of `size`."""
    from PIL import Image, ImageOps

    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.BILINEAR
    return from_pillow(ImageOps.fit(to_pillow(pixels), (size, size), how))


def _mask_of(image: torch.Tensor, mask: torch.Tensor, what: str) -> torch.Tensor:
    """A mask [height, width] brought to the size of its image.

    Raises:
        IdentityEditError: when it marks nothing.
    """
    fitted = masks_for(mask, what, image.shape[0], image.shape[1], 1)[0]
    if not bool(fitted.any()):
        raise IdentityEditError(f"{what} marks nothing; make it white on the subject, or leave it out.")
    return fitted


# --- From tensors ----------------------------------------------------------------------------------------------------


def _as_list(batches: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return list(batches) if isinstance(batches, (list, tuple)) else [batches]
