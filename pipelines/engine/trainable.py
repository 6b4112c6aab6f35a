"""Training of selected weights of a MODEL and a CLIP as float32 variables."""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch.nn.functional import linear

from ..shared.comfy_types import Clip, Model
from ..shared.errors import IdentityEditError
from ..shared.gradients import autograd_safe_options, inputs_survive_changes_in_place
from .edit_model import input_channels, is_edit_model
from .families.base import Capability
from .families.registry import require
from .gradient_context import gradient_context, gradient_memory, use_differentiable_attention
from .model import check_text_width, drop_step_caches, latent_channels, to_model_scale, to_socket_scale
from .weights import plain_weight, weight_shapes

_BYTES_PER_VARIABLE = 16
"""Per trained parameter: its value, its gradient and AdamW's two moments, each in float32."""

Trained = tuple[dict[str, torch.nn.Parameter], dict[str, Callable[[], torch.Tensor]]]
"""The float32 variables by name, and the change of each weight learned so far by its key."""

Text = tuple[torch.Tensor, torch.Tensor | None]
"""Cross-attention embeddings [B, T, C] and pooled outputs [B, P] of a batch of captions."""


def joined_texts(texts: Sequence[Text]) -> Text:
    """Concatenate texts to a batch; shorter ones are repeated, which does not change cross-attention."""
    embeddings = [comfy.conds.CONDCrossAttn(embedding) for embedding, _ in texts]
    pooled = [row for _, row in texts if row is not None]
    return embeddings[0].concat(embeddings[1:]), torch.cat(pooled) if len(pooled) == len(texts) else None


