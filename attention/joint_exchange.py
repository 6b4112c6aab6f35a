"""Exchange of image positions between the joint attention of a source and that of a target.

The source is evaluated and recorded first, then the target, matched by conditioning (ComfyUI's uuid), however ComfyUI
batches them. Only rows of image positions are exchanged, so the texts may differ in length: keys and values for mutual
self-attention (Cao et al. 2023), queries and keys for prompt-to-prompt (Shin et al. 2025). The model's own attention
function computes the result, and other owners of the hook stay in place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import IdentityEditError
from .joint import Attend, options_with_tap
from .mutual_self_attention import MutualMasks
from .prompt_to_prompt import SOURCE, TARGET, LocalBlend
from .sites import Attended, LayerKey, Site, of_source
from .unet import by_conditioning

_KEY = "identity_edit_joint_exchange"

ON_DEVICE = 256 * 2**20
"""Bytes of recorded rows that stay on the model's device; the rest waits in host memory. All blocks of Flux.1 at
1024x1024 have 2.9 GB of queries and keys."""


class _Recorded:
    """Recorded rows by block and conditioning."""

    def __init__(self) -> None:
        self._rows: dict[tuple[LayerKey, Any], tuple[torch.Tensor, ...]] = {}
        self._bytes = 0

    def add(self, key: LayerKey, uuid: Any, rows: tuple[torch.Tensor, ...]) -> None:
        if (key, uuid) in self._rows:
            return
        rows = tuple(each.contiguous() for each in rows)  # a view would keep the whole sequence
        self._bytes += sum(each.numel() * each.element_size() for each in rows)
        self._rows[key, uuid] = rows if self._bytes <= ON_DEVICE else tuple(each.cpu() for each in rows)

    def of(self, key: LayerKey, uuid: Any, target: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Rows as large as the target's, which a single source image may have to be repeated to; without a recorded
        source, the target's own."""
        rows = self._rows.get((key, uuid), target)
        return tuple(
            each.to(own).repeat(own.shape[0] // each.shape[0], 1, 1, 1) for each, own in zip(rows, target, strict=True)
        )

    def missing(self, keys: Collection[LayerKey]) -> list[LayerKey]:
        return [key for key in keys if all(recorded != key for recorded, _ in self._rows)]


@dataclass
class JointMutualAttention:
    """Mutual self-attention in one model call of the source and one of the target: image positions of the target attend
    to the source's image and to the target's own text.

    Attributes:
        network: the transformer.
        sites: the blocks in which keys and values are exchanged.
        masks: masks of the subject, see `MutualMasks`, or None. Text attends and is attended to as without masks.
        keeps_background: instead of masking the attention, exchange keys and values outside the target's mask alone
            (KV-Edit, Zhu et al. 2025).
    """

    network: Any
    sites: Mapping[LayerKey, Site]
    masks: MutualMasks | None = None
    keeps_background: bool = False
    _recorded: _Recorded = field(default_factory=_Recorded)

    def recording(self, model_options: dict[str, Any] | None) -> dict[str, Any]:
        """Model options for the source's model call; they do not change its result."""
        return options_with_tap(of_source(model_options), self.network, _KEY, self._record)

    def injecting(self, model_options: dict[str, Any] | None) -> dict[str, Any]:
        """Model options for the target's model call, after the source's."""
        return options_with_tap(model_options, self.network, _KEY, self._inject)

    def missing(self) -> list[LayerKey]:
        """Blocks that should have been recorded but were not."""
        return self._recorded.missing(self.sites)

    def _record(
        self, site: Site, attended: Attended, value: torch.Tensor, attend: Attend, options: Mapping[str, Any]
    ) -> torch.Tensor:
        if site.key in self.sites:
            for uuid, key, values in by_conditioning(options, attended.key, value):
                self._recorded.add(site.key, uuid, (key[:, :, attended.image], values[:, :, attended.image]))
        return attend(attended.query, attended.key, value)

    def _inject(
        self, site: Site, attended: Attended, value: torch.Tensor, attend: Attend, options: Mapping[str, Any]
    ) -> torch.Tensor:
        if site.key not in self.sites:
            return attend(attended.query, attended.key, value)
        key, value = attended.key.clone(), value.clone()
        for uuid, *target in by_conditioning(options, key[:, :, attended.image], value[:, :, attended.image]):
            rows = self._recorded.of(site.key, uuid, tuple(target))
            for own, source in zip(target, rows, strict=True):
                if self.keeps_background and self.masks is not None:
                    mask, (count, device) = self.masks.target, (own.shape[0], own.device)
                    edited = self.masks.on_grid(mask, uuid, attended.grid, count, device)
                    source = torch.where(edited[:, None, :, None], own, source)
                own.copy_(source)  # a view of the clones
        output = attend(attended.query, key, value)
        if self.masks is None or self.keeps_background:
            return output
        return self._masked(output, attended, key, value, attend, options)

    def _masked(
        self,
        output: torch.Tensor,
        attended: Attended,
        key: torch.Tensor,
        value: torch.Tensor,
        attend: Attend,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """The output with image positions inside the target's mask attending to image positions inside the source's
        mask, those outside to those outside, and all of them to the text."""
        assert self.masks is not None
        if attended.bias is not None:
            raise IdentityEditError(
                "Masks of mutual self-attention cannot be used while another node masks the joint attention; remove "
                "that node, or the masks."
            )
        output, uuids = output.clone(), options["uuids"]
        rows = output.shape[0] // len(uuids)
        for number, uuid in enumerate(uuids):
            source, target = (
                self.masks.on_grid(mask, uuid, attended.grid, rows, output.device)
                for mask in (self.masks.source, self.masks.target)
            )
            for image in range(rows):
                one = slice(number * rows + image, number * rows + image + 1)
                for kind in (False, True):
                    keys = torch.ones(key.shape[2], dtype=torch.bool, device=key.device)
                    if bool((source[image] == kind).any()):
                        keys[attended.image] = source[image] == kind
                    queries = torch.zeros(key.shape[2], dtype=torch.bool, device=key.device)
                    queries[attended.image] = target[image] == kind
                    if bool(queries.any()):
                        part = attend(attended.query[one][:, :, queries], key[one][:, :, keys], value[one][:, :, keys])
                        output[one, queries] = part
        return output


@dataclass
class JointControl:
    """Prompt-to-prompt in one model call of the source and one of the target (Shin et al. 2025): the target takes the
    source's queries and keys of image positions, and with them the layout; its values and its text are its own.

    Attributes:
        network: the transformer.
        sites: the blocks in which queries and keys are exchanged.
        entries: the controlled conditionings by uuid.
        height, width: the latent's size.
        blend: the local blend, or None.
        blend_sites: the blocks recorded for the local blend.
        counts: tokens of the source's and the target's prompt embedding.
    """

    network: Any
    sites: Mapping[LayerKey, Site]
    entries: Mapping[Any, dict[str, Any]]
    height: int
    width: int
    blend: LocalBlend | None = None
    blend_sites: Mapping[LayerKey, Site] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    _recorded: _Recorded = field(default_factory=_Recorded)

    def recording(self, model_options: dict[str, Any] | None) -> dict[str, Any]:
        """Model options for the source's model call; they do not change its result."""
        return options_with_tap(of_source(model_options), self.network, _KEY, self._record)

    def injecting(self, model_options: dict[str, Any] | None) -> dict[str, Any]:
        """Model options for the target's model call, after the source's.

        Raises:
            IdentityEditError: when blocks were not recorded.
        """
        if missing := self._recorded.missing(self.sites):
            raise IdentityEditError(
                f"Attention control could not record the blocks {missing}; remove the node that skips them."
            )
        return options_with_tap(model_options, self.network, _KEY, self._inject)

    def _record(
        self, site: Site, attended: Attended, value: torch.Tensor, attend: Attend, options: Mapping[str, Any]
    ) -> torch.Tensor:
        self._add_to_blend(SOURCE, site, attended, options)
        if site.key in self.sites:
            for uuid, query, key in by_conditioning(options, attended.query, attended.key):
                if uuid in self.entries:
                    self._recorded.add(site.key, uuid, (query[:, :, attended.image], key[:, :, attended.image]))
        return attend(attended.query, attended.key, value)

    def _inject(
        self, site: Site, attended: Attended, value: torch.Tensor, attend: Attend, options: Mapping[str, Any]
    ) -> torch.Tensor:
        self._add_to_blend(TARGET, site, attended, options)  # of the target's own queries and keys, as in its code
        if site.key not in self.sites:
            return attend(attended.query, attended.key, value)
        query, key = attended.query.clone(), attended.key.clone()
        for uuid, *target in by_conditioning(options, query[:, :, attended.image], key[:, :, attended.image]):
            rows = self._recorded.of(site.key, uuid, tuple(target))
            for own, source in zip(target, rows, strict=True):
                own.copy_(source)  # a view of the clones
        return attend(query, key, value)

    def _add_to_blend(self, of: str, site: Site, attended: Attended, options: Mapping[str, Any]) -> None:
        if self.blend is None or site.key not in self.blend_sites or not self.blend.columns[of]:
            return
        length = attended.text.stop - attended.text.start
        if length < self.counts[of]:
            raise IdentityEditError(
                f"The {of}'s conditioning has {length} tokens but its prompt has {self.counts[of]}; connect the "
                f"conditioning of the prompt that was used for attention control."
            )
        uuids = options["uuids"]
        rows = attended.query.shape[0] // len(uuids)
        with torch.no_grad():
            for number, uuid in enumerate(uuids):
                if uuid in self.entries:
                    # Flux.2 pads texts at the start; other nodes append tokens to the target's (Flux Redux).
                    own = self.counts[of] if of == SOURCE else self.entries[uuid]["cross_attn"].shape[1]
                    before = length - own
                    part = attended.part(slice(number * rows, (number + 1) * rows))
                    maps = part.to_text([before + column for column in self.blend.columns[of]]).flatten(1)
                    self.blend.add(of, maps, self.entries[uuid], self.height, self.width, attended.grid)
