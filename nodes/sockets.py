"""Shared parts of all nodes: custom sockets, schema, input checks, progress with preview, text shown on a node."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from comfy_api.latest import io

from ..pipelines import engine
from ..pipelines.faces import detection
from ..pipelines.faces.similarity import NEEDED as RECOGNIZER_NEEDED
from ..pipelines.shared.errors import IdentityEditError, check_conditioning, check_latent, for_console, loggable
from ..pipelines.shared.input_checks import BRIGHTEST, check_images, check_mask, check_number, check_sigmas, check_text
from ..pipelines.shared.masks import CUT_OUT, as_masks, is_placeholder_mask, is_transparency
from ..pipelines.text.prompt_tokens import check_clip

CATEGORY = "identity edit"
_notes: ContextVar[tuple[str, ...]] = ContextVar("notes about the inputs of the running node", default=())

Inversion = io.Custom("INVERSION")
"""`pipelines.inversion.inversion.Inversion`: a latent trajectory with its schedule, optionally per-step embeddings."""
SubjectImages = io.Custom("SUBJECT_IMAGES")
"""`pipelines.subjects.images.SubjectImages`: images of one subject, with captions and optionally masks."""
Subject = io.Custom("SUBJECT")
"""`pipelines.hifi_tuner.subject_embedding.SubjectEmbedding`: a subject learned as text embeddings."""

IdentityWords = io.Custom("IDENTITY_WORDS")
"""`pipelines.mcdm.identity_words.IdentityWords`: an encoder from the person in an image to word embeddings."""
WPlus = io.Custom("W_PLUS")
"""`pipelines.pidiff.w_plus.WPlus`: W+ codes of faces, from coarse to fine."""
WPlusEncoder = io.Custom("W_PLUS_ENCODER")
"""`pipelines.pidiff.w_plus_encoder.WPlusEncoder`: the network that encodes faces as W+ codes."""
FaceDetector = io.Custom("FACE_DETECTOR")
"""`pipelines.faces.detection.FaceDetector`: a detector of faces and five facial landmarks."""

IdentityAttention = io.Custom("IDENTITY_ATTENTION")
"""`attention.capture.IdentityAttention`: attention to the identity recorded in a model's last run."""
StyleAttention = io.Custom("STYLE_ATTENTION")
"""`pipelines.pidiff.style_attention.StyleAttention`: a mapping network and cross-attention layers for W+ codes."""


def schema(*, category: str, search_aliases: list[str], advanced: Sequence[str] = (), **fields: Any) -> io.Schema:
    """A node's schema in the pack's category, with search aliases where ComfyUI supports them (newer than 0.3.75).

    Args:
        category: the category below "identity edit/".
        search_aliases: other terms that users may search for.
        advanced: ids of widgets that few users change; the page hides them until asked.
        fields: all other fields of `io.Schema`. An output without a display name gets its id, with spaces.
    """
    if any(field.name == "search_aliases" for field in dataclasses.fields(io.Schema)):
        fields["search_aliases"] = search_aliases
    for widget in fields.get("inputs", ()):
        if widget.id in advanced:  # widgets of ComfyUI 0.3.75 accept no such argument, but pass on extra fields
            widget.extra_dict = {**widget.extra_dict, "advanced": True}
    for output in fields.get("outputs", ()):
        if output.display_name in (None, output.id):  # ComfyUI 0.33 fills in the id
            output.display_name = output.id.replace("_", " ")
    return io.Schema(category=f"{CATEGORY}/{category}", hidden=[io.Hidden.unique_id], **fields)


