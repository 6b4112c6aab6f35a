"""Nodes that gather what a subject is learned from: its images, their captions, and prompts for its class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ...pipelines.networks.model_folders import list_models, missing_model, model_path
from ...pipelines.shared.errors import IdentityEditError, for_console
from ...pipelines.subjects import captioning
from ...pipelines.subjects import images as subjects
from ...pipelines.subjects import regularization_prompts as prompts
from ..saved_files import IN_OUTPUT_FOLDER, folders_below, path_below
from ..sockets import SEED_MAXIMUM, SubjectImages, checked, mask_input, schema, seed_input, show_text

REGULARIZATION_FOLDER = "regularization"
"""Below the output folder: where the shipped workflow saves a regularization set with its prompts."""
MODEL_FOLDER = "LLM"
_MODEL_FILES = "config.json, the *.safetensors weights and the tokenizer's or processor's files"
NO_MODEL = "no model"
SHIPPED_LIST = "shipped list"
OWN_PROMPTS = "own prompts"
ENDPOINT = "endpoint (environment variables)"
DO_NOT_SAVE, SAVE_NEW, OVERWRITE = SAVE_CHOICES = ("no", "new files only", "overwrite")


def _class_word_input(tooltip: str) -> io.String.Input:
    return io.String.Input("class_word", default="", tooltip=tooltip)


def _token_input() -> io.String.Input:
    return io.String.Input(
        "token",
        default="sks",
        tooltip="The rare token that comes to stand for the subject's identity, V* in Liu et al. 2024; prompts then "
        "say 'sks dog'. 'sks' is one token of CLIP with hardly a meaning. Empty for a regularization set, whose "
        "images show the class and not the subject.",
    )


def _add_token_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "add_token",
        default=False,
        tooltip="On: captions that lack the token get it before the class word. Off: they are refused.",
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
                "Reads a few images of one subject, with their captions and masks, from a folder below the input "
                "folder, and says what is wrong with them: what Train Identity Prior learns from."
            ),
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=_folders(),
                    tooltip="A folder below ComfyUI's input folder with 3 to 5 images (Liu et al. 2024, section 2), "
                    f"or one below the output folder's '{REGULARIZATION_FOLDER}'. Press R to list new ones.",
                ),
                _class_word_input(
                    "What the subject is, such as 'dog'; every caption must say it. Left empty, it is read from "
                    "class_word.txt in the folder."
                ),
                _token_input(),
                io.Combo.Input(
                    "captions",
                    options=list(subjects.CAPTION_SOURCES),
                    default=subjects.CAPTION_FILES,
                    tooltip="Caption files: each image needs one, 1.txt beside 1.jpg. Class word only: every caption "
                    "is 'a photo of sks dog', as in DreamBooth (Ruiz et al. 2023); edits of pose and expression then "
                    "work less well (Liu et al. 2024, figure 7). None yet: images may lack theirs until Caption "
                    "Images.",
                ),
                _add_token_input(),
                io.Int.Input(
                    "size",
                    default=512,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Images are cut to a centerd square and scaled to this side in pixels: 512 for SD 1.5, "
                    "1024 for SDXL, 128 for the demo checkpoint. 0 keeps every image as it is.",
                ),
            ],
            outputs=[
                SubjectImages.Output(
                    "subject", display_name="subject", tooltip="The images with captions and masks, for the training."
                ),
                io.Image.Output(
                    "images",
                    display_name="images",
                    tooltip="The images as one batch, all of the first one's size.",
                ),
                io.String.Output(
                    "caption_list",
                    display_name="captions",
                    is_output_list=True,
                    tooltip="The captions, a list in the images' order.",
                ),
                io.Image.Output(
                    "test_image",
                    display_name="test image",
                    tooltip="The image to edit, from the folder's test folder. Without one, what is connected here "
                    "does not run.",
                ),
                io.String.Output(
                    "test_caption",
                    display_name="test caption",
                    tooltip="The test image's caption: the source prompt of an edit. Empty without a caption file.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="What was read, and what was ignored in the folder."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str) -> bool | str:
        if folder not in _folders():
            return for_console(
                f"folder '{folder}' is not below ComfyUI's input folder; make it there, put 3 to 5 images with their "
                f"captions into it, and press R."
            )
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_: Any) -> str:
        digest = hashlib.sha256()
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
                "Makes the images of one subject from images that are in the graph already: the same as Load Subject "
                "Images, without a folder."
            ),
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The images, as a batch or a list; 3 to 5 in Liu et al. 2024."),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="One line for each image, or one line for all, or a list of captions. Leave it empty "
                    "when Caption Images follows.",
                ),
                _class_word_input("What the subject is, such as 'dog'; every caption must say it."),
                _token_input(),
                _add_token_input(),
                mask_input(
                    "masks",
                    "Masks of the subject, 1 on it: one for each image or one for all, of any size. For a training "
                    "with a masked loss. An RGBA image without one has its opaque part as its mask.",
                    optional=True,
                ),
            ],
            outputs=[
                SubjectImages.Output(
                    "subject", display_name="subject", tooltip="The images with captions and masks, for the training."
                ),
                io.String.Output("report", display_name="report", tooltip="The images' sizes, captions and masks."),
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


class CaptionImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditCaptionImages",
            display_name="Caption Images",
            category="subject",
            search_aliases=["caption", "llava", "image to text", "vlm", "tagger", "describe image"],
            description=(
                "Gives the images of a subject captions that describe action, view and attire (Liu et al. 2024, "
                "section 2.1), written by an image-to-text model on this machine or by you."
            ),
            is_output_node=True,
            inputs=[
                SubjectImages.Input(
                    "subject", tooltip="From Load Subject Images with captions set to none yet, or with captions."
                ),
                io.Combo.Input(
                    "model",
                    options=[NO_MODEL, *list_models(MODEL_FOLDER)],
                    default=NO_MODEL,
                    tooltip="A folder in models/LLM with an image-text-to-text model of transformers, such as LLaVA "
                    "(Liu et al. 2024). Nothing is downloaded. No model: captions come from files and from the lines "
                    "below.",
                ),
                io.String.Input(
                    "instruction",
                    default=captioning.INSTRUCTION,
                    multiline=True,
                    tooltip="What the model is asked; Liu et al. 2024, table 3.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="Captions of your own, one line for each image in order, the test image's last; they "
                    "come before the model's and the file's. An empty line leaves an image as it is.",
                ),
                io.Boolean.Input(
                    "keep_existing",
                    default=True,
                    tooltip="On: the model writes only captions that are missing. Off: it writes all of them anew.",
                ),
                io.Combo.Input(
                    "save",
                    options=list(SAVE_CHOICES),
                    default=DO_NOT_SAVE,
                    tooltip="Write the captions into text files beside the images, where you can edit them. Existing "
                    "files are replaced only with overwrite.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=captioning.MAX_NEW_TOKENS,
                    min=1,
                    max=4096,
                    tooltip="Greatest length of a caption. 160 tokens hold the 70 words that the instruction asks for.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="0: always the likeliest word. Above 0 the words are drawn, with the seed.",
                ),
                seed_input("For a temperature above 0."),
            ],
            outputs=[
                SubjectImages.Output(
                    "captioned",
                    display_name="subject",
                    tooltip="The images with their captions, for the training.",
                ),
                io.String.Output(
                    "caption_list",
                    display_name="captions",
                    is_output_list=True,
                    tooltip="The captions, a list in the images' order.",
                ),
                io.String.Output(
                    "test_caption",
                    display_name="test caption",
                    tooltip="The test image's caption: the source prompt of an edit. Empty where there is none.",
                ),
                io.String.Output(
                    "caption_text",
                    display_name="caption text",
                    tooltip="All captions, one a line, to copy into the captions field and edit.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str) -> bool | str:
        return model == NO_MODEL or _check_model(model)

    @classmethod
    @checked
    def execute(
        cls,
        subject: subjects.SubjectImages,
        model: str,
        instruction: str,
        captions: str,
        keep_existing: bool,
        save: str,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> io.NodeOutput:
        if save != DO_NOT_SAVE:
            subjects.check_can_save(subject)  # before the model works for minutes
        captioned, notes = captioning.caption_images(
            subject,
            model_path=None if model == NO_MODEL else model_path(MODEL_FOLDER, model, _MODEL_FILES),
            lines=captions.rstrip().splitlines(),
            keep_existing=keep_existing,
            instruction=instruction,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            progress=_progress_bar(),
        )
        if save != DO_NOT_SAVE:
            try:
                written = subjects.save_captions(captioned, overwrite=save == OVERWRITE)
            except IdentityEditError as error:  # the captions are not lost: they are on the node and in its outputs
                notes.append(str(error))
            else:
                notes.append(f"Saved: {', '.join(written)}." if written else "No caption file needed to be written.")
        lines = [*captioned.captions, *([captioned.test_caption] if captioned.test_image is not None else [])]
        text = "\n".join(lines)
        shown = show_text(cls, "\n".join([text, *notes]))
        return io.NodeOutput(
            captioned, list(captioned.captions), captioned.test_caption, text, ui=ui.PreviewText(shown)
        )


class RegularizationPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditRegularizationPrompts",
            display_name="Regularization Prompts",
            category="subject",
            search_aliases=["regularization", "class images", "prior preservation", "dreambooth", "prompt list"],
            description=(
                "Detailed prompts about the subject's class (Liu et al. 2024, section 2.1): render each with stock "
                "sampling nodes, and the images keep a training from forgetting the class."
            ),
            inputs=[
                _class_word_input("What the subject is, such as 'dog'; every prompt holds it."),
                io.Combo.Input(
                    "source",
                    options=[SHIPPED_LIST, OWN_PROMPTS, ENDPOINT, *list_models(MODEL_FOLDER)],
                    default=SHIPPED_LIST,
                    tooltip="Shipped list: put together from styles, actions, backgrounds and views, offline. "
                    "Own prompts: the lines of own_prompts. Endpoint: an OpenAI-compatible one, named by "
                    "IDENTITY_EDIT_LLM_URL, IDENTITY_EDIT_LLM_MODEL and IDENTITY_EDIT_LLM_KEY. Or a language model of "
                    "transformers in a folder in models/LLM.",
                ),
                io.Int.Input(
                    "count",
                    default=100,
                    min=1,
                    max=prompts.MOST_PROMPTS,
                    tooltip="How many prompts, and so how many images to render.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(prompts.KINDS),
                    default=prompts.KINDS[0],
                    tooltip="What the class word names; the shipped list has actions for each.",
                ),
                io.String.Input(
                    "first_instruction",
                    default=prompts.INSTRUCTION_TABLE_4,
                    multiline=True,
                    tooltip="What a language model is asked; {keyword} stands for the class word. Liu et al. 2024, "
                    "table 4. Both are asked in turn until there are enough prompts.",
                ),
                io.String.Input(
                    "second_instruction",
                    default=prompts.INSTRUCTION_TABLE_5,
                    multiline=True,
                    tooltip="The other instruction; Liu et al. 2024, table 5. Empty asks only the first.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=prompts.MAX_NEW_TOKENS,
                    min=1,
                    max=32768,
                    tooltip="Greatest length of one answer of a model in a folder. 4096 tokens hold 50 prompts.",
                ),
                io.Float.Input(
                    "temperature",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="How freely a language model writes; at 0 it repeats itself. Not used by the shipped list.",
                ),
                seed_input("Another seed gives other prompts."),
                io.String.Input(
                    "own_prompts",
                    default="",
                    multiline=True,
                    tooltip="For the source own prompts: one prompt a line, each with the class word; taken again from "
                    "the first when count is larger.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompt_list",
                    display_name="prompts",
                    is_output_list=True,
                    tooltip="A list: nodes connected to it run once for each prompt.",
                ),
                io.Int.Output(
                    "seed_list",
                    display_name="seeds",
                    is_output_list=True,
                    tooltip="A noise seed for each prompt, for the sampler's seed; without it all images start from "
                    "the same noise.",
                ),
                io.String.Output("report", display_name="report", tooltip="The prompts, and where they come from."),
            ],
        )

    @classmethod
    def validate_inputs(cls, source: str) -> bool | str:
        return source in (SHIPPED_LIST, OWN_PROMPTS, ENDPOINT) or _check_model(source)

    @classmethod
    @checked
    def execute(
        cls,
        class_word: str,
        source: str,
        count: int,
        kind: str,
        first_instruction: str,
        second_instruction: str,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        own_prompts: str = "",
    ) -> io.NodeOutput:
        instructions = (first_instruction, second_instruction)
        options: dict[str, Any] = {"temperature": temperature, "progress": _progress_bar()}
        notes: list[str] = []
        if source == SHIPPED_LIST:
            found = prompts.shipped_prompts(class_word, count, seed, kind)
        elif source == OWN_PROMPTS:
            found = prompts.own_prompts(own_prompts, class_word, count)
        elif source == ENDPOINT:
            found, notes = prompts.endpoint_prompts(class_word, count, seed, instructions, **options)
        else:
            path = model_path(MODEL_FOLDER, source, _MODEL_FILES)
            found, notes = prompts.model_prompts(
                path, class_word, count, seed, instructions, max_new_tokens=max_new_tokens, **options
            )
        seeds = [(seed + number) % (SEED_MAXIMUM + 1) for number in range(len(found))]
        report = show_text(cls, "\n".join([f"{len(found)} prompts from {source}.", *notes, *found]))
        return io.NodeOutput(found, seeds, report)


def _folders() -> list[str]:
    """The folders that may hold a subject or a regularization set."""
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


def _check_model(name: str) -> bool | str:
    return name in list_models(MODEL_FOLDER) or missing_model(MODEL_FOLDER, name, _MODEL_FILES)


def _test_image(subject: subjects.SubjectImages, folder: str) -> Any:
    if subject.test_image is not None:
        return subject.test_image.unsqueeze(0)
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(f"The folder {folder} has no test image; put the image to edit into {folder}/test.")


def _report(subject: subjects.SubjectImages) -> str:
    """A line for each image."""
    lines = [f"{len(subject.images)} images of '{subject.identity_prompt}'."]
    for name, image, mask, caption in zip(subject.names, subject.images, subject.masks, subject.captions, strict=True):
        masked = "" if mask is None else ", mask"
        lines.append(f"{name} ({image.shape[1]}x{image.shape[0]}{masked}): {caption or 'no caption yet'}")
    if subject.test_image is not None:
        lines.append(f"{subject.test_name}: {subject.test_caption or 'no caption'}")
    return "\n".join(lines)


def _progress_bar() -> Callable[[int, int], None]:
    from comfy.utils import ProgressBar

    bar = ProgressBar(1)
    return lambda done, total: bar.update_absolute(done, total)


NODES: list[type[io.ComfyNode]] = [
    LoadSubjectImages,
    SubjectFromImages,
    CaptionImages,
    RegularizationPrompts,
]
