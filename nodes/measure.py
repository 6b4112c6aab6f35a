"""Nodes that say how good a result is."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..pipelines import reconstruction as reconstructions
from .sockets import schema, show_text


class ReconstructionCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditReconstructionCheck",
            display_name="Reconstruction Check",
            category="measure",
            search_aliases=["PSNR", "compare images", "image difference"],
            description="Measures how well an inversion reconstructs its picture, and warns when no edit can be good.",
            is_output_node=True,
            inputs=[
                io.Image.Input("picture", tooltip="The picture that was inverted."),
                io.Image.Input(
                    "reconstruction", tooltip="The picture sampled back from its inversion with the source prompt."
                ),
                io.Float.Input(
                    "lowest_psnr",
                    default=reconstructions.LOWEST_PSNR,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Decibels below which it warns. 20: Stable Diffusion's autoencoder alone reaches 25 to "
                    "30 dB, null-text inversion nearly that, DDIM under guidance 7.5 less than 20.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "psnr",
                    display_name="psnr",
                    tooltip="Peak signal-to-noise ratio in dB, of the worst picture of a batch; higher is closer.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="The figures of all pictures, and a warning."
                ),
            ],
        )

    @classmethod
    def execute(cls, picture: torch.Tensor, reconstruction: torch.Tensor, lowest_psnr: float) -> io.NodeOutput:
        values = reconstructions.psnr(picture, reconstruction)
        figures = ", ".join(f"{value:.1f} dB" for value in values.tolist())
        warning = reconstructions.reconstruction_warning(values, lowest_psnr)
        text = show_text(cls, f"Reconstruction PSNR: {figures}", warning)
        return io.NodeOutput(float(values.min()), text, ui=ui.PreviewText(text))


NODES: list[type[io.ComfyNode]] = [ReconstructionCheck]