class TrainableNetworks:
    """The networks during training; created by `trainable_networks`.

    Attributes:
        model_variables: trained weights of the MODEL by key, float32 leaves that require a gradient; for low-rank
            changes their factors, by the key with ".down" or ".up" behind it.
        clip_variables: likewise for the CLIP's text encoders.
        device: required device of latents.
        family: the MODEL's family.
        sampling: the MODEL's noise levels.
    """

    def __init__(self, patcher: Model, clip: Clip | None, trained: Sequence[Trained]) -> None:
        (self.model_variables, _), (self.clip_variables, _) = self._trained = trained
        self.device: torch.device = patcher.load_device
        self.family = require(patcher, Capability.TRAINING)
        self.sampling = self.family.sampling
        self._patcher = patcher
        self._clip: Any = clip
        self._frozen_texts: dict[str, Text] = {}
        self._options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        # Other nodes' attention patches and wrappers apply in training as in sampling.
        comfy.sampler_helpers.prepare_model_patcher(patcher, {}, self._options)
        # Some, such as FreeU, overwrite tensors that the backward pass needs.
        self._options = autograd_safe_options(self._options)

    def changes(self, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The changes of weights learned so far, on the CPU, of MODEL and of CLIP."""
        model, clip = (
            {key: change().to("cpu", dtype) for key, change in changes.items()} for _, changes in self._trained
        )
        return model, clip

    def to_model_scale(self, latent: torch.Tensor) -> torch.Tensor:
        """Convert a latent from the scale of LATENT sockets to the MODEL's scale, on the device."""
        return to_model_scale(self._patcher, latent).to(self.device)

    def to_socket_scale(self, latent: torch.Tensor) -> torch.Tensor:
        """Convert a latent from the MODEL's scale to that of LATENT sockets."""
        return to_socket_scale(self._patcher, latent)

    def encode(self, captions: Sequence[str]) -> Text:
        """Encode captions as CLIP Text Encode does, except that parentheses are plain text, not emphasis.

        Encodings are cached unless the text encoders are trained.
        """
        if self.clip_variables:
            return self.encode_tokens([self._tokens(caption) for caption in captions])
        for caption in set(captions) - set(self._frozen_texts):
            with torch.no_grad():
                self._frozen_texts[caption] = self._encode(self._tokens(caption))
        return self._on_device(joined_texts([self._frozen_texts[caption] for caption in captions]))

    def encode_tokens(self, prompts: Sequence[dict[str, Any]]) -> Text:
        """Encode tokens from `clip.tokenize`, which may contain word vectors.

        Differentiable. A prompt of more than 75 tokens gives a longer embedding, see `joined_texts`.
        """
        return self._on_device(joined_texts([self._encode(tokens) for tokens in prompts]))

    def denoised(
        self, x: torch.Tensor, sigma: torch.Tensor, text: Text, source: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The network's estimate of z_0, without guidance.

        Args:
            x: latents [B, C, H, W] float32 in the model's scale.
            sigma: [B] noise levels.
            text: embeddings of B captions, or of one.
            source: for models conditioned on a source image, its latent [B, C, H, W] from the VAE; None for zeros.

        Returns:
            [B, C, H, W] float32.
        """
        embedding, pooled = text
        conditioning: dict[str, Any] = {"cross_attn": embedding, "model_conds": {}, "uuid": uuid.uuid4()}
        if pooled is not None:
            conditioning["pooled_output"] = pooled
        if source is not None:
            conditioning["concat_latent_image"] = source
        base = self._patcher.model
        conditionings = comfy.samplers.encode_model_conds(base.extra_conds, [conditioning], x, x.device, "positive")
        return comfy.samplers.calc_cond_batch(base, [conditionings], x, sigma, self._options)[0]

    def _tokens(self, caption: str) -> dict[str, Any]:
        return self._clip.tokenize(caption, disable_weights=True)

    def _encode(self, tokens: dict[str, Any]) -> Text:
        encoder = self._clip.cond_stage_model
        encoder.reset_clip_options()
        if self._clip.layer_idx is not None:  # CLIP Set Last Layer
            encoder.set_clip_options({"layer": self._clip.layer_idx})
        embedding, pooled = encoder.encode_token_weights(tokens)[:2]
        check_text_width(self._patcher, embedding, pooled, "The clip's text")
        return embedding, pooled

    def _on_device(self, text: Text) -> Text:
        embedding, pooled = text
        return embedding.to(self.device), None if pooled is None else pooled.to(self.device)


@contextlib.contextmanager
def trainable_networks(
    model: Model,
    clip: Clip | None,
    model_keys: Iterable[str] = (),
    clip_keys: Iterable[str] = (),
    *,
    dtype: torch.dtype,
    latent_shape: list[int],
    checkpointing: bool = False,
    modules: Sequence[torch.nn.Module] = (),
    rank: int = 0,
    seed: int = 0,
) -> Iterator[TrainableNetworks]:
    """Load a MODEL and a CLIP and make selected weights trainable, on clones; everything is restored at the end.

    A trained weight is replaced by a float32 parameter, which ComfyUI's operations cast to the dtype of their input.
    LoRAs on the model are already merged. The context leaves ComfyUI's inference mode and enables gradients.

    Args:
        model: MODEL that predicts noise or v.
        clip: CLIP, or None to train on embeddings.
        model_keys: keys of `model.model.state_dict()`.
        clip_keys: keys of `clip.patcher.model.state_dict()`; empty freezes the text encoders.
        dtype: compute dtype of the networks, whatever that of the weights. The caller sets up autocast accordingly.
        latent_shape: [B, C, H, W] of the largest batch, for the memory estimate.
        checkpointing: see `gradient_context`.
        modules: additional networks to train, such as those that the MODEL's patches run. Their parameters must be
            float32 and created outside inference mode. Within this context they are on the MODEL's device and require
            gradients; afterwards they are frozen and back on the CPU.
        rank: r of low-rank changes W + B A of the keys' linear layers (Hu et al. 2022); 0 trains whole weights.
        seed: seed of the initial A.

    Raises:
        IdentityEditError: for an unsupported model, weights that cannot be trained, or more of them than the device's
            memory holds.
    """
    require(model, Capability.TRAINING)
    if input_channels(model) != latent_channels(model) and not is_edit_model(model):
        raise IdentityEditError(
            f"The model takes {input_channels(model)} input channels and cannot be trained on images alone; load a "
            f"text-to-image checkpoint, not an inpainting model."
        )
    patcher, text_encoder = model.clone(), None if clip is None else clip.clone()
    compute_dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    if compute_dtype != dtype or model.model_dtype() != dtype:
        patcher.set_model_compute_dtype(dtype)
    drop_step_caches(patcher)
    use_differentiable_attention(patcher)
    model_keys, clip_keys = list(model_keys), list(clip_keys)
    patchers = [patcher] if text_encoder is None else [patcher, text_encoder.patcher]
    shapes = {key: shape for each in patchers for key, shape in weight_shapes(each.model).items()}
    trained = sum(rank * sum(shapes[key]) if rank else math.prod(shapes[key]) for key in (*model_keys, *clip_keys))
    trained += sum(parameter.numel() for module in modules for parameter in module.parameters())
    _check_fits(patchers, trained)
    memory = gradient_memory(patcher, latent_shape, checkpointing) + _BYTES_PER_VARIABLE * trained
    with contextlib.ExitStack() as stack:
        stack.enter_context(gradient_context(patchers, memory_required=memory, checkpointing=checkpointing))
        trained_parts: list[Trained] = [
            stack.enter_context(
                _low_rank_variables(part.model, keys, rank, seed) if rank else _float32_variables(part.model, keys)
            )
            for part, keys in zip(patchers, (model_keys, clip_keys), strict=False)
        ]
        if text_encoder is not None:
            stack.enter_context(inputs_survive_changes_in_place(text_encoder.patcher.model))
        stack.enter_context(_trained_modules(modules, patcher.load_device))
        patcher.pre_run()
        try:
            yield TrainableNetworks(patcher, text_encoder, [*trained_parts, ({}, {})][:2])
        finally:
            patcher.cleanup()


def _check_fits(patchers: Sequence[Any], trained: int) -> None:
    """Raise `IdentityEditError` if the networks and the trained weights alone exceed the device's memory."""
    device = patchers[0].load_device
    needed = _BYTES_PER_VARIABLE * trained + sum(patcher.model_size() for patcher in patchers)
    memory = comfy.model_management.get_total_memory(device)
    if needed > memory:
        raise IdentityEditError(
            f"Training {trained / 1e6:.0f} million weights takes {needed / 1e9:.1f} GB with the model, and the device "
            f"has {memory / 1e9:.1f} GB; train fewer weights ('low rank', where the node offers it), or use a device "
            f"with more memory."
        )


def float32_weight(module: torch.nn.Module, name: str, key: str, *, in_use: bool = False) -> torch.Tensor:
    """A float32 copy of a layer's current weight, on its device.

    Args:
        module: the layer.
        name: its parameter's name.
        key: the weight's name for messages.
        in_use: apply patches that ComfyUI adds only during computation: LoRAs in low-memory modes (`--lowvram`,
            `--novram`).

    Raises:
        IdentityEditError: for a quantized weight that cannot be converted.
    """
    weight = getattr(module, name)
    plain = plain_weight(module, name, weight)
    # A layer that scales its weight itself (scaled float8 of older versions) would scale a plain one again.
    if plain is None or (plain is not weight and type(weight.data) is torch.Tensor):
        raise IdentityEditError(
            f"The weight {key} is stored in a quantized form that cannot be trained; choose 'low rank', where the node "
            f"offers it, or load the checkpoint in float16, bfloat16 or float32."
        )
    copy = plain.detach().to(torch.float32, copy=True)
    for function in getattr(module, f"{name}_function", ()) if in_use else ():
        copy = function(copy)
    return copy


@contextlib.contextmanager
def _trained_modules(modules: Sequence[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Make modules trainable on a device, and freeze and move them to the CPU at the end."""
    try:
        for module in modules:
            module.to(device).requires_grad_(True)
        yield
    finally:
        for module in modules:
            module.requires_grad_(False).to("cpu")


@contextlib.contextmanager
def _float32_variables(model: torch.nn.Module, keys: Iterable[str]) -> Iterator[Trained]:
    """Replace each parameter by a float32 copy that requires a gradient."""
    variables: dict[str, torch.nn.Parameter] = {}
    originals: dict[str, torch.Tensor] = {}

    def change(key: str) -> torch.Tensor:
        before = originals[key]
        before = before.detach() if type(before.data) is torch.Tensor else before.dequantize()
        # PyTorch cannot subtract float8 tensors (`--fp8_e4m3fn-unet`).
        return variables[key].detach() - before.to(torch.float32)

    try:
        for key in keys:
            path, _, name = key.rpartition(".")
            module = model.get_submodule(path)
            originals[key] = getattr(module, name)
            variables[key] = torch.nn.Parameter(float32_weight(module, name, key))
            setattr(module, name, variables[key])
        yield variables, {key: partial(change, key) for key in variables}
    finally:
        for key, before in originals.items():
            path, _, name = key.rpartition(".")
            setattr(model.get_submodule(path), name, before)


@contextlib.contextmanager
def _low_rank_variables(model: torch.nn.Module, keys: Iterable[str], rank: int, seed: int) -> Iterator[Trained]:
    """Add B A x to the output W x of each weight's linear layer, with B = 0 and A ~ N(0, 1 / r^2) at the start, as
    diffusers initializes LoRAs; alpha is r.

    The layer computes W x itself, so W may have any format.
    """
    variables: dict[str, torch.nn.Parameter] = {}
    changes: dict[str, Callable[[], torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(seed % 2**63)
    handles = []
    try:
        for key in keys:
            layer = model.get_submodule(key.removesuffix(".weight"))
            device = next(layer.parameters()).device
            outputs, inputs = weight_shapes(layer)["weight"]
            down = torch.nn.Parameter((torch.randn(rank, inputs, generator=generator) / rank).to(device))
            up = torch.nn.Parameter(torch.zeros(outputs, rank, device=device))
            variables |= {f"{key}.down": down, f"{key}.up": up}
            changes[key] = partial(_product, up, down)
            handles.append(layer.register_forward_hook(partial(_add_product, up, down)))
        yield variables, changes
    finally:
        for handle in handles:
            handle.remove()


def _product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return up.detach() @ down.detach()


def _add_product(
    up: torch.Tensor, down: torch.Tensor, _: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    return output + linear(linear(inputs[0].to(down.dtype), down), up).to(output.dtype)
