"""Nodes that caption the images of a subject, and that save images with their captions."""

from __future__ import annotations

import os

import folder_paths
import torch
from comfy_api.latest import io, ui

from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import as_color
from ...pipelines.subjects import captioning
from ...pipelines.subjects import images as subjects
from ..saved_files import next_path
from ..sockets import SubjectImages, checked, schema, seed_input, show_text
from .images import REGULARIZATION_FOLDER
from .inputs import check_model, list_models, model_path, progress_bar

NO_MODEL = "no model"
EXAMPLE = f"{REGULARIZATION_FOLDER}/cat/cat"
DO_NOT_SAVE, SAVE_NEW, OVERWRITE = SAVE_CHOICES = ("no", "new files only", "overwrite")


class CaptionImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditCaptionImages",
            display_name="Caption Images",
            category="subject",
            search_aliases=["caption", "llava", "image to text", "vlm", "tagger", "describe image"],
            advanced=["instruction", "max_new_tokens", "temperature", "seed"],
            description=(
                "Captions a subject's images with action, view and attire (Liu et al. 2024, section "
                "2.1), using a local image-to-text model or your own text."
            ),
            is_output_node=True,
            inputs=[
                SubjectImages.Input(
                    "subject",
                    tooltip="Images from Load Subject Images, with captions or with captions set to none yet.",
                ),
                io.Combo.Input(
                    "model",
                    options=[NO_MODEL, *list_models()],
                    default=NO_MODEL,
                    tooltip="Folder in models/LLM with an image-text-to-text model for transformers, such as LLaVA "
                    "(Liu et al. 2024). Nothing is downloaded. No model: captions come from the caption files and "
                    "the lines below.",
                ),
                io.String.Input(
                    "instruction",
                    default=captioning.INSTRUCTION,
                    multiline=True,
                    tooltip="Prompt for the model; Liu et al. 2024, table 3. A plain captioner without a chat "
                    "template, such as BLIP-2, captions without it, and takes your own text as the start of each "
                    "caption.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="Your own captions, one line per image in order, the test image's last. They take "
                    "precedence over the model and the caption files; an empty line leaves that image to them.",
                ),
                io.Boolean.Input(
                    "keep_existing",
                    default=True,
                    tooltip="Existing captions. On: the model captions only images without a caption. Off: it "
                    "rewrites all captions.",
                ),
                io.Combo.Input(
                    "save",
                    options=list(SAVE_CHOICES),
                    default=DO_NOT_SAVE,
                    tooltip="Text files of the captions, saved next to the images, where you can edit them. Existing "
                    "files are replaced only with overwrite.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=captioning.MAX_NEW_TOKENS,
                    min=1,
                    max=4096,
                    tooltip="Maximum length of a caption, in tokens. 160 tokens fit the 70 words that the "
                    "instruction asks for.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="Sampling temperature of the model. 0: always the most likely token. Above 0: tokens "
                    "are sampled, with the seed.",
                ),
                seed_input("Sampling seed, used for a temperature above 0."),
            ],
            outputs=[
                SubjectImages.Output(
                    "captioned", display_name="subject", tooltip="Images with their captions, for training."
                ),
                io.String.Output(
                    "caption_list",
                    display_name="captions",
                    is_output_list=True,
                    tooltip="Captions as a list, in the order of the images.",
                ),
                io.String.Output(
                    "test_caption",
                    tooltip="Caption of the test image: the source prompt of an edit. Empty if there is none.",
                ),
                io.String.Output(
                    "caption_text", tooltip="All captions, one per line, to copy into `captions` and edit."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str | None) -> bool | str:
        return model == NO_MODEL or check_model(model)

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
            model_path=None if model == NO_MODEL else model_path(model),
            lines=captions.rstrip().splitlines(),
            keep_existing=keep_existing,
            instruction=instruction,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            progress=progress_bar(),
        )
        if save != DO_NOT_SAVE:
            try:
                written = subjects.save_captions(captioned, overwrite=save == OVERWRITE)
            except IdentityEditError as error:  # the captions are still shown and output
                notes.append(str(error))
            else:
                notes.append(
                    f"Saved: {', '.join(written)}." if written else "All caption files exist; none was written."
                )
        lines = [*captioned.captions, *([captioned.test_caption] if captioned.test_image is not None else [])]
        text = "\n".join(lines)
        shown = show_text(cls, "\n".join([text, *notes]))
        return io.NodeOutput(
            captioned, list(captioned.captions), captioned.test_caption, text, ui=ui.PreviewText(shown)
        )


class SaveImagesWithCaptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSaveImagesWithCaptions",
            display_name="Save Images with Captions",
            category="subject",
            search_aliases=["save dataset", "caption file", "regularization images", "save text", "training images"],
            description="Saves images as PNG files, each with its caption in a .txt file of the same name, as Load "
            "Subject Images and other trainers read them.",
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Images to save; a list of images is saved one by one."),
                io.String.Input(
                    "caption",
                    default="",
                    multiline=True,
                    tooltip="Caption of the images, such as from Regularization Prompts: from a list, one for each "
                    "image.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default=EXAMPLE,
                    tooltip="Folder and start of the file names below the output folder; a number follows. Load "
                    "Subject Images finds folders below output/regularization.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    @checked
    def execute(cls, images: torch.Tensor, caption: str, filename_prefix: str) -> io.NodeOutput:
        next_path(filename_prefix, EXAMPLE)  # a sentence where the folder cannot be used
        plain = images.detach().float()
        plain = plain if plain.shape[-1] == 4 else as_color(plain)  # what PNG files hold
        saved = ui.ImageSaveHelper.get_save_images_ui(plain, filename_prefix=filename_prefix, cls=cls)
        for image in saved.results:
            path = os.path.join(folder_paths.get_output_directory(), image.subfolder, image.filename)
            subjects.write_text(os.path.splitext(path)[0] + ".txt", caption.strip())
        return io.NodeOutput(ui=saved)


NODES: list[type[io.ComfyNode]] = [CaptionImages, SaveImagesWithCaptions]
