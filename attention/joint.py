"""Attention sites of transformers with joint attention over text and image in one sequence: Flux, Chroma, Stable
Diffusion 3, Qwen-Image, Lumina 2, Z-Image, OmniGen 2, AuraFlow, HiDream, Mage-Flow, Krea 2, JoyImage and Ideogram 4.

The hook is `optimized_attention_override` of the transformer options: every block calls it with queries and keys after
norms and rotary embeddings, and values, and projects its output. There is only one slot, so a previous override is
called in place of the model's attention. The override is set during one network call, by an APPLY_MODEL wrapper, where
the latent's size and the number of text tokens are known. Joint calls are recognized by their length and counted,
because most networks do not say which block calls; where a network does, the count follows its block indices.

Read on ComfyUI 0.3.75, 0.33.0 and 0.38.1: comfy/ldm/modules/attention.py (wrap_attn), the networks named below,
comfy/model_base.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy.sampler_helpers import convert_cond
from einops import rearrange

from .errors import IdentityEditError
from .maps import heads_apart
from .sites import Attended, Site, on_one_gpu

_OVERRIDE = "optimized_attention_override"


@dataclass(frozen=True)
class _Architecture:
    """A class of networks.

    Attributes:
        blocks: by kind, the attribute with its list of blocks with joint attention, in the order in which they run.
        sequence: the parts of the joint sequence in order; "" if they are padded (`_padded_layout`).
        patch: attribute with the side of an image position in latent pixels; "" if it is one pixel.
    """

    blocks: dict[str, str]
    sequence: str = "text image"
    patch: str = "patch_size"


_DOUBLE_AND_SINGLE = {"double": "double_blocks", "single": "single_blocks"}
_ARCHITECTURES = {
    "flux.model.Flux": _Architecture(_DOUBLE_AND_SINGLE, "text image references"),
    "chroma.model.Chroma": _Architecture(_DOUBLE_AND_SINGLE),
    "modules.diffusionmodules.mmdit.MMDiT": _Architecture({"double": "joint_blocks"}),
    "qwen_image.model.QwenImageTransformer2DModel": _Architecture(
        {"double": "transformer_blocks"}, "text image references"
    ),
    "mage_flow.model.MageFlowTransformer2DModel": _Architecture(
        {"double": "transformer_blocks"}, "text image references"
    ),
    "krea2.model.SingleStreamDiT": _Architecture({"single": "blocks"}, "text image references", "patch"),
    "lumina.model.NextDiT": _Architecture({"double": "layers"}, ""),
    "omnigen.omnigen2.OmniGen2Transformer2DModel": _Architecture({"double": "layers"}, "text references image"),
    "aura.mmdit.MMDiT": _Architecture(
        {"double": "double_layers", "single": "single_layers"}, "registers text image"
    ),
    "hidream.model.HiDreamImageTransformer2DModel": _Architecture(
        {"double": "double_stream_blocks", "single": "single_stream_blocks"}, "image text language_model"
    ),
    "joyimage.model.JoyImageTransformer3DModel": _Architecture({"double": "double_blocks"}, "image references text"),
    "ideogram4.model.Ideogram4Transformer2DModel": _Architecture({"double": "layers"}, patch=""),
}  # fmt: skip
"""By class below comfy.ldm; by name, because an engine need not have all of them."""

_SKIPPED_BLOCKS = {"double": "skip_mmdit", "single": "skip_dit"}
"""Attributes of Chroma with the numbers of the blocks that it does not run."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The model's attention of queries, keys and values [B, heads, N, d]; returns [B, N, heads * d] before projection."""

Tap = Callable[[Site, Attended, torch.Tensor, Attend, Mapping[str, Any]], torch.Tensor]
"""Replaces each joint attention. Called with the site, queries and keys, values [B, heads, M, d], original attention
and the transformer options (`cond_or_uncond`, `uuids`); returns the attention output before projection. A read-only tap
returns `attend(attended.query, attended.key, value)`, which is bit-identical."""


