"""The node that gives a subject's images captions."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.subjects import captioning
from ...pipelines.subjects import images as subjects
from ..sockets import SubjectImages, checked, schema, seed_input, show_text
from .inputs import check_model, list_models, model_path, progress_bar

NO_MODEL = "no model"
DO_NOT_SAVE, SAVE_NEW, OVERWRITE = SAVE_CHOICES = ("no", "new files only", "overwrite")


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
                    options=[NO_MODEL, *list_models()],
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


NODES: list[type[io.ComfyNode]] = [CaptionImages]
