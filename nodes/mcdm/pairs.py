"""Nodes that generate, split and save image pairs of one subject before and after an edit."""

from __future__ import annotations

import os
import time
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ...pipelines.mcdm import pair_dataset as datasets
from ...pipelines.mcdm import pair_guidance as guidance
from ...pipelines.mcdm.identity_words import IdentityWords as Words
from ...pipelines.mcdm.pair_folder import PairFolder
from ...pipelines.mcdm.train_identity_words import features_of
from ...pipelines.shared.conditioning import Conditioning
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import as_color, matched_images, to_pillow
from ..idle import first_said, same_prompt
from ..saved_files import check_name
from ..sockets import IdentityWords, checked, schema, seed_input, show_text, show_warnings

FOLDER = "pairs"
Prompts = io.Custom("PAIR_PROMPTS")
"""Arguments of `pipelines.mcdm.pair_dataset.PairSettings`: the edits, the subjects and the prompts."""
Conditions = io.Custom("PAIR_CONDITIONS")
"""Arguments of `pipelines.mcdm.pair_dataset.generate_pairs`: identities and poses."""
Settings = io.Custom("PAIR_SETTINGS")
"""Further arguments of `PairSettings`, and a CLIP_VISION or None for the similarity check."""


def _guidance_inputs() -> list[Any]:
    return [
        io.Float.Input(
            "guidance_scale",
            default=guidance.GUIDANCE_SCALE,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Classifier-free guidance scale of each prompt. 7.5 in Chen et al. 2024.",
        ),
        io.Float.Input(
            "shared_weight",
            default=guidance.SHARED_WEIGHT,
            min=0.0,
            max=10.0,
            step=0.01,
            tooltip="Weight of the shared prompt on both halves, s'_d. 0.1 in Chen et al. 2024.",
        ),
        io.Float.Input(
            "source_weight",
            default=guidance.SOURCE_WEIGHT,
            min=0.0,
            max=10.0,
            step=0.01,
            tooltip="Weight of the source prompt on the left half, s'_a. Should sum to 1 with shared_weight. 0.9 in "
            "Chen et al. 2024.",
        ),
        io.Float.Input(
            "target_weight",
            default=guidance.TARGET_WEIGHT,
            min=0.0,
            max=10.0,
            step=0.01,
            tooltip="Weight of the target prompt on the right half, s'_b. Should sum to 1 with shared_weight. 0.9 in "
            "Chen et al. 2024.",
        ),
    ]


class PairGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditPairGuider",
            display_name="Pair Guider",
            category="portrait",
            search_aliases=["composable diffusion", "paired data", "MCDM", "before and after"],
            description=(
                "Generates one subject before and after an edit, side by side in a latent of double "
                "width: composable guidance with a shared, a source and a target prompt (Chen et al. 2024, eq. 2)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 1.x, 2.x or XL model (noise or v-prediction)."),
                io.Conditioning.Input(
                    "shared", tooltip="Prompt for both halves, p: 'the same woman on the left and right'."
                ),
                io.Conditioning.Input("source", tooltip="Prompt for the left half, p_a: 'a woman, normal costume'."),
                io.Conditioning.Input(
                    "target", tooltip="Prompt for the right half, p_b: 'a woman, Santa Claus costume'."
                ),
                io.Conditioning.Input(
                    "negative", tooltip="Negative prompt for all three prompts; empty in Chen et al. 2024."
                ),
                *_guidance_inputs(),
            ],
            outputs=[
                io.Guider.Output(
                    "guider",
                    display_name="guider",
                    tooltip="Guider for SamplerCustomAdvanced; use an empty latent twice as wide as one image.",
                )
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        shared: Conditioning,
        source: Conditioning,
        target: Conditioning,
        negative: Conditioning,
        guidance_scale: float,
        shared_weight: float,
        source_weight: float,
        target_weight: float,
    ) -> io.NodeOutput:
        guider = guidance.pair_guider(
            model,
            shared,
            source,
            target,
            negative,
            guidance_scale=guidance_scale,
            shared_weight=shared_weight,
            source_weight=source_weight,
            target_weight=target_weight,
        )
        show_warnings(
            cls,
            first_said(
                (
                    same_prompt(source, target),
                    "The source prompt and the target prompt are identical, so both halves show the same; write "
                    "a different target prompt.",
                ),
            )
            or _idle(guidance_scale, shared_weight, source_weight, target_weight),
        )
        return io.NodeOutput(guider)