def checked(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Decorator of a node's `execute` that checks the inputs against the schema, and that the results are finite.

    No node can forget it, and errors name an input as the node does. Requirements of a single technique are checked in
    its pipeline. Images and masks are normalized (`bring_to_form`); notes about them are shown with the node's own
    text.
    """
    parameters = inspect.signature(execute)

    @functools.wraps(execute)
    def check_and_execute(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        given = dict(parameters.bind(cls, *args, **kwargs).arguments)
        del given["cls"]
        for parameter in parameters.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        schema = cls.SCHEMA or cls.GET_SCHEMA()  # ComfyUI creates it when it reads the inputs
        before = _notes.set(())
        try:
            check_inputs(schema, given)
            _notes.set((*bring_to_form(schema, given), *_of_distilled_guidance(given)))
            output = execute(cls, **given)
            check_results(schema, output)
        except Exception as error:
            fit = loggable(error)
            if fit is error:
                raise
            raise fit from None
        finally:
            if _notes.get():  # no text was shown
                show_text(cls, "")
            _notes.reset(before)
        return output

    return check_and_execute


def check_inputs(schema: io.Schema, given: dict[str, Any]) -> None:
    """Check inputs by the types of their sockets and the limits of their widgets.

    Raises:
        IdentityEditError: for the first invalid input, by name.
    """
    model = None
    for item in schema.inputs:
        if item.id not in given:
            continue
        kind, value = item.get_io_type(), given[item.id]
        for each in value if schema.is_input_list and isinstance(value, list) else [value]:
            if each is not None:
                if kind in _CHECKS:
                    _CHECKS[kind](each, item, model)
                model = each if kind == "MODEL" else model
            elif not item.optional:
                raise IdentityEditError(
                    f"{item.id} is missing: the connected node returned nothing, as for a file without this part; "
                    f"connect another one."
                )


_CHECKS: dict[str, Callable[[Any, Any, Any], object]] = {
    "MODEL": lambda value, item, model: engine.require(value),
    "CLIP": lambda value, item, model: _check_clip(value, item, model),
    "CLIP_VISION": lambda value, item, model: _check_clip_vision(value, item.id),
    "VAE": lambda value, item, model: _check_vae(value, item.id, _channels(model)),
    "IMAGE": lambda value, item, model: check_images(value, item.id),
    "MASK": lambda value, item, model: check_mask(value, item.id),
    "LATENT": lambda value, item, model: _check_latent(value, item, model),
    "CONDITIONING": lambda value, item, model: _check_conditioning(value, item.id, model),
    "SIGMAS": lambda value, item, model: check_sigmas(value, item.id),
    "INT": lambda value, item, model: check_number(value, item.id, item.min, item.max),
    "FLOAT": lambda value, item, model: check_number(value, item.id, item.min, item.max),
    "STRING": lambda value, item, model: check_text(value, item.id),
}
"""Checks by socket type; arguments are the value, its input, and the MODEL among the inputs before it."""


class ClipOfAnyFamily(io.Clip.Input):
    """CLIP input of a node that supports the text encoders of flow models, too."""


def _check_clip(clip: Any, item: Any, model: Any) -> None:
    is_flow = model is not None and engine.Capability.VELOCITY in engine.require(model).capabilities
    of_any_family = isinstance(item, ClipOfAnyFamily) and is_flow
    check_clip(clip, item.id, of_any_family)


def _check_clip_vision(clip_vision: Any, name: str) -> None:
    if not hasattr(clip_vision, "encode_image"):
        raise IdentityEditError(f"{name} is not a CLIP vision model; connect a Load CLIP Vision node.")


class EmptyLatent(io.Latent.Input):
    """LATENT input that also takes an empty latent of other channels, as ComfyUI's samplers do."""


def _check_latent(latent: Any, item: Any, model: Any) -> None:
    samples = latent_samples(latent, item.id)
    may_be_empty = isinstance(item, EmptyLatent) and isinstance(samples, torch.Tensor)
    is_empty = may_be_empty and not bool(samples.any())
    check_latent(
        samples, item.id, None if is_empty else _channels(model), model is not None and engine.has_frames(model)
    )


def _channels(model: Any) -> int | None:
    return None if model is None else engine.latent_channels(model)


def _check_conditioning(conditioning: Any, name: str, model: Any) -> None:
    if model is None:
        check_conditioning(conditioning, name)
    else:
        engine.check_prompt(model, conditioning, name)


def bring_to_form(schema: io.Schema, given: dict[str, Any]) -> list[str]:
    """Normalize the checked images and masks among a node's inputs, in `given`.

    A MASK becomes [B, H, W] float32 on the CPU; an optional one that is empty like Load Image's becomes None. An image
    brighter than 1 by more than an overshoot is clipped to 1.

    Returns:
        notes for the user, one sentence each.
    """
    notes = []
    images: dict[str, list[torch.Tensor]] = {}
    masks: dict[str, list[torch.Tensor]] = {}
    for item in schema.inputs:
        kind, value = item.get_io_type(), given.get(item.id)
        if kind not in ("IMAGE", "MASK") or value is None:
            continue
        is_list = schema.is_input_list and isinstance(value, list)
        entries = [each for each in (value if is_list else [value]) if each is not None]
        if kind == "IMAGE":
            brightest = max((float(each.max()) for each in entries if each.is_floating_point()), default=0.0)
            if brightest > BRIGHTEST:
                entries = [each.clamp(max=1.0) if each.is_floating_point() else each for each in entries]
                notes.append(
                    f"{item.id} has values up to {brightest:g}, as HDR images do; values above 1 are clipped to 1, as "
                    f"Save Image does."
                )
            images[item.id] = entries
        else:
            entries = [as_masks(each, item.id) for each in entries]
            if item.optional and entries and all(map(is_placeholder_mask, entries)):
                notes.append(
                    f"{item.id} is empty, as from Load Image for an image without transparency, and counts as not "
                    f"connected."
                )
                given[item.id] = None
                continue
            masks[item.id] = entries
        given[item.id] = entries if is_list else entries[0]
    for name, of_masks in masks.items():
        for other, of_images in images.items():
            if any(is_transparency(mask, shown) for mask in of_masks for shown in of_images):
                notes.append(
                    f"{name} is 1 exactly where {other} is transparent; to mask the subject instead, insert Invert "
                    f"Mask."
                )
    return notes


def _of_distilled_guidance(given: dict[str, Any]) -> list[str]:
    """A note for each guidance scale above 1 that adds to the guidance of a model with distilled guidance."""
    scales = {name: value for name, value in given.items() if name.endswith("guidance_scale") and value > 1.0}
    model = given.get("model")
    if not scales or model is None or engine.Capability.TRUE_GUIDANCE in engine.require(model).capabilities:
        return []
    return [
        f"The model has distilled guidance, to which {name} {value:g} adds a second guidance; set it to 1."
        for name, value in scales.items()
    ]


SEED_MAXIMUM = 0xFFFFFFFFFFFFFFFF


def seed_input(tooltip: str) -> io.Int.Input:
    """The input `seed`, with the page's control after generate."""
    return io.Int.Input("seed", default=0, min=0, max=SEED_MAXIMUM, control_after_generate=True, tooltip=tooltip)


def any_model_input() -> io.Model.Input:
    """The input `model` of nodes that work with every supported family."""
    return io.Model.Input(
        "model",
        tooltip="A Stable Diffusion 1.x, 2.x or XL model, or a flow model (Flux, Chroma, Stable Diffusion 3, "
        "Qwen-Image, Z-Image and similar).",
    )


def steps_input(default: int, most: int, tooltip: str, *, least: int = 1) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=least, max=most, tooltip=tooltip)


