"""Nodes that draw images of the demo world and load its image encoder, so that every workflow runs as it is."""

from __future__ import annotations

import random

import torch
from comfy_api.latest import io

from ..demo_world import attributes as world
from .sockets import checked, choice_of, schema, seed_input

_CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "framing": (world.FRAMINGS, "A whole figure, or a person's portrait (hair, eyes, skin and face shape)."),
    "species": (world.SPECIES, "Who is in the image; figures only."),
    "color": (world.COLORS, "Fur, or a person's clothes; figures only."),
    "pattern": (world.PATTERNS, "On the fur or the clothes; figures only."),
    "pose": (world.POSES, "What the figure does; figures only."),
    "facing": (world.FACINGS, "Which way the subject looks."),
    "expression": (world.EXPRESSIONS, "The face."),
    "costume": (world.COSTUMES, "What the subject wears."),
    "place": (world.PLACES, "The background."),
    "hair_color": (world.HAIR_COLORS, "Portraits only."),
    "hair_style": (world.HAIR_STYLES, "Portraits only."),
    "eye_color": (world.EYE_COLORS, "Portraits only."),
    "skin": (world.SKINS, "Portraits only."),
    "face_shape": (world.FACE_SHAPES, "Portraits only."),
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
            description=(
                "Draws a 128x128 image of the demo world, on which the checkpoint identity-edit-demo was trained, "
                "with its mask and caption. Use Load Image for an image of your own."
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
                    tooltip="Which of the training captions' wordings the caption has; all mean the same.",
                ),
                seed_input(
                    "Moves things about: position, size, horizon. With the same seed and another attribute you "
                    "get the true answer of an edit."
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The image, 128x128."),
                io.Mask.Output("mask", display_name="mask", tooltip="1 on the subject, costume included."),
                io.String.Output(
                    "caption", display_name="caption", tooltip="What the image shows, in the words of the training."
                ),
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
                "Draws portraits of many people of the demo world, each in a place drawn at random, with its pose. Use "
                "portraits of your own and a pose estimator for another checkpoint."
            ),
            inputs=[
                io.Int.Input("count", default=8, min=1, max=4096, tooltip="How many portraits."),
                io.Combo.Input(
                    "identities",
                    options=["training", "held out"],
                    default="training",
                    tooltip="People that the demo checkpoint was trained on, or those that were held out of it.",
                ),
                seed_input("Draws the people, their places and where things are."),
            ],
            outputs=[
                io.Image.Output(
                    "portraits", display_name="portraits", tooltip="Neutral faces without a costume, 128x128."
                ),
                io.Image.Output(
                    "poses",
                    display_name="poses",
                    tooltip="The pose of each, for the ControlNet identity-edit-demo-pose.",
                ),
                io.String.Output(
                    "captions",
                    display_name="captions",
                    tooltip="What each shows, a line each, in the words of the training.",
                ),
                io.String.Output(
                    "subjects",
                    display_name="subjects",
                    tooltip="Who each is and where, a line each, for the subjects of Generate Pairs; the dataset calls "
                    "all of them 'person'.",
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
                "Loads the demo world's small CLIP image encoder, for which the stock Load CLIP Vision has no "
                "configuration. Use Load CLIP Vision with a checkpoint of your own."
            ),
            inputs=[],
            outputs=[
                io.ClipVision.Output(
                    "clip_vision",
                    display_name="clip vision",
                    tooltip="The image encoder, for CLIP Vision Encode and for nodes that take a CLIP_VISION.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls) -> io.NodeOutput:
        from ..demo_world.clip_vision import load_clip_vision

        return io.NodeOutput(load_clip_vision())


NODES: list[type[io.ComfyNode]] = [DrawDemoImage, DrawDemoPortraits, LoadDemoClipVision]
