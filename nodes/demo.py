"""Nodes that draw images of the demo world and load its image encoder, so that every workflow runs unmodified."""

from __future__ import annotations

import random

import torch
from comfy_api.latest import io

from ..demo_world import attributes as world
from .sockets import checked, choice_of, schema, seed_input

_CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "framing": (world.FRAMINGS, "Full figure, or portrait of a person (hair, eyes, skin and face shape)."),
    "species": (world.SPECIES, "Species of the subject; figures only."),
    "color": (world.COLORS, "Color of the fur, or of a person's clothes; figures only."),
    "pattern": (world.PATTERNS, "Pattern of the fur or clothes; figures only."),
    "pose": (world.POSES, "Pose; figures only."),
    "facing": (world.FACINGS, "Direction in which the subject looks."),
    "expression": (world.EXPRESSIONS, "Facial expression."),
    "costume": (world.COSTUMES, "Costume of the subject."),
    "place": (world.PLACES, "Background."),
    "hair_color": (world.HAIR_COLORS, "Hair color; portraits only."),
    "hair_style": (world.HAIR_STYLES, "Hair style; portraits only."),
    "eye_color": (world.EYE_COLORS, "Eye color; portraits only."),
    "skin": (world.SKINS, "Skin tone; portraits only."),
    "face_shape": (world.FACE_SHAPES, "Face shape; portraits only."),
}


class DrawDemoImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = world.Attributes()
        return schema(
            node_id="IdentityEditDrawDemoImage",
            display_name="Draw Demo Image",
            category="demo",
            search_aliases=["test image", "example image", "demo world"],
            advanced=["wording"],
            description=(
                "Draws a 128x128 image of the demo world, the training data of the checkpoint "
                "identity-edit-demo, with its mask and caption. Use Load Image for your own image."
            ),
            inputs=[
                *(
                    io.Combo.Input(name, options=list(choices), default=getattr(default, name), tooltip=tooltip)
                    for name, (choices, tooltip) in _CHOICES.items()
                ),
                io.Int.Input(
                    "wording",
                    default=0,
                    min=0,
                    max=world.CAPTION_TEMPLATES - 1,
                    tooltip="Caption template; all of them mean the same.",
                ),
                seed_input(
                    "Layout seed: position, size, horizon. The same seed with another attribute gives "
                    "the ground truth of an edit."
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The image, 128x128."),
                io.Mask.Output("mask", tooltip="Mask. 1 on the subject, costume included."),
                io.String.Output("caption", tooltip="Caption of the image, worded like the training captions."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, wording: int, seed: int, **choices: str) -> io.NodeOutput:
        from ..demo_world.renderer import render

        for name, (options, _) in _CHOICES.items():
            choice_of(dict.fromkeys(options), choices.get(name, options[0]), name)
        attributes = world.Attributes(**choices)
        image, mask = render(attributes, seed)
        return io.NodeOutput(
            torch.from_numpy(image.copy()).float().unsqueeze(0) / 255.0,
            torch.from_numpy(mask.copy()).float().unsqueeze(0) / 255.0,
            world.caption(attributes, wording),
        )


class DrawDemoPortraits(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditDrawDemoPortraits",
            display_name="Draw Demo Portraits",
            category="demo",
            search_aliases=["test images", "many faces", "pose images", "demo world"],
            description=(
                "Draws portraits of many people of the demo world, each at a random place, with its pose. "
                "For another checkpoint, use your own portraits and a pose estimator."
            ),
            inputs=[
                io.Int.Input("count", default=8, min=1, max=4096, tooltip="Number of portraits."),
                io.Combo.Input(
                    "identities",
                    options=["training", "held out"],
                    default="training",
                    tooltip="People from the training set of the demo checkpoint, or people held out from it.",
                ),
                seed_input("Seed for people, places and layout."),
            ],
            outputs=[
                io.Image.Output("portraits", tooltip="Neutral faces without a costume, 128x128."),
                io.Image.Output("poses", tooltip="Pose of each person, for the ControlNet identity-edit-demo-pose."),
                io.String.Output("captions", tooltip="Captions, one per line, worded like the training captions."),
                io.String.Output(
                    "subjects",
                    tooltip="One line per person: who they are and where, for the subjects of Generate Pairs; the "
                    "dataset calls all of them 'person'.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, count: int, identities: str, seed: int) -> io.NodeOutput:
        from ..demo_world.pose import draw_pose
        from ..demo_world.renderer import render

        generator = random.Random(f"demo portraits {seed}")
        portraits, poses, captions, subjects = [], [], [], []
        for _ in range(count):
            drawn = world.random_attributes(generator, "portrait", held_out=identities != "training")
            person, place = drawn.replace(expression="neutral", costume="none"), generator.getrandbits(40)
            portraits.append(torch.from_numpy(render(person, place)[0].copy()))
            poses.append(torch.from_numpy(draw_pose(person, place).copy()))
            captions.append(world.caption(person))
            subjects.append(f"{world.description(person)} {world.PLACE_PHRASES[person.place]} | person")
        images = [torch.stack(each).float() / 255.0 for each in (portraits, poses)]
        return io.NodeOutput(*images, "\n".join(captions), "\n".join(subjects))


class LoadDemoClipVision(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditLoadDemoClipVision",
            display_name="Load Demo CLIP Vision",
            category="demo",
            search_aliases=["clip vision", "image encoder", "demo world"],
            description=(
                "Loads the demo world's small CLIP image encoder, which the stock Load CLIP Vision does "
                "not support. With your own checkpoint, use Load CLIP Vision."
            ),
            inputs=[],
            outputs=[
                io.ClipVision.Output(
                    "clip_vision",
                    tooltip="The image encoder, for CLIP Vision Encode and other nodes with a CLIP_VISION input.",
                )
            ],
        )

    @classmethod
    @checked
    def execute(cls) -> io.NodeOutput:
        from ..demo_world.clip_vision import load_clip_vision

        return io.NodeOutput(load_clip_vision())


NODES: list[type[io.ComfyNode]] = [DrawDemoImage, DrawDemoPortraits, LoadDemoClipVision]
