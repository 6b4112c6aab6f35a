"""Nodes that encode faces as W+ codes, and mix, average, save and load the codes."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...pipelines.networks.model_folders import list_models, missing_model, model_path
from ...pipelines.pidiff import w_plus as styles_of
from ...pipelines.pidiff import w_plus_encoder as encoders
from ...pipelines.pidiff.w_plus import WPlus as Styles
from ...pipelines.pidiff.w_plus_encoder import WPlusEncoder as Encoder
from ...pipelines.shared.images import as_color
from ..idle import first_said
from ..saved_files import (
    changed_at,
    check_file,
    file_input,
    filename_prefix_input,
    fingerprint_of,
    new_path,
    saved_path,
)
from ..sockets import WPlus, WPlusEncoder, checked, schema, show_text

FILE_FOLDER = "w_plus"
ENCODER_FOLDER = encoders.FOLDER
NO_MODEL = "no model"


class LoadWPlusEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditLoadWPlusEncoder",
            display_name="Load W+ Encoder",
            category="face",
            search_aliases=["e4e", "StyleGAN", "pSp", "PIDiff", "style encoder", "w plus"],
            description=(
                "Loads an encoder that turns faces into W+ codes: e4e (Tov et al. 2021), or a smaller one "
                "saved by this pack. No code in the file is executed."
            ),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[NO_MODEL, *list_models(ENCODER_FOLDER, encoders.ENDINGS)],
                    tooltip=f"Encoder in models/{ENCODER_FOLDER}: the official e4e_ffhq_encode.pt, or a .safetensors "
                    "from Save W+ Encoder. Nothing is downloaded.",
                )
            ],
            outputs=[
                WPlusEncoder.Output("encoder", tooltip="The encoder, for Encode W+."),
                io.String.Output("report", tooltip="Name of the encoder, shape of its codes, and input size."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        if file is None or file in list_models(ENCODER_FOLDER, encoders.ENDINGS):
            return True
        return missing_model(ENCODER_FOLDER, file, encoders.NEEDED)

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> float:
        return changed_at(list_models(ENCODER_FOLDER, encoders.ENDINGS).get(file or ""))

    @classmethod
    @checked
    def execute(cls, file: str) -> io.NodeOutput:
        encoder = encoders.load_w_plus_encoder(model_path(ENCODER_FOLDER, file, encoders.NEEDED, encoders.ENDINGS))
        rows, width = encoder.average.shape
        text = f"Encoder {encoder.name}: {rows} codes of width {width}, from images of {encoder.size}x{encoder.size}."
        return io.NodeOutput(encoder, show_text(cls, text))


class SaveWPlusEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSaveWPlusEncoder",
            display_name="Save W+ Encoder",
            category="face",
            search_aliases=["convert e4e", "e4e safetensors", "w plus"],
            description=(
                "Saves an encoder as .safetensors, without the StyleGAN in the official e4e file; it "
                "loads faster and cannot contain code."
            ),
            is_output_node=True,
            inputs=[
                WPlusEncoder.Input("encoder", tooltip="Encoder, from Load W+ Encoder."),
                filename_prefix_input(ENCODER_FOLDER, "encoder", "Load W+ Encoder"),
            ],
            outputs=[io.String.Output("file", tooltip="Path of the saved encoder.")],
        )

    @classmethod
    @checked
    def execute(cls, encoder: Encoder, filename_prefix: str) -> io.NodeOutput:
        name = encoder.name.rsplit(" (", 1)[0]
        with new_path(filename_prefix, f"{ENCODER_FOLDER}/encoder") as path:
            encoders.save_w_plus_encoder(path, encoder.network, encoder.average, name, encoder.training)
        show_text(cls, f"Saved as {path}")
        return io.NodeOutput(path)


class EncodeWPlus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditEncodeWPlus",
            display_name="Encode W+",
            category="face",
            search_aliases=["e4e", "GAN inversion", "W+ codes", "PIDiff", "w plus"],
            description=(
                "Encodes aligned faces as W+ codes, from coarse (pose, face shape) to fine (colors) "
                "(PIDiff, Gu et al. 2025, section 2.2.2)."
            ),
            inputs=[
                WPlusEncoder.Input("encoder", tooltip="Encoder, from Load W+ Encoder."),
                io.Image.Input(
                    "faces",
                    tooltip="Aligned faces from Align Face, ideally at the encoder's input size (e4e: 256). Other "
                    "sizes are resized and reported.",
                ),
            ],
            outputs=[
                WPlus.Output("w_plus", display_name="w+", tooltip="W+ codes, one set per face."),
                io.String.Output("report", tooltip="Number of codes, and faces that were resized."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, encoder: Encoder, faces: torch.Tensor) -> io.NodeOutput:
        images = as_color(faces, "faces")
        size, width = encoder.size, images.shape[1]
        styles = encoders.encode_w_plus(encoder, encoders.fitted(images, size))
        text = f"{_described(styles)}."
        if width != size:
            text += f" The faces were resized from {width}x{width} to {size}x{size}."
        warning = (
            f"The faces are {width} pixels wide instead of {size}; use larger images." if 2 * width <= size else None
        )
        return io.NodeOutput(styles, show_text(cls, text, warning))


class MixWPlus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditMixWPlus",
            display_name="Mix W+",
            category="face",
            search_aliases=["style mixing", "style editing", "interpolate faces", "PIDiff", "w plus"],
            description=(
                "Replaces some W+ codes by those of another face: coarse ones (1-9) change pose, age and "
                "skin, fine ones (10-18) eyes, mouth and colors (PIDiff, Gu et al. 2025, sections 2.2.2 and "
                "3.4.1)."
            ),
            inputs=[
                WPlus.Input("first", tooltip="Face that all other codes come from."),
                WPlus.Input("second", tooltip="Face that the selected codes come from, from the same encoder."),
                io.String.Input(
                    "rows",
                    default=styles_of.FINE_ROWS,
                    tooltip="Selected codes: numbers and ranges from 1, such as '1-9, 12', or 'all'. Gu et al. 2025 "
                    "take 1-9 from one face and 10-18 from another (section 2.2.2).",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Interpolation weight. 1 replaces the codes, as in Gu et al. 2025; 0.5 interpolates "
                    "halfway, above 1 extrapolates.",
                ),
            ],
            outputs=[
                WPlus.Output("w_plus", display_name="w+", tooltip="The mixed W+ codes."),
                io.String.Output("report", tooltip="Origin of each code: which face it comes from."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, first: Styles, second: Styles, rows: str, weight: float) -> io.NodeOutput:
        chosen = styles_of.parse_rows(rows, first.count)
        mixed = styles_of.mix_styles(first, second, chosen, weight)
        numbers = ", ".join(str(row + 1) for row in chosen)
        text = f"{_described(mixed)}; codes {numbers} from the second face, weight {weight:g}."
        unused = first_said(
            (weight == 0.0, "weight is 0, so the first face does not change; choose another weight."),
            (
                torch.equal(mixed.rows, first.rows),
                "Both faces have the same W+ codes, so mixing has no effect; connect another face.",
            ),
        )
        return io.NodeOutput(mixed, show_text(cls, text, unused))


class AverageWPlus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditAverageWPlus",
            display_name="Average W+",
            category="face",
            search_aliases=["mean style", "several photos", "merge faces", "w plus"],
            description=(
                "Averages the W+ codes of several photos of a person, which preserves the identity and "
                "removes differences between the photos."
            ),
            inputs=[
                WPlus.Input("first", tooltip="W+ codes of one or more faces; every face has the same weight."),
                *(
                    WPlus.Input(name, optional=True, tooltip="More W+ codes, from the same encoder.")
                    for name in ("second", "third", "fourth")
                ),
            ],
            outputs=[
                WPlus.Output("w_plus", display_name="w+", tooltip="One face: the mean of all faces."),
                io.String.Output("report", tooltip="Number of faces, and how much they differ."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, first: Styles, second: Styles | None = None, third: Styles | None = None, fourth: Styles | None = None
    ) -> io.NodeOutput:
        inputs = [each for each in (first, second, third, fourth) if each is not None]
        mean = styles_of.average_styles(inputs)
        faces = torch.cat([each.rows for each in inputs])
        spread = float((faces - mean.rows).norm(dim=2).mean())
        distance = float((faces - mean.average).norm(dim=2).mean())
        text = (
            f"Mean of {len(faces)} faces; average distance of a code to this mean {spread:.2f}, to the latent average "
            f"{distance:.2f}."
        )
        return io.NodeOutput(mean, show_text(cls, text))


class SaveWPlus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSaveWPlus",
            display_name="Save W+",
            category="face",
            search_aliases=["save style", "save identity", "w plus"],
            description="Saves W+ codes as .safetensors, so that the person can be used without the photos.",
            is_output_node=True,
            inputs=[
                WPlus.Input("w_plus", tooltip="The W+ codes of one or more faces."),
                filename_prefix_input(FILE_FOLDER, "person", "Load W+"),
            ],
            outputs=[io.String.Output("file", tooltip="Path of the saved W+ codes.")],
        )

    @classmethod
    @checked
    def execute(cls, w_plus: Styles, filename_prefix: str) -> io.NodeOutput:
        with new_path(filename_prefix, f"{FILE_FOLDER}/person") as path:
            styles_of.save_w_plus(w_plus, path)
        show_text(cls, f"Saved as {path}")
        return io.NodeOutput(path)


class LoadWPlus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditLoadWPlus",
            display_name="Load W+",
            category="face",
            search_aliases=["load style", "load identity", "w plus"],
            description="Loads W+ codes saved by Save W+.",
            inputs=[file_input("Save W+", FILE_FOLDER)],
            outputs=[
                WPlus.Output("w_plus", display_name="w+", tooltip="The W+ codes."),
                io.String.Output("report", tooltip="Number of faces, and their encoder."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        return check_file(file, "save the W+ codes again")

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> float:
        return fingerprint_of(file)

    @classmethod
    @checked
    def execute(cls, file: str) -> io.NodeOutput:
        styles = styles_of.load_w_plus(saved_path(file))
        return io.NodeOutput(styles, show_text(cls, f"{_described(styles)}."))


def _described(styles: Any) -> str:
    faces = styles.rows.shape[0]
    return f"{faces} face{'s' if faces > 1 else ''}, {styles.count} codes of width {styles.width} from {styles.encoder}"


NODES: list[type[io.ComfyNode]] = [
    LoadWPlusEncoder,
    SaveWPlusEncoder,
    EncodeWPlus,
    MixWPlus,
    AverageWPlus,
    SaveWPlus,
    LoadWPlus,
]
