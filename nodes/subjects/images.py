"""Nodes that gather the images of a subject, with captions and masks, from a folder or from the graph."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ...pipelines.shared.errors import for_console
from ...pipelines.subjects import images as subjects
from ..saved_files import IN_OUTPUT_FOLDER, folders_below, path_below
from ..sockets import SubjectImages, blocked, checked, mask_input, schema, show_text
from .inputs import class_word_input

REGULARIZATION_FOLDER = "regularization"
"""Folder below the output folder, where the shipped workflow saves a regularization set with its prompts."""


def _token_input() -> io.String.Input:
    return io.String.Input(
        "token",
        default="sks",
        tooltip="Rare token that stands for the subject's identity, V* in Liu et al. 2024, as in 'sks "
        "dog'. 'sks' is a single CLIP token with almost no meaning of its own. Leave it empty for a "
        "regularization set, whose images show the class and not the subject.",
    )


def _add_token_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "add_token",
        default=False,
        tooltip="Token insertion. On: the token is inserted before the class word in captions that lack it. Off: such "
        "captions are refused.",
    )


class LoadSubjectImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditLoadSubjectImages",
            display_name="Load Subject Images",
            category="subject",
            search_aliases=["dataset", "dreambooth", "reference images", "training images", "load images from folder"],
            description=(
                "Loads a few images of one subject, with captions and masks, from a folder below the "
                "input folder, and reports problems with them. Train Identity Prior learns from these images."
            ),
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=_folders(),
                    tooltip="Folder below ComfyUI's input folder with 3 to 5 images (Liu et al. 2024, section 2), "
                    f"or below the output folder's '{REGULARIZATION_FOLDER}'. Press R to refresh the list.",
                ),
                class_word_input(
                    "Class of the subject, such as 'dog'; every caption must contain it. Leave it empty to "
                    "read it from class_word.txt in the folder."
                ),
                _token_input(),
                io.Combo.Input(
                    "captions",
                    options=list(subjects.CAPTION_SOURCES),
                    default=subjects.CAPTION_FILES,
                    tooltip="Source of the captions. Caption files: each image needs one, 1.txt for 1.jpg. Class "
                    "word only: every caption is 'a photo of sks dog', as in DreamBooth (Ruiz et al. 2023); edits "
                    "of pose and expression then work less well (Liu et al. 2024, figure 7). None yet: captions "
                    "may be missing until Caption Images adds them.",
                ),
                _add_token_input(),
                io.Int.Input(
                    "size",
                    default=512,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Side length in pixels; images are center-cropped to a square and resized to it: 512 "
                    "for SD 1.5, 1024 for SDXL, 128 for the demo checkpoint. 0 keeps every image as it is.",
                ),
            ],
            outputs=[
                SubjectImages.Output("subject", tooltip="Images with captions and masks, for training."),
                io.Image.Output("images", tooltip="All images as one batch, at the size of the first."),
                io.String.Output(
                    "caption_list",
                    display_name="captions",
                    is_output_list=True,
                    tooltip="Captions as a list, in the order of the images.",
                ),
                io.Image.Output(
                    "test_image",
                    tooltip="Image to edit, from the folder's test folder. Without one, nodes connected to this "
                    "output do not run.",
                ),
                io.String.Output(
                    "test_caption",
                    tooltip="Caption of the test image: the source prompt of an edit. Empty without a caption file.",
                ),
                io.String.Output("report", tooltip="Loaded images, and ignored files in the folder."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None) -> bool | str:
        if folder not in (None, *_folders()):
            return for_console(
                f"folder '{folder}' is not below ComfyUI's input folder; create it there, add 3 to 5 images with "
                f"captions, and press R."
            )
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, **_: Any) -> str:
        digest = hashlib.sha256()
        if folder is None:
            return ""  # linked
        for root, _folders, files in sorted(os.walk(_folder_path(folder))):
            for name in sorted(files):
                status = os.stat(os.path.join(root, name))
                digest.update(f"{root}/{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    @classmethod
    @checked
    def execute(
        cls, folder: str, class_word: str, token: str, captions: str, add_token: bool, size: int
    ) -> io.NodeOutput:
        subject = subjects.load_subject_folder(
            _folder_path(folder), class_word, token, captions=captions, add_token=add_token, size=size or None
        )
        return io.NodeOutput(
            subject,
            subjects.image_batch(subject),
            list(subject.captions),
            _test_image(subject, folder),
            subject.test_caption,
            show_text(cls, _report(subject), " ".join(subject.notes) or None),
        )


class SubjectFromImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSubjectFromImages",
            display_name="Subject from Images",
            category="subject",
            search_aliases=["dataset", "dreambooth", "reference images", "training images", "image batch"],
            description=(
                "Builds a subject from images in the graph: the same as Load Subject Images, without a folder."
            ),
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images", tooltip="Images of the subject, as a batch or a list; 3 to 5 in Liu et al. 2024."
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="Captions: one line per image, one line for all, or a list. Leave it empty if Caption "
                    "Images follows.",
                ),
                class_word_input("Class of the subject, such as 'dog'; every caption must contain it."),
                _token_input(),
                _add_token_input(),
                mask_input(
                    "masks",
                    "Masks of the subject (1 on the subject), one per image or one for all, of any size, "
                    "for training with a masked loss. An RGBA image without a mask uses its opaque part.",
                    optional=True,
                ),
            ],
            outputs=[
                SubjectImages.Output("subject", tooltip="Images with captions and masks, for training."),
                io.String.Output("report", tooltip="Sizes, captions and masks of the images."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        images: list[torch.Tensor],
        captions: list[str],
        class_word: list[str],
        token: list[str],
        add_token: list[bool],
        masks: list[torch.Tensor] | None = None,
    ) -> io.NodeOutput:
        lines = [line for text in captions for line in text.splitlines() if line.strip()]
        subject = subjects.from_batch(
            images, lines, class_word[0], token[0], masks=masks or None, add_token=bool(add_token[0])
        )
        return io.NodeOutput(subject, show_text(cls, _report(subject), " ".join(subject.notes) or None))


def _folders() -> list[str]:
    """Folders that may contain a subject or a regularization set."""
    rendered = os.path.join(folder_paths.get_output_directory(), REGULARIZATION_FOLDER)
    listed = folders_below(folder_paths.get_input_directory())
    listed += [f"{REGULARIZATION_FOLDER}/{name}{IN_OUTPUT_FOLDER}" for name in _subfolders(rendered)]
    return sorted(name for name in listed if name.split("/")[-1] != subjects.TEST_FOLDER)


def _folder_path(folder: str) -> str:
    if folder.endswith(IN_OUTPUT_FOLDER):
        return path_below(folder_paths.get_output_directory(), folder.removesuffix(IN_OUTPUT_FOLDER), "folder")
    return path_below(folder_paths.get_input_directory(), folder, "folder")


def _subfolders(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []


def _test_image(subject: subjects.SubjectImages, folder: str) -> Any:
    if subject.test_image is not None:
        return subject.test_image.unsqueeze(0)
    return blocked(f"The folder {folder} has no test image; put the image to edit into {folder}/test.")


def _report(subject: subjects.SubjectImages) -> str:
    """Report with one line per image."""
    lines = [f"{len(subject.images)} images of '{subject.identity_prompt}'."]
    for name, image, mask, caption in zip(subject.names, subject.images, subject.masks, subject.captions, strict=True):
        masked = "" if mask is None else ", mask"
        lines.append(f"{name} ({image.shape[1]}x{image.shape[0]}{masked}): {caption or 'no caption yet'}")
    if subject.test_image is not None:
        lines.append(f"{subject.test_name}: {subject.test_caption or 'no caption'}")
    return "\n".join(lines)


NODES: list[type[io.ComfyNode]] = [LoadSubjectImages, SubjectFromImages]
