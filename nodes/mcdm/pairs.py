"""Nodes that generate datasets of image pairs, and add pairs to one."""

from __future__ import annotations

import os
import time
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ...pipelines.mcdm import pair_dataset as datasets
from ...pipelines.mcdm.pair_folder import PairFolder
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import matched_images, to_pillow
from ..saved_files import check_name
from ..sockets import ClipOfAnyFamily, any_model_input, checked, schema, seed_input, show_text
from .pair_guider import guidance_inputs, idle
from .pair_settings import Conditions, Prompts, Settings, validation_input

FOLDER = "pairs"


def _folder_input(default: str, what_is_there: str) -> io.String.Input:
    return io.String.Input(
        "folder", default=f"{FOLDER}/{default}", tooltip=f"Dataset folder, below the output folder. {what_is_there}"
    )


class GeneratePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditGeneratePairs",
            display_name="Generate Pairs",
            category="portrait",
            search_aliases=["paired data", "dataset", "MCDM", "training data", "composable diffusion"],
            advanced=["part"],
            description=(
                "Generates a dataset of image pairs for an edit from text alone: one subject before and "
                "after, with the same pose and identity (Chen et al. 2024, section 3.2). Resumes where it was "
                "stopped."
            ),
            is_output_node=True,
            inputs=[
                any_model_input(),
                ClipOfAnyFamily("clip", tooltip="The text encoders of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Sampler.Input(
                    "sampler",
                    tooltip="Sampler. Chen et al. 2024 use the stochastic sampler of Karras et al. 2022 (Heun with "
                    "churn), which no stock node offers; the closest are SamplerDPMPP_2S_Ancestral and "
                    "SamplerEulerAncestral.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="Noise schedule, from a scheduler node: KarrasScheduler with 20 steps in Chen et al. 2024, "
                    "BasicScheduler for flow models.",
                ),
                Prompts.Input("prompts", tooltip="Edits, subjects and prompts, from Pair Prompts."),
                io.Int.Input("count", default=8, min=1, max=1000000, tooltip="Total number of pairs in the dataset."),
                seed_input(
                    "Seed for all randomness: subjects, poses, identities, noise and splits. Set it to "
                    "fixed: a folder that was started with another seed is refused."
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Width of one image in pixels. 512 in Chen et al. 2024. Flux.2 needs a multiple of 16.",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Height of one image in pixels. 512 in Chen et al. 2024. Flux.2 needs a multiple of 16.",
                ),
                guidance_inputs()[0],
                _folder_input("edits", "Existing pairs are kept; only missing ones are generated."),
                io.String.Input(
                    "part",
                    default="",
                    tooltip="Shard of the dataset to generate: the number of one pair ('12') or a range "
                    "('100-199'). Empty generates all of it.",
                ),
                Conditions.Input("conditions", optional=True, tooltip="Poses and identities, from Pair Conditions."),
                Settings.Input(
                    "settings",
                    optional=True,
                    tooltip="Prompt weights, validation split and similarity check, from Pair Settings. Not connected: "
                    "the defaults.",
                ),
            ],
            outputs=[
                io.Image.Output("contact_sheet", tooltip="The first 24 pairs, labeled with their edits."),
                io.String.Output("dataset", tooltip="Path of the dataset folder."),
                io.String.Output("report", tooltip="Number of pairs generated, and the model calls they took."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return time.time()  # pairs may have been deleted since; existing ones take no time

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        sampler: Any,
        sigmas: torch.Tensor,
        prompts: dict[str, Any],
        count: int,
        seed: int,
        width: int,
        height: int,
        guidance_scale: float,
        folder: str,
        part: str,
        conditions: dict[str, Any] | None = None,
        settings: tuple[dict[str, Any], Any] | None = None,
    ) -> io.NodeOutput:
        chosen, clip_vision = settings or ({}, None)
        pair_settings = datasets.PairSettings(
            count=count, seed=seed, width=width, height=height, guidance_scale=guidance_scale, **prompts, **chosen
        )
        dataset = PairFolder(dataset_path(folder))
        done = datasets.generate_pairs(
            model,
            clip,
            vae,
            sampler,
            sigmas,
            dataset,
            pair_settings,
            **(conditions or {}),
            clip_vision=clip_vision,
            numbers=datasets.parse_part(part, count),
            progress=_progress(),
        )
        sheet = dataset.contact_sheet()
        if sheet is None:
            raise IdentityEditError(
                f"None of the {done.rejected} pairs reached smallest_similarity "
                f"{pair_settings.smallest_similarity:g}; lower it and choose another folder."
            )
        weights = pair_settings.shared_weight, pair_settings.source_weight, pair_settings.target_weight
        text = show_text(cls, _report(done, dataset, pair_settings), idle(guidance_scale, *weights))
        return io.NodeOutput(sheet, str(dataset.path), text, ui=ui.PreviewImage(sheet, cls=cls))


def _report(done: datasets.PairsMade, folder: PairFolder, settings: datasets.PairSettings) -> str:
    evaluations = (
        f" with {done.evaluations} model calls ({done.evaluations // done.made} per pair)" if done.made else ""
    )
    lines = [f"{done.made} pairs generated{evaluations}, {done.present} already present. Dataset: {folder.path}"]
    if settings.smallest_similarity > 0.0:
        lines.append(f"{done.rejected} below the minimum similarity of {settings.smallest_similarity:g}.")
    return "\n".join(lines)


def _progress() -> Any:
    """ComfyUI's progress bar, with each new pair as its preview."""
    from comfy.utils import ProgressBar

    bar = ProgressBar(1)

    def report(done: int, total: int, image: torch.Tensor | None) -> None:
        preview = None
        if image is not None:
            preview = ("JPEG", to_pillow(image), 512)
        bar.update_absolute(done, total, preview)

    return report


class SavePair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSavePair",
            display_name="Save Pair",
            category="portrait",
            search_aliases=["paired data", "dataset", "save training data"],
            advanced=["validation_share"],
            description="Adds image pairs made in any other way to a dataset, in the format of Generate Pairs.",
            is_output_node=True,
            inputs=[
                io.Image.Input("source", tooltip="Images before the edit."),
                io.Image.Input("target", tooltip="Images after the edit: as many as source, of the same size."),
                io.String.Input("source_prompt", default="", tooltip="Prompt that describes the source, p_a."),
                io.String.Input("target_prompt", default="", tooltip="Prompt that describes the target, p_b."),
                io.String.Input("edit", default="edit", tooltip="Name of the edit."),
                validation_input("the pair numbers"),
                _folder_input(
                    "own",
                    "Existing pairs are kept. Do not share it with Generate Pairs, which would count these pairs as "
                    "its own.",
                ),
            ],
            outputs=[
                io.String.Output("dataset", tooltip="Path of the dataset folder."),
                io.String.Output("report", tooltip="Numbers of the saved pairs."),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        source: torch.Tensor,
        target: torch.Tensor,
        source_prompt: str,
        target_prompt: str,
        edit: str,
        validation_share: float,
        folder: str,
    ) -> io.NodeOutput:
        dataset = PairFolder(dataset_path(folder))
        source, target, cut = matched_images(source, target, ("source", "target"))
        numbers = datasets.save_pairs(
            dataset,
            source,
            target,
            source_prompt=source_prompt,
            target_prompt=target_prompt,
            edit=edit,
            validation_share=validation_share,
        )
        saved = f"Saved as pair {', '.join(map(str, numbers))} in {dataset.path}."
        text = show_text(cls, saved if cut is None else f"{saved} {cut}")
        return io.NodeOutput(str(dataset.path), text, ui=ui.PreviewText(text))


def dataset_path(folder: str) -> str:
    check_name(folder, "folder")
    output = os.path.abspath(folder_paths.get_output_directory())
    path = os.path.abspath(os.path.join(output, folder.strip()))
    if not folder.strip() or not path.startswith(output + os.sep):
        raise IdentityEditError(
            f"folder '{folder}' is empty or outside the output folder; write a folder below it, such as "
            f"'{FOLDER}/edits'."
        )
    return path


NODES: list[type[io.ComfyNode]] = [GeneratePairs, SavePair]
