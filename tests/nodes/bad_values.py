"""What a user can hand to a socket by mistake: for each type of socket variants of a good value, by their names."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import comfy.model_base
import comfy.supported_models
import tiny_styles
import torch
from identity_edit_pack.attention.capture import IdentityAttention
from identity_edit_pack.pipelines.faces import detection as faces
from identity_edit_pack.pipelines.hifi_tuner import subject_embedding
from identity_edit_pack.tests import tiny_models, tiny_text_encoders, tiny_vision

NOT_A_NUMBER, INFINITE, HUGE = math.nan, math.inf, 1e30
UNICODE = "猫 🐈 Äpfel ‮ sks cat"
LONG = "a sks cat on the grass and " * 300
"""2100 words."""
FILES = {"file", "folder", "image_embedding", "detector", "recognizer", "sam", "grounding_dino", "background_model"}
"""Combos whose options are what lies in folders."""
Variants = dict[str, Any]


# -- tensors -----------------------------------------------------------------------------------------------------------


def _with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """One number of it is another."""
    changed = tensor.clone()
    changed.flatten()[changed.numel() // 2] = value
    return changed


def _numbers(tensor: torch.Tensor) -> Variants:
    """Other numbers and dtypes in a good shape."""
    return {
        "nan": _with_value(tensor, NOT_A_NUMBER),
        "infinite": _with_value(tensor, INFINITE),
        "one huge number": _with_value(tensor, HUGE),
        "all huge": torch.full_like(tensor, HUGE),
        "zeros": torch.zeros_like(tensor),
        "negative": -tensor - 1.0,
        "float16": tensor.half(),
        "bfloat16": tensor.bfloat16(),
        "float64": tensor.double(),
        "uint8": (tensor * 255).clamp(0, 255).to(torch.uint8),
        "int64": tensor.long(),
        "bool": tensor > 0,
        "with a gradient": _with_gradient(tensor),
        "not contiguous": tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    }


def _with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):
        return tensor.clone().requires_grad_(True)


def image(good: torch.Tensor) -> Variants:
    return {
        **_numbers(good),
        "levels of 8 bits as floats": good * 255.0,
        "one channel": good[..., :1],
        "two channels": good[..., :2],
        "with alpha": torch.cat([good, good[..., :1]], dim=-1),
        "five channels": torch.cat([good, good[..., :2]], dim=-1),
        "without a batch": good[0],
        "no image": good[:0],
        "no pixels": good[:, :0],
        "no channels": good[..., :0],
        "channels first": good.movedim(-1, 1),
        "a video": good[None],
        "a batch of three": good.expand(3, -1, -1, -1),
        "one pixel": good[:, :1, :1],
        "odd sides": good[:, :19, :13],
        "a strip": good[:, :8].repeat(1, 1, 4, 1),
        "larger": good.repeat(1, 2, 2, 1),
    }


def mask(good: torch.Tensor) -> Variants:
    return {
        **_numbers(good),
        "ones": torch.ones_like(good),
        "without a batch": good[0],
        "with a channel": good[:, None],
        "with a last channel": good[..., None],
        "no mask": good[:0],
        "no pixels": good[:, :0],
        "another size": good[:, :40, :24],
        "one pixel": good[:, 20:21, 20:21],
        "larger": good.repeat(1, 2, 2),
        "a batch of three": good.expand(3, -1, -1),
        "soft": 0.3 * good,
    }


def latent(good: dict[str, Any]) -> Variants:
    samples = good["samples"]
    found: Variants = {name: {"samples": value} for name, value in _numbers(samples).items()}
    shapes = {
        "without a batch": samples[0],
        "two dimensions": samples[0, 0],
        "a video": samples[:, :, None],
        "three channels": samples[:, :3],
        "sixteen channels": samples.repeat(1, 4, 1, 1),
        "a batch of three": samples.repeat(3, 1, 1, 1),
        "a hundred": samples.repeat(100, 1, 1, 1),
        "no image": samples[:0],
        "no cells": samples[..., :0],
        "one cell": samples[..., :1, :1],
        "odd sides": samples[..., :7, :5],
        "larger": samples.repeat(1, 1, 2, 2),
    }
    found |= {name: {"samples": value} for name, value in shapes.items()}
    found["without samples"] = {}
    found["a list of samples"] = {"samples": [samples]}
    found["with a noise mask"] = {"samples": samples, "noise_mask": torch.ones(1, 64, 64)}
    found["a noise mask of another shape"] = {"samples": samples, "noise_mask": torch.ones(3, 1, 5, 5)}
    return found


def sigmas(good: torch.Tensor) -> Variants:
    return {
        **_numbers(good.reshape(1, -1)),
        "two dimensions": good[None],
        "empty": good[:0],
        "one": good[:1],
        "ascending": good.flip(0),
        "all alike": torch.full_like(good, 2.0),
        "more steps": torch.linspace(14.0, 0.0, 5),
        "beyond the model's": good * 1000.0,
    } | {name: value[0] for name, value in _numbers(good.reshape(1, -1)).items()}


# -- text and conditionings --------------------------------------------------------------------------------------------


def conditioning(good: list[Any]) -> Variants:
    embedding, options = good[0]
    pooled = options["pooled_output"]
    found: Variants = {}
    numbers = _numbers(embedding)
    for name in ("nan", "infinite", "one huge number", "float16", "uint8", "bool", "with a gradient"):
        found[name] = [[numbers[name], dict(options)]]
    shapes = {
        "another width": torch.cat([embedding, embedding[..., :16]], dim=-1),
        "narrower": embedding[..., :16],
        "other tokens": embedding[:, :5],
        "more tokens": embedding.repeat(1, 2, 1),
        "no tokens": embedding[:, :0],
        "no batch": embedding[:0],
        "a batch of three": embedding.repeat(3, 1, 1),
        "without a batch": embedding[0],
        "four dimensions": embedding[None],
    }
    found |= {name: [[value, dict(options)]] for name, value in shapes.items()}
    found |= {
        "empty": [],
        "two entries": [*good, *good],
        "no embedding": [[None, dict(options)]],
        "an entry without options": [[embedding]],
        "an empty entry": [[]],
        "without pooled": [[embedding, {}]],
        "pooled is None": [[embedding, {"pooled_output": None}]],
        "another pooled width": [[embedding, {"pooled_output": pooled[:, :3]}]],
        "pooled nan": [[embedding, {"pooled_output": _with_value(pooled, NOT_A_NUMBER)}]],
        "a range of steps": [[embedding, {**options, "start_percent": 0.2, "end_percent": 0.6}]],
        "an area": [[embedding, {**options, "area": (4, 4, 0, 0), "strength": 1.0}]],
        "a mask": [[embedding, {**options, "mask": torch.ones(1, 64, 64), "mask_strength": 1.0}]],
        "a tuple": tuple(good),
    }
    return found


def string(good: str) -> Variants:
    return {
        "empty": "",
        "blank": "  \t ",
        "line ends": "\n\n",
        "unicode": UNICODE,
        "thousands of words": LONG,
        "a word of 20000 letters": "x" * 20000,
        "NUL": "a sks\0cat",
        "half a pair of surrogates": "a sks cat \ud83d",
        "brackets": "((((a sks cat:1.3",
        "weights": "(a sks cat:nan) (dog:1e999)",
        "a format": "{} {subject} {0} %s %d {",
        "a regular expression": r"(.*)+\1[",
        "an embedding": "embedding:../../secret a sks cat",
        "JSON": '[{"image": 1e400, "points": [[1, 2]]}]',
        "a number": "-1",
        "numbers": "1e999, nan, -5, 99999999999999999999",
        "a path upwards": "../../x",
        "an absolute path": "/nowhere/x",
        "colons": "a: b: -> c | d, 1-2-3",
        "good again": good,
    }


# -- numbers and choices -----------------------------------------------------------------------------------------------


def integer(good: int, least: int, most: int) -> Variants:
    """Beyond the limits too: a linked value is not checked by the page."""
    return {"least": least, "most": most, "below the least": least - 1, "beyond the most": most + 1}


def number(good: float, least: float, most: float) -> Variants:
    return {
        "least": least, "most": most, "below the least": least - 1.0, "beyond the most": most + 1.0,
        "nan": NOT_A_NUMBER, "infinite": INFINITE,
    }  # fmt: skip


def choice(options: list[str], good: str, is_file: bool) -> Variants:
    """All that the combo has, or of files the good one alone; and what a link may bring."""
    listed = {good: good} if is_file else {option: option for option in options}
    wrong = {"not among them": "something else", "empty": "", "upwards": "../../x", "absolute": "/etc/passwd"}
    return {**listed, **wrong}


# -- models ------------------------------------------------------------------------------------------------------------


@functools.cache
def models() -> Variants:
    """Of other families and makes, all with the latents of Stable Diffusion or like SD3's."""
    return {
        "of other weights": tiny_models.sd1(seed=9, output_gain=0.1),
        "of another width": tiny_models.sd1(context_dim=48),
        "SD2.x": tiny_models.sd2_v(),
        "SDXL": tiny_models.sdxl(),
        "a flow model": _flow_model(channels=4),
        "like SD3": _flow_model(channels=16),
        "for inpainting": _inpainting_model(),
        "None": None,
    }