def _known_architecture(network: Any) -> _Architecture | None:
    names = (f"{kind.__module__}.{kind.__qualname__}".removeprefix("comfy.ldm.") for kind in type(network).__mro__)
    return next((_ARCHITECTURES[name] for name in names if name in _ARCHITECTURES), None)


def _architecture(network: Any) -> _Architecture:
    architecture = _known_architecture(network)
    if architecture is None:
        raise IdentityEditError(
            f"The model's network is a {type(network).__name__}, whose joint attention cannot be read; load a Flux, "
            f"Chroma, Stable Diffusion 3, Qwen-Image, Lumina 2, Z-Image, AuraFlow or HiDream checkpoint."
        )
    return architecture


def has_joint_attention(network: Any) -> bool:
    """Whether `joint_sites` supports a network."""
    return _known_architecture(network) is not None


def joint_sites(network: Any) -> list[Site]:
    """All blocks with joint attention in the order in which they run, with keys like ComfyUI's ("double" or "single",
    number, 0).

    Raises:
        IdentityEditError: for an unsupported network.
    """
    return [
        Site((kind, number, 0), patch_side(network))
        for kind, name in _architecture(network).blocks.items()
        for number in range(len(getattr(network, name)))
        if number not in getattr(network, _SKIPPED_BLOCKS[kind], ())
    ]


def with_tap(model: Any, key: str, tap: Tap, is_needed: Callable[[], bool] = lambda: True) -> Any:
    """A clone of a MODEL in which every joint attention is replaced by `tap`.

    Args:
        model: MODEL; not modified.
        key: name of the wrapper.
        tap: see `Tap`. Separate attention of the image or the text, as in some blocks of Stable Diffusion 3.5 and in
            the refiners of Lumina 2, is not affected.
        is_needed: whether a model call is tapped; all others run as without it, with any number of blocks.

    Raises:
        IdentityEditError: for an unsupported network; while sampling, when another node skips or repeats blocks without
            indices, or for inputs whose place in the sequence is unknown.
    """
    clone = model.clone()
    tapping = _tapping(model.get_model_object("diffusion_model"), tap, lambda options: is_needed())
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, tapping)
    return clone


def options_with_tap(model_options: dict[str, Any] | None, network: Any, key: str, tap: Tap) -> dict[str, Any]:
    """A copy of model options for one model call in which every joint attention is replaced by `tap`.

    A guidance function that evaluates the network once more with other blocks, such as skip layer guidance, is not
    tapped.
    """
    options = on_one_gpu(model_options)
    transformer = dict(options.get("transformer_options", {}))
    replaced = transformer.get("patches_replace", {})
    tapping = _tapping(network, tap, lambda options: options.get("patches_replace", {}) == replaced)
    wrappers = {kind: dict(by_key) for kind, by_key in transformer.get("wrappers", {}).items()}
    transformer["wrappers"] = wrappers
    add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, tapping, transformer)
    return {**options, "transformer_options": transformer}


@contextlib.contextmanager
def side_prompts(guider: Any, prompts: Mapping[str, list[Any]]) -> Iterator[None]:
    """Add CONDITIONINGs by name to a guider's, inside an OUTER_SAMPLE wrapper: ComfyUI prepares them like the sampled
    prompts."""
    guider.conds.update({name: convert_cond(prompt) for name, prompt in prompts.items()})
    try:
        yield
    finally:
        for name in prompts:
            guider.conds.pop(name, None)


def _tapping(
    network: Any, tap: Tap, is_needed: Callable[[Mapping[str, Any]], bool] = lambda options: True
) -> Callable[..., torch.Tensor]:
    """An APPLY_MODEL wrapper that sets the attention override where `is_needed`, by a call's transformer options."""
    sites = joint_sites(network)

    def apply_model(
        executor: Any,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: torch.Tensor | None,
        c_crossattn: torch.Tensor,
        control: Any,
        transformer_options: dict[str, Any],
        **kwargs: Any,
    ) -> torch.Tensor:
        if not is_needed(transformer_options):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        layout = _layout(network, x, c_crossattn.shape[1], kwargs)
        call = _NetworkCall(sites, layout, tap, transformer_options)
        result = executor(x, t, c_concat, c_crossattn, control, {**transformer_options, _OVERRIDE: call}, **kwargs)
        call.check_end()
        return result

    return apply_model