def _idle(guidance_scale: float, shared_weight: float, source_weight: float, target_weight: float) -> str | None:
    return first_said(
        (
            guidance_scale == 0.0 or max(shared_weight, source_weight, target_weight) == 0.0,
            "guidance_scale or all three weights are 0, so no prompt has an effect; raise them.",
        ),
        (
            max(source_weight, target_weight) == 0.0,
            "source_weight and target_weight are 0, so both halves follow only the shared prompt; raise them.",
        ),
    )


class SplitPair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSplitPair",
            display_name="Split Pair",
            category="portrait",
            search_aliases=["halves", "left and right", "crop", "side by side"],
            description="Splits double-width images or latents into their left and right halves.",
            inputs=[
                io.Image.Input(
                    "images", optional=True, tooltip="Images with the source on the left and the target on the right."
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Latents with the source on the left and the target on the right."
                ),
            ],
            outputs=[
                io.Image.Output("source", display_name="source", tooltip="The left halves of the images."),
                io.Image.Output("target", display_name="target", tooltip="The right halves of the images."),
                io.Latent.Output(
                    "source_latent", display_name="source latent", tooltip="The left halves of the latents."
                ),
                io.Latent.Output(
                    "target_latent", display_name="target latent", tooltip="The right halves of the latents."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, images: torch.Tensor | None = None, latent: dict[str, Any] | None = None) -> io.NodeOutput:
        from comfy_execution.graph import ExecutionBlocker

        def missing(name: str) -> tuple[Any, Any]:
            blocked = ExecutionBlocker(f"Split Pair has no {name} to split; connect {name}.")
            return blocked, blocked

        if images is None and latent is None:
            raise IdentityEditError("Split Pair has no input; connect images or a latent.")
        halves = missing("images") if images is None else guidance.halves(images, 2, "The images")
        latents = missing("latent") if latent is None else _latent_halves(latent)
        return io.NodeOutput(*halves, *latents)


def _latent_halves(latent: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A latent with its noise mask, which may have another size, split into halves."""
    left, right = dict(latent), dict(latent)
    for name in ("samples", "noise_mask"):
        if latent.get(name) is not None:
            left[name], right[name] = guidance.halves(latent[name], -1, "The latent")
    return left, right


def _folder_input(default: str, what_is_there: str) -> io.String.Input:
    return io.String.Input(
        "folder",
        default=f"{FOLDER}/{default}",
        tooltip=f"Dataset folder, below the output folder. {what_is_there}",
    )


def _validation_input(how_drawn: str) -> io.Float.Input:
    return io.Float.Input(
        "validation_share",
        default=datasets.VALIDATION_SHARE,
        min=0.0,
        max=0.9,
        step=0.01,
        tooltip=f"Share of the pairs assigned to the validation split, drawn from {how_drawn}. Chen et al. "
        "2024 generate 1000 more pairs per task for theirs: 100 in the same way, 900 of people described in words.",
    )


class PairPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditPairPrompts",
            display_name="Pair Prompts",
            category="portrait",
            search_aliases=["edits", "subjects", "paired data", "MCDM"],
            advanced=["negative_prompt"],
            description="Edits, subjects and prompts of a dataset of pairs, for Generate Pairs.",
            inputs=[
                io.String.Input(
                    "edits",
                    default=datasets.EDITS,
                    multiline=True,
                    tooltip="Edits, one per line: 'name: source prompt -> target prompt', with {subject} in both. "
                    "The defaults are the costumes of Chen et al. 2024.",
                ),
                io.String.Input(
                    "subjects",
                    default=datasets.SUBJECTS,
                    multiline=True,
                    tooltip="Values for {subject}, one per line; one is picked at random for each pair. With as many "
                    "lines as identity images, each image gets its own line. In a line of the form words, vertical "
                    "bar, name, the words draw the subject and the name replaces them in the dataset. A man or a "
                    "woman in Chen et al. 2024.",
                ),
                io.String.Input(
                    "shared_prompt",
                    default=datasets.SHARED_PROMPT,
                    tooltip="Prompt for both halves, p, with {subject} in it. The default is the prompt of Chen et "
                    "al. 2024.",
                ),
                io.String.Input(
                    "negative_prompt",
                    default="",
                    tooltip="Negative prompt for all pairs; empty in Chen et al. 2024.",
                ),
            ],
            outputs=[Prompts.Output("prompts", display_name="prompts", tooltip="The prompts, for Generate Pairs.")],
        )

    @classmethod
    @checked
    def execute(cls, edits: str, subjects: str, shared_prompt: str, negative_prompt: str) -> io.NodeOutput:
        return io.NodeOutput(
            {
                "edits": datasets.parse_edits(edits),
                "subjects": tuple(line.strip() for line in subjects.splitlines() if line.strip()),
                "shared_prompt": shared_prompt,
                "negative_prompt": negative_prompt,
            }
        )


class PairConditions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditPairConditions",
            display_name="Pair Conditions",
            category="portrait",
            search_aliases=["pose", "ControlNet", "identity", "paired data", "MCDM"],
            advanced=["class_word", "pose_strength"],
            description="Poses and identities of generated pairs, for Generate Pairs: a ControlNet with pose images, "
            "identity words with portraits, or both.",
            inputs=[
                io.ControlNet.Input(
                    "control_net",
                    optional=True,
                    tooltip="ControlNet that gives both halves the same pose. OpenPose in Chen et al. 2024.",
                ),
                io.Image.Input(
                    "poses",
                    optional=True,
                    tooltip="Pose images for the ControlNet, of the size of one image; one is picked at random for "
                    "each pair. 1000 poses in Chen et al. 2024.",
                ),
                io.Float.Input(
                    "pose_strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="ControlNet strength. 1 is ComfyUI's default; Chen et al. 2024 do not report theirs.",
                ),
                IdentityWords.Input(
                    "identity_words",
                    optional=True,
                    tooltip="Identity word encoder, from Load Identity Words; it describes the people in "
                    "identity_images.",
                ),
                io.Image.Input(
                    "identity_images",
                    optional=True,
                    tooltip="Portraits of many people; one is picked at random for each pair. FFHQ faces in Chen et "
                    "al. 2024.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="CLIP image encoder used to train the identity words.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    tooltip="Word in front of which the identity words are inserted. Empty: in front of the subject.",
                ),
            ],
            outputs=[
                Conditions.Output(
                    "conditions", display_name="conditions", tooltip="The poses and identities, for Generate Pairs."
                )
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        pose_strength: float,
        class_word: str,
        control_net: Any | None = None,
        poses: torch.Tensor | None = None,
        identity_words: Words | None = None,
        identity_images: torch.Tensor | None = None,
        clip_vision: Any | None = None,
    ) -> io.NodeOutput:
        conditions = {
            "identities": _identities(identity_words, identity_images, clip_vision, class_word),
            "poses": _poses(control_net, poses, pose_strength),
        }
        return io.NodeOutput(conditions)


class PairSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditPairSettings",
            display_name="Pair Settings",
            category="portrait",
            search_aliases=["similarity check", "validation split", "paired data", "MCDM"],
            description="Less common settings of Generate Pairs: weights of the prompts, size of the validation split, "
            "and a similarity check of every pair. Without this node the defaults shown here are used.",
            inputs=[
                *_guidance_inputs()[1:],
                _validation_input("the seed; no person of the identity images is in both splits"),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="CLIP image encoder for the similarity of both images, which the dataset then records.",
                ),
                io.Float.Input(
                    "smallest_similarity",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Minimum similarity: keeps only pairs whose two images reach this cosine similarity of "
                    "CLIP image embeddings; needs clip_vision. 0, as in Chen et al. 2024, keeps all pairs.",
                ),
                io.Int.Input(
                    "attempts",
                    default=datasets.ATTEMPTS,
                    min=1,
                    max=100,
                    tooltip="Maximum number of seeds tried per pair until one passes the similarity check (our "
                    "default). Without a check, one is used.",
                ),
            ],
            outputs=[Settings.Output("settings", display_name="settings", tooltip="The settings, for Generate Pairs.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        shared_weight: float,
        source_weight: float,
        target_weight: float,
        validation_share: float,
        smallest_similarity: float,
        attempts: int,
        clip_vision: Any | None = None,
    ) -> io.NodeOutput:
        settings = {
            "shared_weight": shared_weight,
            "source_weight": source_weight,
            "target_weight": target_weight,
            "validation_share": validation_share,
            "smallest_similarity": smallest_similarity,
            "attempts": attempts,
        }
        return io.NodeOutput((settings, clip_vision))


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
                io.Model.Input("model", tooltip="A Stable Diffusion 1.x, 2.x or XL model that can draw the subjects."),
                io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Sampler.Input(
                    "sampler",
                    tooltip="Sampler. Chen et al. 2024 use the stochastic sampler of Karras et al. 2022 (Heun with "
                    "churn), which no stock node offers; the closest are SamplerDPMPP_2S_Ancestral and "
                    "SamplerEulerAncestral.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="Noise schedule, from a scheduler node: KarrasScheduler with 20 steps in Chen et al. 2024.",
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
                    tooltip="Width of one image in pixels. 512 in Chen et al. 2024.",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Height of one image in pixels. 512 in Chen et al. 2024.",
                ),
                _guidance_inputs()[0],
                _folder_input("edits", "Existing pairs are kept; only missing ones are generated."),
                io.String.Input(
                    "part",
                    default="",
                    tooltip="Generates only a shard of the dataset: the number of one pair ('12') or a range "
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
                io.Image.Output(
                    "contact_sheet",
                    display_name="contact sheet",
                    tooltip="The first 24 pairs, labeled with their edits.",
                ),
                io.String.Output("dataset", display_name="dataset", tooltip="Path of the dataset folder."),
                io.String.Output(
                    "report", display_name="report", tooltip="Number of pairs generated, and the model calls they took."
                ),
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
        dataset = PairFolder(_dataset_path(folder))
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
        text = show_text(cls, _report(done, dataset, pair_settings), _idle(guidance_scale, *weights))
        return io.NodeOutput(sheet, str(dataset.path), text, ui=ui.PreviewImage(sheet, cls=cls))


def _identities(
    words: Words | None, images: torch.Tensor | None, clip_vision: Any | None, class_word: str
) -> datasets.Identities | None:
    if words is None and images is None:
        return None
    if words is None or images is None or clip_vision is None:
        missing = "identity_words" if words is None else "identity_images" if images is None else "clip_vision"
        raise IdentityEditError(
            f"Identity words need identity_words, identity_images and clip_vision, but {missing} is missing; connect "
            f"all three, or neither words nor images."
        )
    return datasets.Identities(
        words, features_of(clip_vision, list(as_color(images, "identity_images"))), class_word.strip()
    )


def _poses(control_net: Any | None, poses: torch.Tensor | None, strength: float) -> datasets.Poses | None:
    if control_net is None and poses is None:
        return None
    if control_net is None or poses is None:
        raise IdentityEditError("A pose needs both control_net and poses; connect both, or neither.")
    return datasets.Poses(control_net, as_color(poses, "poses"), strength) if strength else None


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


def _dataset_path(folder: str) -> str:
    check_name(folder, "folder")
    output = os.path.abspath(folder_paths.get_output_directory())
    path = os.path.abspath(os.path.join(output, folder.strip()))
    if not folder.strip() or not path.startswith(output + os.sep):
        raise IdentityEditError(
            f"folder '{folder}' is empty or outside the output folder; write a folder below it, such as "
            f"'{FOLDER}/edits'."
        )
    return path


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
                _validation_input("the pair numbers"),
                _folder_input(
                    "own",
                    "Existing pairs are kept. Do not share it with Generate Pairs, which would count these pairs as "
                    "its own.",
                ),
            ],
            outputs=[
                io.String.Output("dataset", display_name="dataset", tooltip="Path of the dataset folder."),
                io.String.Output("report", display_name="report", tooltip="Numbers of the saved pairs."),
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
        dataset = PairFolder(_dataset_path(folder))
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


NODES: list[type[io.ComfyNode]] = [
    PairGuider, SplitPair, PairPrompts, PairConditions, PairSettings, GeneratePairs, SavePair,
]  # fmt: skip