def _flow_model(channels: int) -> Any:
    config = comfy.supported_models.SD15(tiny_models._unet_config(in_channels=channels, out_channels=channels))
    if channels == 16:
        config.latent_format = comfy.latent_formats.SD3()
    config.set_inference_dtype(torch.float32, None)
    flow = comfy.model_base.ModelType.FLOW
    return tiny_models._patcher(comfy.model_base.BaseModel(config, flow, device=torch.device("cpu")), 0, 1.0)


def _inpainting_model() -> Any:
    model = tiny_models.sd1(in_channels=9)
    model.model.set_inpaint()
    return model


@functools.cache
def clips() -> Variants:
    return {"of SDXL": tiny_text_encoders.clip("sdxl"), "None": None}


class SixteenChannelVAE(tiny_vision.VAE):
    """Latents of SD3 and Flux."""

    latent_channels = 16

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return super().encode(images).repeat(1, 4, 1, 1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(latents[:, :4])


class BrokenVAE(tiny_vision.VAE):
    """Overflows, as SDXL's does in float16."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return super().encode(images) * NOT_A_NUMBER


@functools.cache
def vaes() -> Variants:
    return {"of sixteen channels": SixteenChannelVAE(), "that overflows": BrokenVAE(), "None": None}


@functools.cache
def clip_visions() -> Variants:
    return {
        "of other weights": tiny_vision.clip_vision(seed=8),
        "of another width": tiny_vision.clip_vision(width=32),
        "None": None,
    }


# -- the pack's own sockets --------------------------------------------------------------------------------------------


def inversion(good: Any) -> Variants:
    tag = good.model
    other = dataclasses.replace(tag, weights=tuple(-weight for weight in tag.weights))
    found: Variants = {
        "of another model": dataclasses.replace(good, model=other),
        "of another family": dataclasses.replace(good, model=dataclasses.replace(tag, architecture="SDXL-320-4-2048")),
        "without embeddings": dataclasses.replace(good, embeddings=None),
        "of three images": dataclasses.replace(
            good,
            trajectory=good.trajectory.repeat(1, 3, 1, 1, 1),
            noise_maps=None if good.noise_maps is None else good.noise_maps.repeat(1, 3, 1, 1, 1),
        ),
        "of another size": dataclasses.replace(
            good,
            trajectory=good.trajectory[..., :6],
            noise_maps=None if good.noise_maps is None else good.noise_maps[..., :6],
        ),
        "with nan": dataclasses.replace(good, trajectory=_with_value(good.trajectory, NOT_A_NUMBER)),
        "None": None,
    }
    if good.noise_maps is None:
        maps = torch.randn(good.steps, *good.trajectory.shape[1:], generator=torch.Generator().manual_seed(0))
        found["with noise maps"] = dataclasses.replace(good, method="edit-friendly ddpm", noise_maps=maps, eta=1.0)
    else:
        found["without noise maps"] = dataclasses.replace(good, method="ddim", noise_maps=None, eta=0.0)
    return found


def subject_images(good: Any) -> Variants:
    def replaced(image: torch.Tensor) -> Any:
        return dataclasses.replace(good, images=[image, *good.images[1:]])

    first = good.images[0]
    return {
        "no images": dataclasses.replace(good, images=[], captions=[], masks=[], names=[]),
        "no captions": dataclasses.replace(good, captions=["", ""]),
        "other captions": dataclasses.replace(good, captions=["a dog", "a bird"]),
        "long captions": dataclasses.replace(good, captions=[LONG, LONG]),
        "unicode captions": dataclasses.replace(good, captions=[UNICODE, UNICODE]),
        "no masks": dataclasses.replace(good, masks=[None, None]),
        "empty masks": dataclasses.replace(good, masks=[torch.zeros(64, 64)] * 2),
        "masks of another size": dataclasses.replace(good, masks=[torch.ones(32, 64)] * 2),
        "no token": dataclasses.replace(good, token=""),
        "no class word": dataclasses.replace(good, class_word=""),
        "nan": replaced(_with_value(first, NOT_A_NUMBER)),
        "huge": replaced(_with_value(first, HUGE)),
        "two sizes": replaced(first.repeat(2, 1, 1)),
        "a small image": dataclasses.replace(replaced(first[:4, :4]), masks=[None, None]),
        "one image": dataclasses.replace(
            good, images=[first], captions=good.captions[:1], masks=good.masks[:1], names=good.names[:1]
        ),
        "None": None,
    }


def subject(good: Any) -> Variants:
    made = functools.partial(dataclasses.replace, good)
    output, word = subject_embedding.OUTPUT, subject_embedding.WORD
    return {
        "of another width": made(vectors={"clip_l": torch.zeros(2, 48)}),
        "of SD2.x": made(vectors={"clip_h": torch.zeros(2, 32)}),
        "rows of the output": made(kind=output, vectors={output: torch.zeros(2, tiny_models.CONTEXT)}),
        "more tokens than a prompt": made(kind=word, vectors={"clip_l": torch.zeros(90, tiny_models.CONTEXT)}),
        "without a name": made(class_word="", token=""),
        "None": None,
    }


def identity_words(good: Any) -> Variants:
    return {
        "for SDXL": dataclasses.replace(good, widths={"clip_l": 16, "clip_g": 16}),
        "of other features": dataclasses.replace(good, features=(257, 1280)),
        "without a class word": dataclasses.replace(good, class_word=""),
        "None": None,
    }


def w_plus(good: Any) -> Variants:
    images = good.rows.shape[0]
    return {
        "of another encoder": dataclasses.replace(good, encoder="another"),
        "of e4e": tiny_styles.w_plus(images=images, rows=18, width=512),
        "fewer rows": tiny_styles.w_plus(images=images, rows=3),
        "of five images": tiny_styles.w_plus(images=5),
        "None": None,
    }


def style_attention(good: Any) -> Variants:
    return {
        "of other weights": tiny_styles.style_attention(models()["of other weights"]),
        "of SDXL": tiny_styles.style_attention(models()["SDXL"]),
        "None": None,
    }


class NoFaces:
    name = "none"

    def detect(self, image: Any) -> list[faces.Face]:
        return []


class FacesOutside:
    """Of points that lie on one another, beyond the image, or are no numbers."""

    name = "outside"

    def __init__(self, value: float) -> None:
        self.value = value

    def detect(self, image: Any) -> list[faces.Face]:
        import numpy as np

        return [faces.Face((self.value,) * 4, np.full((5, 2), self.value))]


def face_detector(good: Any) -> Variants:
    return {
        "that finds none": NoFaces(),
        "of points on one another": FacesOutside(20.0),
        "far outside": FacesOutside(-5000.0),
        "of nan": FacesOutside(NOT_A_NUMBER),
        "None": None,
    }


def identity_attention(good: Any) -> Variants:
    return {"of a model that has not run": IdentityAttention(()), "None": None}


def none_alone(good: Any) -> Variants:
    return {"None": None}


class WithoutPatches:
    """A CLIP_VISION_OUTPUT of another make."""

    penultimate_hidden_states = None


def clip_vision_output(good: Any) -> Variants:
    return {
        "of another make": WithoutPatches(),
        "of another width": clip_visions()["of another width"].encode_image(torch.rand(1, 32, 32, 3)),
        "of three images": tiny_vision.clip_vision().encode_image(torch.rand(3, 32, 32, 3)),
        "None": None,
    }


def settings(**wrong: Any) -> Callable[[Any], Variants]:
    """A dictionary of the pack with one entry replaced at a time; its node checks the others."""
    return lambda good: {name: {**good, name: value} for name, value in wrong.items()}


BY_SOCKET: dict[str, Callable[[Any], Variants]] = {
    "IMAGE": image,
    "MASK": mask,
    "LATENT": latent,
    "SIGMAS": sigmas,
    "CONDITIONING": conditioning,
    "STRING": string,
    "MODEL": lambda good: models(),
    "CLIP": lambda good: clips(),
    "VAE": lambda good: vaes(),
    "CLIP_VISION": lambda good: clip_visions(),
    "CLIP_VISION_OUTPUT": clip_vision_output,
    "SAMPLER": none_alone,
    "CONTROL_NET": none_alone,
    "INVERSION": inversion,
    "SUBJECT_IMAGES": subject_images,
    "SUBJECT": subject,
    "IDENTITY_WORDS": identity_words,
    "W_PLUS": w_plus,
    "W_PLUS_ENCODER": none_alone,
    "STYLE_ATTENTION": style_attention,
    "FACE_DETECTOR": face_detector,
    "IDENTITY_ATTENTION": identity_attention,
    "TRAINING_SETTINGS": settings(
        optimizer="Lion", precision="float8", learning_rate_schedule="cosin", ema_decay=1.0, accumulation=0
    ),
    "MASK_BLEND_SETTINGS": settings(power=-1, layers="7", feathering=-1.0, given_masks="both"),
    "MCDM_TRAINING_SETTINGS": settings(identity_share=2.0, dropout=-1.0, image_tokens=-1, conditions="none"),
    "PAIR_PROMPTS": settings(edits=(), subjects=()),
    "PAIR_CONDITIONS": settings(identities=None, poses=None),
    "PAIR_SETTINGS": lambda good: {"a check without an encoder": ({**good[0], "smallest_similarity": 0.5}, None)},
    "SCORE_MODELS": settings(lpips="AlexNet", clip="gone"),
}
"""Widgets (INT, FLOAT, BOOLEAN, COMBO) are in `variants`, as they need their limits."""


def variants(item: Any, good: Any) -> Variants:
    """Wrong values, and extreme right ones, for an input of a schema whose good value is `good`."""
    kind = item.get_io_type()
    if kind == "INT":
        return integer(good, item.min, item.max)
    if kind == "FLOAT":
        return number(good, item.min, item.max)
    if kind == "BOOLEAN":
        return {"off": False, "on": True}
    if kind == "COMBO":
        return choice(item.options, good, item.id in FILES)
    found = BY_SOCKET[kind](good)
    # None is what a loader gives for a part that its file lacks, and what another pack's node may give.
    return found if kind in ("STRING",) else {**found, "None": None}