def checkpointing_input(default: bool = True) -> io.Boolean.Input:
    """The input `checkpointing`; where it is off by default, the tooltip says when to turn it on."""
    when = "" if default else " Turn it on when you run out of memory."
    return io.Boolean.Input(
        "checkpointing",
        default=default,
        tooltip="Gradient checkpointing. When on, uses a fraction of the memory and takes up to a third longer, with "
        f"the same result.{when}",
    )


def fraction_input(name: str, default: float, tooltip: str, *, optional: bool = False) -> io.Float.Input:
    """A FLOAT from 0 to 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, optional=optional, tooltip=tooltip)


def guidance_scale_input(default: float, tooltip: str, *, least: float = 0.0) -> io.Float.Input:
    return io.Float.Input("guidance_scale", default=default, min=least, max=30.0, step=0.1, tooltip=tooltip)


def mask_input(name: str, tooltip: str, *, optional: bool = False) -> io.Mask.Input:
    """A MASK input, whose tooltip explains how to use the mask of a cut-out."""
    return io.Mask.Input(name, optional=optional, tooltip=f"{tooltip} {CUT_OUT}")


def recognizer_input(none: str) -> io.Combo.Input:
    """The input `recognizer`: an ArcFace, or the option `none`."""
    return io.Combo.Input(
        "recognizer",
        options=[none, *detection.list_detectors()],
        default=none,
        tooltip=f"ArcFace model in models/{detection.FOLDER} for the identity of faces: an insightface model pack "
        "(models/PACK) or a single .onnx, such as w600k_r50.onnx. Nothing is downloaded. It also needs face_detector; "
        "without both, identity is not measured.",
    )


def recognizer_exists(name: str | None, none: str) -> bool | str:
    """For `validate_inputs`: True for an option of `recognizer_input`, or None (linked), else the error message."""
    if name is None or name == none or name in detection.list_detectors():
        return True
    return detection.missing_file(name, RECOGNIZER_NEEDED)


def _check_vae(vae: Any, name: str, channels: int | None) -> None:
    own = getattr(vae, "latent_channels", None)
    if channels is not None and own is not None and own != channels:
        raise IdentityEditError(
            f"The {name} returns latents with {own} channels but the model expects {channels}; use the VAE of the same "
            f"checkpoint."
        )


def check_results(schema: io.Schema, output: io.NodeOutput) -> None:
    """Raise `IdentityEditError` when an image, mask, latent or conditioning that a node returns is not finite."""
    for item, value in zip(schema.outputs, output.args, strict=False):
        kind, tensors = item.get_io_type(), []
        if kind in ("IMAGE", "MASK") and isinstance(value, torch.Tensor):
            tensors = [value]
        elif kind == "LATENT" and isinstance(value, dict):
            tensors = [value["samples"]]
        elif kind == "CONDITIONING" and isinstance(value, list):
            tensors = [embedding for embedding, *_ in value if isinstance(embedding, torch.Tensor)]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise IdentityEditError(
                f"The result {item.id} contains NaN or infinite values; load the model in float32 (--force-fp32), or "
                f"lower the guidance scale or the learning rate."
            )


def progress(model: Any, total: int) -> engine.Callback:
    """ComfyUI's progress bar with latent previews, for a loop of `total` steps."""
    import latent_preview  # a module of ComfyUI, not needed before a node runs

    return latent_preview.prepare_callback(model, max(1, total))


