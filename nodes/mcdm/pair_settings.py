"""Nodes with the prompts, the conditions and the settings of Generate Pairs."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ...pipelines.mcdm import pair_dataset as datasets
from ...pipelines.mcdm.identity_words import IdentityWords as Words
from ...pipelines.mcdm.train_identity_words import features_of
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.shared.images import as_color
from ..sockets import IdentityWords, checked, fraction_input, schema
from .pair_guider import guidance_inputs

Prompts = io.Custom("PAIR_PROMPTS")
"""Arguments of `pipelines.mcdm.pair_dataset.PairSettings`: the edits, the subjects and the prompts."""
Conditions = io.Custom("PAIR_CONDITIONS")
"""Arguments of `pipelines.mcdm.pair_dataset.generate_pairs`: identities and poses."""
Settings = io.Custom("PAIR_SETTINGS")
"""Further arguments of `PairSettings`, and a CLIP_VISION or None for the similarity check."""


def validation_input(how_drawn: str) -> io.Float.Input:
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
                    "negative_prompt", default="", tooltip="Negative prompt for all pairs; empty in Chen et al. 2024."
                ),
            ],
            outputs=[Prompts.Output("prompts", tooltip="The prompts, for Generate Pairs.")],
        )

    @classmethod
    @checked
    def execute(cls, edits: str, subjects: str, **prompts: Any) -> io.NodeOutput:
        lines = tuple(line.strip() for line in subjects.splitlines() if line.strip())
        return io.NodeOutput({"edits": datasets.parse_edits(edits), "subjects": lines, **prompts})


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
                    "clip_vision", optional=True, tooltip="CLIP image encoder used to train the identity words."
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    tooltip="Word in front of which the identity words are inserted. Empty: in front of the subject.",
                ),
            ],
            outputs=[Conditions.Output("conditions", tooltip="The poses and identities, for Generate Pairs.")],
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
                *guidance_inputs()[1:],
                validation_input("the seed; no person of the identity images is in both splits"),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="CLIP image encoder for the similarity of both images, which the dataset then records.",
                ),
                fraction_input(
                    "smallest_similarity",
                    0.0,
                    "Minimum similarity: keeps only pairs whose two images reach this cosine similarity of "
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
            outputs=[Settings.Output("settings", tooltip="The settings, for Generate Pairs.")],
        )

    @classmethod
    @checked
    def execute(cls, clip_vision: Any | None = None, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput((settings, clip_vision))


NODES: list[type[io.ComfyNode]] = [PairPrompts, PairConditions, PairSettings]
