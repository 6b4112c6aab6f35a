"""Attention sites of transformers with joint attention over text and image in one sequence (Flux, Stable Diffusion 3):
text tokens first, then the image's 2x2 patches row by row, then any reference images.

The hook is `optimized_attention_override` of the transformer options: every block calls it with queries and keys after
norms and rotary embeddings, and values, and projects its output. There is only one slot, so a previous override is
called in place of the model's attention. The override is set during one network call, by an APPLY_MODEL wrapper, where
the latent's size and the number of text tokens are known. Flux passes the block's index; Stable Diffusion 3 does not,
so its calls are counted.

Read on ComfyUI 0.3.75 and 0.33.0: comfy/ldm/modules/attention.py (wrap_attn), comfy/ldm/flux/model.py and layers.py,
comfy/ldm/modules/diffusionmodules/mmdit.py, comfy/model_base.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.patcher_extension import WrappersMP
from einops import rearrange

from .errors import IdentityEditError
from .maps import heads_apart
from .sites import Attended, Site

_OVERRIDE = "optimized_attention_override"

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The model's attention of queries, keys and values [B, heads, N, d]; returns [B, N, heads * d] before projection."""

Tap = Callable[[Site, Attended, torch.Tensor, Attend, Mapping[str, Any]], torch.Tensor]
"""Replaces each joint attention. Called with the site, queries and keys, values [B, heads, M, d], original attention
and the transformer options (`cond_or_uncond`, `uuids`); returns the attention output before projection. A read-only tap
returns `attend(attended.query, attended.key, value)`, which is bit-identical."""


def joint_sites(network: Any) -> list[Site]:
    """All blocks with joint attention in the order in which they run, with ComfyUI's keys ("double" or "single",
    number, 0).

    Raises:
        IdentityEditError: for an unsupported network.
    """
    if isinstance(network, Flux):
        blocks = {"double": len(network.double_blocks), "single": len(network.single_blocks)}
    elif isinstance(network, MMDiT):
        blocks = {"double": len(network.joint_blocks)}
    else:
        raise IdentityEditError(
            f"The model's network is a {type(network).__name__}, whose joint attention cannot be read; load a Flux or "
            f"Stable Diffusion 3 checkpoint."
        )
    return [Site((kind, number, 0), network.patch_size) for kind, count in blocks.items() for number in range(count)]


def with_tap(model: Any, key: str, tap: Tap) -> Any:
    """A clone of a MODEL in which every joint attention is replaced by `tap`.

    Args:
        model: MODEL; not modified.
        key: name of the wrapper.
        tap: see `Tap`. Separate attention of the image or the text, as in some blocks of Stable Diffusion 3.5, is not
            affected.

    Raises:
        IdentityEditError: for an unsupported network; while sampling, when another node skips blocks without indices or
            masks the attention.
    """
    sites = joint_sites(model.get_model_object("diffusion_model"))

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
        previous = transformer_options.get(_OVERRIDE)
        call = _NetworkCall(sites, tap, previous, c_crossattn.shape[1], (x.shape[-2], x.shape[-1]))
        options = {**transformer_options, _OVERRIDE: call}
        result = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        call.check_count()
        return result

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, apply_model)
    return clone


class _NetworkCall:
    """The attention override of one network call."""

    def __init__(self, sites: Sequence[Site], tap: Tap, previous: Any, text: int, size: tuple[int, int]) -> None:
        self._sites = list(sites)
        self._by_key = {site.key: site for site in sites}
        self._tap, self._previous = tap, previous
        self._text, self._size = text, size
        self._counted: int | None = None

    def __call__(
        self, function: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        original = function if self._previous is None else partial(self._previous, function)
        heads_are_split = kwargs.get("skip_reshape", False)
        grid = self._sites[0].grid(*self._size)
        image = slice(self._text, self._text + grid[0] * grid[1])
        if q.shape[-2] < image.stop:
            return original(q, k, v, heads, *args, **kwargs)
        if (args[0] if args else kwargs.get("mask")) is not None:
            raise IdentityEditError(
                "The joint attention of text and image is masked and cannot be read; remove the node that masks it."
            )
        options = kwargs.get("transformer_options") or {}

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if not heads_are_split:
                query, key, value = (rearrange(each, "b h n d -> b n (h d)") for each in (query, key, value))
            return original(query, key, value, heads, *args, **kwargs)

        if not heads_are_split:  # Stable Diffusion 3 passes values [B, N, heads, d] beside queries [B, N, heads * d]
            q, k, v = (heads_apart(each.flatten(2), heads) for each in (q, k, v))
        attended = Attended(q, k, grid, text=slice(0, self._text), image=image)
        return self._tap(self._site(options), attended, v, attend, options)

    def _site(self, options: Mapping[str, Any]) -> Site:
        if "block_type" in options:
            return self._by_key[options["block_type"], options["block_index"], 0]
        number = self._counted = 0 if self._counted is None else self._counted + 1
        self.check_count(at_the_end=False)
        return self._sites[number]

    def check_count(self, at_the_end: bool = True) -> None:
        """Raise `IdentityEditError` if calls were counted and their number differs from the network's."""
        if self._counted is None:
            return
        count = self._counted + 1
        if count > len(self._sites) or (at_the_end and count < len(self._sites)):
            raise IdentityEditError(
                f"The model has {len(self._sites)} blocks with joint attention but {count} ran, so they cannot be "
                f"identified; remove the node that skips or repeats blocks (such as skip layer guidance)."
            )