@dataclass(frozen=True)
class _Layout:
    """The joint sequence of one network call.

    Attributes:
        grid: rows and columns of the image positions.
        text: slice of the conditioning's tokens, without register and padding tokens.
        image: slice of the image positions.
        references: slices of the reference images.
        length: length of the whole sequence.
    """

    grid: tuple[int, int]
    text: slice
    image: slice
    references: tuple[slice, ...]
    length: int


def _layout(network: Any, x: torch.Tensor, text: int, conditions: Mapping[str, Any]) -> _Layout:
    """The joint sequence for latents x [B, C, h, w] or [B, C, 1, h, w] and `text` tokens."""
    sequence = _architecture(network).sequence
    if x.ndim == 5 and x.shape[2] != 1:
        raise IdentityEditError(
            f"The latent is a video of {x.shape[2]} frames, whose joint attention cannot be read; sample one image at "
            f"a time."
        )
    if "language_model" in sequence and conditions.get("image_cond") is not None:
        raise IdentityEditError(
            f"The place of reference images in the attention of a {type(network).__name__} is not known; remove the "
            f"reference image from the conditioning."
        )
    if not sequence:
        return _padded_layout(network, x, text, conditions)
    references = conditions.get("ref_latents") or ()
    if conditions.get("ref_latents_method", getattr(network, "default_ref_method", "")) is None:
        references = ()  # Krea 2 has checkpoints that take none
    lengths: dict[str, Callable[[], list[int]]] = {
        "text": lambda: [text],
        "image": lambda: [_positions(network, x)],
        "references": lambda: [_positions(network, reference) for reference in references],
        "registers": lambda: [network.register_tokens.shape[1]],
        "language_model": lambda: [2 * conditions["encoder_hidden_states_llama3"].shape[2]],
    }
    cursor = _Cursor()
    places = {part: [cursor.take(length) for length in lengths[part]()] for part in sequence.split()}
    of_references = tuple(places.get("references", ()))
    return _Layout(_grid(network, x), places["text"][0], places["image"][0], of_references, cursor.end)


def _padded_layout(network: Any, x: torch.Tensor, text: int, conditions: Mapping[str, Any]) -> _Layout:
    """The joint sequence of Lumina 2 and Z-Image, each part padded to a multiple: texts of the reference images, text,
    other texts, image features of each reference and of the image, reference images, image.

    Newer engines have tokens of a second text encoder behind the text (`direct_context`), and reference images behind
    the image (`ref_frames`), both padded with it (Ming-Image).
    """
    multiple = network.pad_tokens_multiple or 1
    references = conditions.get("ref_latents") or ()
    contexts = (conditions.get("ref_contexts") or ()) if references else ()
    features = (conditions.get("siglip_feats") or ())[: len(references)]
    more_text, frames = conditions.get("direct_context"), conditions.get("ref_frames") or ()
    cursor = _Cursor()
    for number in range(len(references)):
        cursor.take(contexts[number].shape[1] if number < len(contexts) else multiple, multiple)
    of_text = cursor.take(text)
    cursor.take(0 if more_text is None else more_text.shape[1])
    cursor.pad(of_text.start, multiple)
    for context in contexts[len(references) :]:
        cursor.take(context.shape[1], multiple)
    if references and network.siglip_embedder is not None:
        for number in range(len(references) + 1):
            size = features[number].shape[1] * features[number].shape[2] if number < len(features) else multiple
            cursor.take(size, multiple)
    of_references = [cursor.take(_positions(network, reference), multiple) for reference in references]
    of_image = cursor.take(_positions(network, x))
    of_references += [cursor.take(_positions(network, frame)) for frame in frames]
    cursor.pad(of_image.start, multiple)
    return _Layout(_grid(network, x), of_text, of_image, tuple(of_references), cursor.end)


