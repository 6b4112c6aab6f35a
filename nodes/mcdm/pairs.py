"""Nodes that generate pairs of images of one subject before and after an edit."""

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
from ...pipelines.shared.images import as_color, comparable, to_pillow
from ..idle import first_said, same_prompt
from ..saved_files import check_name
from ..sockets import IdentityWords, checked, schema, seed_input, show_text, show_warnings

FOLDER = "pairs"


def _guidance_inputs() -> list[Any]:
    return [
        io.Float.Input(
            "guidance_scale",
            default=guidance.GUIDANCE_SCALE,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Of the classifier-free guidance of each prompt. 7.5 in Chen et al. 2024.",
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
            tooltip="Weight of the source prompt on the left half, s'_a. 0.9 in Chen et al. 2024; it should make 1 "
            "with shared_weight.",
        ),
        io.Float.Input(
            "target_weight",
            default=guidance.TARGET_WEIGHT,
            min=0.0,
            max=10.0,
            step=0.01,
            tooltip="Weight of the target prompt on the right half, s'_b. 0.9 in Chen et al. 2024; it should make 1 "
            "with shared_weight.",
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
                "Draws one subject before and after an edit side by side, in a latent of double width: composable "
                "guidance with a shared, a source and a target prompt (Chen et al. 2024, eq. 2)."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="A Stable Diffusion 1.x, 2.x or XL model (predicts noise or velocity)."
                ),
                io.Conditioning.Input(
                    "shared", tooltip="What both halves show, p: 'the same woman on the left and right'."
                ),
                io.Conditioning.Input("source", tooltip="What the left half shows, p_a: 'a woman, normal costume'."),
                io.Conditioning.Input(
                    "target", tooltip="What the right half shows, p_b: 'a woman, Santa Claus costume'."
                ),
                io.Conditioning.Input(
                    "negative", tooltip="The negative prompt of all three; empty in Chen et al. 2024."
                ),
                *_guidance_inputs(),
            ],
            outputs=[
                io.Guider.Output(
                    "guider",
                    display_name="guider",
                    tooltip="For SamplerCustomAdvanced, with an empty latent twice as wide as one image.",
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
                    "The source prompt and the target prompt are the same, so that both halves show the same; write "
                    "another target prompt.",
                ),
            )
            or _idle(guidance_scale, shared_weight, source_weight, target_weight),
        )
        return io.NodeOutput(guider)