def at_image_size(mask: torch.Tensor, model: Any) -> torch.Tensor:
    """A mask [B, H, W] of the model's latent size at image size, by nearest-neighbor upsampling, exactly as it was
    used."""
    pixels = engine.pixels_per_latent_pixel(model)
    return mask.repeat_interleave(pixels, dim=1).repeat_interleave(pixels, dim=2)


def latent_samples(latent: dict[str, Any], name: str) -> torch.Tensor:
    """The tensor of a LATENT; its shape and values are checked where it is used.

    Raises:
        IdentityEditError: when there is none.
    """
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if samples is None:
        raise IdentityEditError(f"{name} contains no latents; connect a VAE Encode node.")
    return samples


def show_text(node: type[io.ComfyNode], text: str, warning: str | None = None) -> str:
    """Show a text on the node, write a warning to ComfyUI's log, and return both as one text.

    Notes about the node's inputs are added to the first text.
    """
    warnings = [*_notes.get(), *([] if warning is None else [warning])]
    _notes.set(())
    for each in warnings:
        logging.warning("IdentityEdit: %s", for_console(each))
    text = "\n".join([*([text] if text else []), *(f"Warning: {each}" for each in warnings)])
    try:
        from server import PromptServer

        instance = getattr(PromptServer, "instance", None)
    except ImportError:  # outside of a server
        instance = None
    if instance is not None and node.hidden is not None:
        instance.send_progress_text(text, node.hidden.unique_id)
    return text


def show_warnings(node: type[io.ComfyNode], *warnings: str | None) -> None:
    """`show_text` for a node that shows only warnings; None is skipped."""
    if text := " ".join(warning for warning in warnings if warning is not None):
        show_text(node, "", text)


def blocked(message: str | None = None) -> Any:
    """A result that keeps the nodes connected to it from running: with an error, or without one."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(message)


def choice_of(table: dict[str, Any], choice: str, name: str) -> Any:
    """The value of a combo's choice.

    Raises:
        IdentityEditError: for a choice not in the combo, which can arrive through a link.
    """
    if choice not in table:
        raise IdentityEditError(f"{name} is '{choice}'; choose one of {', '.join(table)}.")
    return table[choice]