class _Cursor:
    """Takes one part of a sequence after the other."""

    def __init__(self) -> None:
        self.end = 0

    def take(self, length: int, multiple: int = 1) -> slice:
        """The place of the next part, with padding to a multiple behind it."""
        place = slice(self.end, self.end + length)
        self.end = place.stop
        self.pad(place.start, multiple)
        return place

    def pad(self, start: int, multiple: int) -> None:
        """Pad what begins at `start` to a multiple."""
        self.end += -(self.end - start) % multiple


def patch_side(network: Any) -> int:
    """Latent pixels per image position along each side."""
    name = _architecture(network).patch
    side = getattr(network, name) if name else 1
    return int(side[-1]) if isinstance(side, (list, tuple)) else int(side)


def _grid(network: Any, latent: torch.Tensor) -> tuple[int, int]:
    side = patch_side(network)
    return -(-latent.shape[-2] // side), -(-latent.shape[-1] // side)


def _positions(network: Any, latent: torch.Tensor) -> int:
    rows, columns = _grid(network, latent)
    return rows * columns * (latent.shape[2] if latent.ndim == 5 else 1)


class _NetworkCall:
    """The attention override of one network call."""

    def __init__(self, sites: Sequence[Site], layout: _Layout, tap: Tap, options: Mapping[str, Any]) -> None:
        self._sites, self._layout, self._tap, self._options = list(sites), layout, tap, options
        self._numbers = {site.key: number for number, site in enumerate(sites)}
        self._previous = options.get(_OVERRIDE)
        self._last = -1  # number of the last block
        self._is_counted = False  # a block had no index

    def __call__(
        self, function: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        original = function if self._previous is None else partial(self._previous, function)
        if not q.shape[-2] == k.shape[-2] == self._layout.length:
            return original(q, k, v, heads, *args, **kwargs)
        heads_are_split = kwargs.get("skip_reshape", False)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if not heads_are_split:
                query, key, value = (rearrange(each, "b h n d -> b n (h d)") for each in (query, key, value))
            return original(query, key, value, heads, *args, **kwargs)

        if not heads_are_split:  # Stable Diffusion 3 passes values [B, N, heads, d] beside queries [B, N, heads * d]
            width = q.shape[-1] // heads
            q, k, v = (heads_apart(each.flatten(2), each.flatten(2).shape[-1] // width) for each in (q, k, v))
        layout, options = self._layout, {**self._options, **(kwargs.get("transformer_options") or {})}
        bias = _bias(args[0] if args else kwargs.get("mask"), q, k)
        attended = Attended(q, k, layout.grid, layout.text, layout.image, layout.references, bias)
        return self._tap(self._site(options), attended, v, attend, options)

    def _site(self, options: Mapping[str, Any]) -> Site:
        """The block that calls: by its index if the network sets one, else the next."""
        number = self._numbers.get((options.get("block_type", ""), options.get("block_index", -1), 0), -1)
        if number < 0:
            self._is_counted = True
            number = self._last + 1
        if number <= self._last or number >= len(self._sites):
            raise self._wrong_count(max(self._last + 2, len(self._sites) + 1))
        self._last = number
        return self._sites[number]

    def check_end(self) -> None:
        """Raise `IdentityEditError` if blocks were counted and fewer ran than the network has."""
        if self._is_counted and self._last + 1 < len(self._sites):
            raise self._wrong_count(self._last + 1)

    def _wrong_count(self, count: int) -> IdentityEditError:
        return IdentityEditError(
            f"The model has {len(self._sites)} blocks with joint attention but {count} ran, so they cannot be "
            f"identified; remove the node that skips or repeats blocks (such as skip layer guidance)."
        )


def _bias(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """An attention mask (boolean or additive) in PyTorch's meaning as a bias [B or 1, heads or 1, N or 1, M] of the
    logits, or None."""
    if mask is None:
        return None
    if mask.ndim < 4:
        mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
        mask = mask.unsqueeze(1)
    full = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if mask.ndim != 4 or any(size not in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
        raise IdentityEditError(
            f"The joint attention of text and image has a mask of shape {tuple(mask.shape)}, which cannot be read; "
            f"remove the node that masks it."
        )
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    return mask.float()