def _idle(guidance_scale: float, shared_weight: float, source_weight: float, target_weight: float) -> str | None:
    return first_said(
        (
            guidance_scale == 0.0 or max(shared_weight, source_weight, target_weight) == 0.0,
            "guidance_scale or all three weights are 0, so that no prompt has a part; raise them.",
        ),
        (
            max(source_weight, target_weight) == 0.0,
            "source_weight and target_weight are 0, so that both halves follow the shared prompt alone; raise them.",
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
            description="Cuts images or latents of double width into their left and right halves.",
            inputs=[
                io.Image.Input("images", optional=True, tooltip="Images with the source left and the target right."),
                io.Latent.Input("latent", optional=True, tooltip="Latents with the source left and the target right."),
            ],
            outputs=[
                io.Image.Output("source", display_name="source", tooltip="The left halves of the images."),
                io.Image.Output("target", display_name="target", tooltip="The right halves of the images."),
                io.Latent.Output(
                    "source_latent", display_name="source latent", tooltip="The left halves of the latent."
                ),
                io.Latent.Output(
                    "target_latent", display_name="target latent", tooltip="The right halves of the latent."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, images: torch.Tensor | None = None, latent: dict[str, Any] | None = None) -> io.NodeOutput:
        from comfy_execution.graph import ExecutionBlocker

        def missing(name: str) -> tuple[Any, Any]:
            blocked = ExecutionBlocker(f"Split Pair has no {name}, so that these halves do not exist; connect {name}.")
            return blocked, blocked

        if images is None and latent is None:
            raise IdentityEditError("Split Pair has nothing to split; connect images or a latent.")
        halves = missing("images") if images is None else guidance.halves(images, 2, "The images")
        latents = missing("latent") if latent is None else _latent_halves(latent)
        return io.NodeOutput(*halves, *latents)


def _latent_halves(latent: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A latent's noise mask is split too; it may have another size."""
    left, right = dict(latent), dict(latent)
    for name in ("samples", "noise_mask"):
        if latent.get(name) is not None:
            left[name], right[name] = guidance.halves(latent[name], -1, "The latent")
    return left, right


def _folder_input(default: str, what_is_there: str) -> io.String.Input:
    return io.String.Input(
        "folder",
        default=f"{FOLDER}/{default}",
        tooltip=f"The dataset's folder, below the output folder. {what_is_there}",
    )


def _validation_input(how_drawn: str) -> io.Float.Input:
    return io.Float.Input(
        "validation_share",
        default=datasets.VALIDATION_SHARE,
        min=0.0,
        max=0.9,
        step=0.01,
        tooltip=f"Share of the pairs that is marked for validation, drawn from {how_drawn}. Chen et al. 2024 have a "
        "validation set and do not say how large.",
    )


class GeneratePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditGeneratePairs",
            display_name="Generate Pairs",
            category="portrait",
            search_aliases=["paired data", "dataset", "MCDM", "training data", "composable diffusion"],
            description=(
                "Makes a dataset of pairs for an edit, from words alone: one subject before and after, with the same "
                "pose and identity (Chen et al. 2024, section 3.2). Goes on where it was stopped."
            ),
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 1.x, 2.x or XL model that draws such subjects."),
                io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Sampler.Input(
                    "sampler", tooltip="From KSamplerSelect. Chen et al. 2024 use Karras et al. 2022's stochastic one."
                ),
                io.Sigmas.Input("sigmas", tooltip="From a scheduler node. 20 steps in Chen et al. 2024."),
                io.String.Input(
                    "edits",
                    default=datasets.EDITS,
                    multiline=True,
                    tooltip="One edit a line: 'name: source prompt -> target prompt', with {subject} in both. The "
                    "costumes of Chen et al. 2024.",
                ),
                io.String.Input(
                    "subjects",
                    default=datasets.SUBJECTS,
                    multiline=True,
                    tooltip="What stands for {subject}, one a line; one is drawn for each pair. As many lines as "
                    "identity images: each image has its own. Words, a vertical bar and a name: drawn by the words,"
                    " called by the name in the dataset. A man or a woman in Chen et al. 2024.",
                ),
                io.String.Input(
                    "shared_prompt",
                    default=datasets.SHARED_PROMPT,
                    tooltip="What both halves show, p, with {subject} in it. The words of Chen et al. 2024.",
                ),
                io.String.Input(
                    "negative_prompt",
                    default="",
                    tooltip="The negative prompt of all pairs; empty in Chen et al. 2024.",
                ),
                io.Int.Input("count", default=8, min=1, max=1000000, tooltip="How many pairs the dataset has in all."),
                seed_input(
                    "Of all draws: subjects, poses, identities, noises, splits. Set it to fixed, or a folder "
                    "that was begun with another seed is refused."
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Pixels of one image. 512 in Chen et al. 2024.",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Pixels of one image. 512 in Chen et al. 2024.",
                ),
                *_guidance_inputs(),
                _validation_input("the seed; nobody of the identity images is in both splits"),
                _folder_input("edits", "What is there is kept: only missing pairs are made."),
                io.String.Input(
                    "part",
                    default="",
                    tooltip="Makes a part of the dataset only: a pair's number ('12') or two of them ('100-199'). "
                    "Empty makes all of it.",
                ),
                io.Float.Input(
                    "smallest_similarity",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Keeps only pairs whose two images are at least this alike: the cosine similarity of "
                    "their CLIP image embeddings, which needs clip_vision. 0, as in Chen et al. 2024, keeps all.",
                ),
                io.Int.Input(
                    "attempts",
                    default=datasets.ATTEMPTS,
                    min=1,
                    max=100,
                    tooltip="Noises that are tried for each pair until one passes the check; our choice. Without a "
                    "check there is one.",
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="For smallest_similarity, and for identity_words."
                ),
                IdentityWords.Input(
                    "identity_words",
                    optional=True,
                    tooltip="From Load Identity Words: who is in the pair is taken from identity_images.",
                ),
                io.Image.Input(
                    "identity_images",
                    optional=True,
                    tooltip="Portraits of many people, one of which is drawn for each pair. Faces of FFHQ in Chen et "
                    "al. 2024.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    optional=True,
                    tooltip="The word before which the identity words go. Empty: before the subject.",
                ),
                io.ControlNet.Input(
                    "control_net", optional=True, tooltip="Holds both halves to one pose. OpenPose in Chen et al. 2024."
                ),
                io.Image.Input(
                    "poses",
                    optional=True,
                    tooltip="Images for the ControlNet, of one image's size, one of which is drawn for each "
                    "pair. 1000 poses in Chen et al. 2024.",
                ),
                io.Float.Input(
                    "pose_strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    tooltip="Strength of the ControlNet. 1 is ComfyUI's default; Chen et al. 2024 name none.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "contact_sheet", display_name="contact sheet", tooltip="The first 24 pairs with their edits."
                ),
                io.String.Output("dataset", display_name="dataset", tooltip="The dataset's folder."),
                io.String.Output("report", display_name="report", tooltip="What was made, and at what cost."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return time.time()  # pairs may have been deleted since; those that are there cost nothing

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        sampler: Any,
        sigmas: torch.Tensor,
        edits: str,
        subjects: str,
        shared_prompt: str,
        negative_prompt: str,
        count: int,
        seed: int,
        width: int,
        height: int,
        guidance_scale: float,
        shared_weight: float,
        source_weight: float,
        target_weight: float,
        validation_share: float,
        folder: str,
        part: str,
        smallest_similarity: float,
        attempts: int,
        clip_vision: Any | None = None,
        identity_words: Words | None = None,
        identity_images: torch.Tensor | None = None,
        class_word: str = "",
        control_net: Any | None = None,
        poses: torch.Tensor | None = None,
        pose_strength: float = 1.0,
    ) -> io.NodeOutput:
        settings = datasets.PairSettings(
            count=count,
            edits=datasets.parse_edits(edits),
            subjects=tuple(line.strip() for line in subjects.splitlines() if line.strip()),
            shared_prompt=shared_prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            width=width,
            height=height,
            validation_share=validation_share,
            guidance_scale=guidance_scale,
            shared_weight=shared_weight,
            source_weight=source_weight,
            target_weight=target_weight,
            smallest_similarity=smallest_similarity,
            attempts=attempts,
        )
        made_of = PairFolder(_dataset_path(folder))
        done = datasets.generate_pairs(
            model,
            clip,
            vae,
            sampler,
            sigmas,
            made_of,
            settings,
            identities=_identities(identity_words, identity_images, clip_vision, class_word),
            poses=_poses(control_net, poses, pose_strength),
            clip_vision=clip_vision,
            numbers=datasets.parse_part(part, count),
            progress=_progress(),
        )
        sheet = made_of.contact_sheet()
        if sheet is None:
            raise IdentityEditError(
                f"None of {done.rejected} pairs is as alike as smallest_similarity {smallest_similarity:g}; lower it, "
                f"and choose another folder."
            )
        unused = _idle(guidance_scale, shared_weight, source_weight, target_weight)
        text = show_text(cls, _report(done, made_of, settings), unused)
        return io.NodeOutput(sheet, str(made_of.path), text, ui=ui.PreviewImage(sheet, cls=cls))


def _identities(
    words: Words | None, images: torch.Tensor | None, clip_vision: Any | None, class_word: str
) -> datasets.Identities | None:
    if words is None and images is None:
        return None
    if words is None or images is None or clip_vision is None:
        missing = "identity_words" if words is None else "identity_images" if images is None else "clip_vision"
        raise IdentityEditError(
            f"Identity words need identity_words, identity_images and clip_vision, and {missing} is missing; connect "
            f"all three or neither words nor images."
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
    evaluations = f" with {done.evaluations} model calls ({done.evaluations // done.made} a pair)" if done.made else ""
    lines = [f"{done.made} pairs made{evaluations}, {done.present} were there; the dataset is in {folder.path}."]
    if settings.smallest_similarity > 0.0:
        lines.append(f"{done.rejected} did not reach the similarity {settings.smallest_similarity:g}.")
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
            f"folder '{folder}' is empty or leads out of the output folder; write a folder below it, such as "
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
            description="Adds pairs that were made in any other way to a dataset of pairs, in the same form as "
            "Generate Pairs.",
            is_output_node=True,
            inputs=[
                io.Image.Input("source", tooltip="The images before the edit."),
                io.Image.Input("target", tooltip="The images after it, as many, of the same size."),
                io.String.Input("source_prompt", default="", tooltip="What the source shows, p_a."),
                io.String.Input("target_prompt", default="", tooltip="What the target shows, p_b."),
                io.String.Input("edit", default="edit", tooltip="The edit's name."),
                _validation_input("their numbers"),
                _folder_input(
                    "own",
                    "What is there is kept. Generate Pairs needs another one: it takes what it finds for its own.",
                ),
            ],
            outputs=[
                io.String.Output("dataset", display_name="dataset", tooltip="The dataset's folder."),
                io.String.Output("report", display_name="report", tooltip="What was saved."),
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
        made_of = PairFolder(_dataset_path(folder))
        source, target, cut = comparable(source, target, ("source", "target"))
        numbers = datasets.save_pairs(
            made_of,
            source,
            target,
            source_prompt=source_prompt,
            target_prompt=target_prompt,
            edit=edit,
            validation_share=validation_share,
        )
        saved = f"Saved as pair {', '.join(map(str, numbers))} in {made_of.path}."
        text = show_text(cls, saved if cut is None else f"{saved} {cut}")
        return io.NodeOutput(str(made_of.path), text, ui=ui.PreviewText(text))


NODES: list[type[io.ComfyNode]] = [PairGuider, SplitPair, GeneratePairs, SavePair]
