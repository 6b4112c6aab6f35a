"""Nodes that save an inversion to a file and load it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ...pipelines.inversion import inversion as inversions
from ...pipelines.inversion.inverted_noise import InvertedNoise
from ...pipelines.text.step_embeddings import apply_step_embeddings
from ..saved_files import (
    check_file,
    file_input,
    filename_prefix_input,
    fingerprint_of,
    new_path,
    saved_path,
)
from ..sockets import Inversion, checked, latent_samples, schema, show_text, steps_input

FILE_FOLDER = "inversions"


class SaveInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSaveInversion",
            display_name="Save Inversion",
            category="inversion",
            search_aliases=["store inversion", "export inversion"],
            description="Saves an inversion, with its null-text embeddings, as a .safetensors file in the "
            "output folder.",
            is_output_node=True,
            inputs=[
                Inversion.Input(
                    "inversion",
                    tooltip="Inversion from Noise Inversion, Null-Text Optimization or Edit-Friendly DDPM Inversion.",
                ),
                filename_prefix_input(FILE_FOLDER, "inversion", "Load Inversion"),
            ],
            outputs=[io.String.Output("file", tooltip="Path of the saved inversion.")],
        )

    @classmethod
    @checked
    def execute(cls, inversion: inversions.Inversion, filename_prefix: str) -> io.NodeOutput:
        with new_path(filename_prefix, f"{FILE_FOLDER}/inversion") as path:
            inversions.save_inversion(inversion, path)
        return io.NodeOutput(path, ui=ui.PreviewText(show_text(cls, path)))


class LoadInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditLoadInversion",
            display_name="Load Inversion",
            category="inversion",
            search_aliases=["open inversion", "import inversion"],
            advanced=["steps"],
            description="Loads a saved inversion, so that one inversion serves many edits. Refuses an "
            "inversion of another model.",
            inputs=[
                io.Model.Input("model", tooltip="The model used for the inversion; any other model is refused."),
                file_input("Save Inversion", FILE_FOLDER),
                steps_input(
                    0,
                    1000,
                    least=0,
                    tooltip="Required number of steps: an inversion with another number is refused. 0 accepts any "
                    "number.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Latent of the required size and batch: an inversion that differs is refused.",
                ),
            ],
            outputs=[
                Inversion.Output("inversion", tooltip="The loaded inversion."),
                io.Latent.Output(
                    "inverted_latent",
                    tooltip="Noisiest latent, x_T. Sample from it WITHOUT adding noise. On flow models it is the "
                    "image's latent; connect the noise output with it.",
                ),
                io.Sigmas.Output("sigmas", tooltip="Schedule of the inversion."),
                io.Model.Output(
                    "model_with_embeddings",
                    display_name="model",
                    tooltip="The model, with the null-text embeddings as its negative conditioning if the file has "
                    "them.",
                ),
                io.Noise.Output(
                    "noise",
                    tooltip="Noise with which SamplerCustomAdvanced starts at the inversion's noisiest latent. The "
                    "only form that works on flow models.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        return check_file(file, "save the inversion again")

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **_: Any) -> float:
        return fingerprint_of(file)

    @classmethod
    @checked
    def execute(cls, model: Any, file: str, steps: int, latent: dict[str, Any] | None = None) -> io.NodeOutput:
        inversion = inversions.load_inversion(saved_path(file))
        shape = None if latent is None else tuple(latent_samples(latent, "The latent").shape)
        inversions.check_inversion(inversion, model, steps=steps or None, latent_shape=shape)
        if inversion.embeddings is not None:
            model = apply_step_embeddings(model, inversion.embeddings, "negative")
        start = {"samples": inversion.start_latent(model)}
        return io.NodeOutput(inversion, start, inversion.sigmas.clone(), model, InvertedNoise(model, inversion))


NODES: list[type[io.ComfyNode]] = [SaveInversion, LoadInversion]
