"""ComfyUI's dynamic VRAM on the device in host memory: an imitation of comfy-aimdo, which needs a graphics card.

ComfyUI's own ModelPatcherDynamic and casting of weights run as they are. What the imitation has of aimdo: weights lie
in pages that can be taken back whenever they are not pinned, a model that finds no room gets none, and then its weights
come through buffers that the next layers use again. A page that is taken back is filled with NaN, where a graphics card
would have no memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import comfy.cli_args
import comfy.memory_management
import comfy.model_management as management
import comfy.model_patcher as patchers
import comfy_aimdo.host_buffer
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import comfy_aimdo.vram_buffer
import torch

CPU = torch.device("cpu")
GIB = 2**30
CAST_BUFFER = 64 * 2**20


class Page:
    """A weight's place: `signature` changes whenever it is filled anew and is None while it is not there."""

    def __init__(self, reservation: Reservation, offset: int, size: int) -> None:
        self.reservation, self.offset, self.size = reservation, offset, size
        self.signature: int | None = None
        self.pins = 0


class Room:
    """The device's memory for weights.

    Attributes:
        budget: bytes that pages may take together.
        resident: the pages that are there.
        evictions, refusals: how often a page was taken back, and how often there was no room for one.
    """

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.budget = device, budget
        self.resident: list[Page] = []
        self.evictions = self.refusals = self._filled = 0

    def fault(self, allocation: tuple[Reservation, int, int]) -> int | None:
        """Pin a page that is there or for which there is room -> its signature."""
        reservation, offset, size = allocation
        page = reservation.pages.setdefault(offset, Page(reservation, offset, size))
        if page.signature is None:
            if sum(other.size for other in self.resident) + size > self.budget:
                self.refusals += 1
                return None
            self._filled += 1
            page.signature = self._filled
            self.resident.append(page)
        page.pins += 1
        return page.signature

    @staticmethod
    def unpin(allocation: tuple[Reservation, int, int] | None) -> None:
        page = None if allocation is None else allocation[0].pages.get(allocation[1])
        if page is not None and page.pins:
            page.pins -= 1

    def evict(self, reservation: Reservation | None = None, most: float = float("inf")) -> int:
        """Take back pages that nobody holds, of one model or of all, up to `most` bytes -> their bytes."""
        freed = 0
        for page in list(self.resident):
            if freed >= most:
                break
            if page.pins or reservation not in (None, page.reservation):
                continue
            with torch.inference_mode(False):
                # All bits set are NaN in every floating type.
                page.reservation.memory[page.offset : page.offset + page.size].fill_(255)
            page.signature = None
            self.resident.remove(page)
            self.evictions += 1
            freed += page.size
        return freed


class Reservation:
    """aimdo's ModelVBAR: the addresses of a model's weights."""

    def __init__(self, room: Room, size: float) -> None:
        self.room, self.pages, self._end = room, dict[int, Page](), 0
        self.memory = bytes_on(room.device, int(size))

    def alloc(self, size: int) -> tuple[Reservation, int, int]:
        offset = (self._end + 511) & ~511
        self._end = offset + size
        return self, offset, size

    def loaded_size(self) -> int:
        return sum(page.size for page in self.pages.values() if page.signature is not None)

    def free_memory(self, size: float) -> int:
        return self.room.evict(self, size)

    def prioritize(self) -> None:
        pass

    def deprioritize(self) -> None:
        pass


class CastBuffer:
    """aimdo's VRAMBuffer: what a stream brings weights through for which there is no room."""

    def __init__(self, device: torch.device) -> None:
        self.memory = bytes_on(device, CAST_BUFFER)

    def size(self) -> int:
        return CAST_BUFFER

    def get(self, size: int, offset: int = 0) -> tuple[CastBuffer, int, int]:
        return self, offset, size


class HostBuffer:
    """aimdo's pinned memory: there is none."""

    def __init__(self, *_: Any) -> None:
        self.size = 0

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.size = size


class Stream:
    """A second queue of a device that does everything at once."""

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    @staticmethod
    def as_context(stream: Any) -> Any:
        return contextlib.nullcontext()


def bytes_on(device: torch.device, size: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=torch.uint8, device=device)


def tensor_at(allocation: tuple[Any, int, int], device: torch.device) -> torch.Tensor:
    """A new tensor over a place: an inference tensor where the first to use it is in inference mode, as aimdo's are."""
    owner, offset, size = allocation
    return torch.empty(0, dtype=torch.uint8, device=device).set_(owner.memory.untyped_storage(), offset, (size,), (1,))


def set_data(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """`parameter.data = value` from one device to another, which PyTorch allows between those that it knows."""
    if parameter.device == value.device:
        torch.Tensor.data.__set__(parameter, value)  # type: ignore[attr-defined]
    else:
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(value, requires_grad=parameter.requires_grad))


@contextlib.contextmanager
def dynamic_vram(
    device: torch.device,
    *,
    budget: float = float("inf"),
    streams: int = 0,
    evict_before_backward: bool = False,
    free: float = 16 * GIB,
) -> Iterator[Room]:
    """ComfyUI as it is on a graphics card with dynamic VRAM.

    Args:
        device: the device in host memory.
        budget: bytes that weights may take on it.
        streams: that bring weights; ComfyUI has two on NVIDIA. Each has a buffer, which the next layer uses again.
        evict_before_backward: take back all weights between forward and backward pass, as aimdo does where the
            activations need their room.
        free: bytes that the device says it has.
    """
    room = Room(device, budget)
    backward, grad = torch.autograd.backward, torch.autograd.grad

    def evicting(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            room.evict()
            return function(*args, **kwargs)

        return called

    def memory(device: Any = None, torch_free_too: bool = False, torch_total_too: bool = False) -> Any:
        return (free, free) if torch_free_too or torch_total_too else free

    of_streams = {device: [Stream() for _ in range(streams)]} if streams else {}
    now = Stream()
    replaced: list[tuple[Any, dict[str, Any]]] = [
        (
            comfy_aimdo.model_vbar,
            {
                "ModelVBAR": lambda size, device: Reservation(room, size),
                "vbar_fault": room.fault,
                "vbar_unpin": room.unpin,
                "vbar_signature_compare": lambda first, second: first is not None and first == second,
                "vbars_analyze": lambda device=None: 0,
                "vbars_reset_watermark_limits": lambda: None,
            },
        ),
        (comfy_aimdo.torch, {"aimdo_to_tensor": tensor_at}),
        (comfy_aimdo.vram_buffer, {"VRAMBuffer": lambda size, device: CastBuffer(room.device)}),
        (comfy_aimdo.host_buffer, {"HostBuffer": HostBuffer}),
        (comfy.cli_args.args, {"disable_pinned_memory": True}),
        (comfy.memory_management, {"aimdo_enabled": True}),
        (patchers, {"CoreModelPatcher": patchers.ModelPatcherDynamic}),
        (
            management,
            {
                "get_free_memory": memory,
                "get_total_memory": memory,
                "get_torch_device": lambda: device,
                "get_torch_device_name": str,
                "text_encoder_device": lambda: device,
                "vae_device": lambda: device,
                "unet_offload_device": lambda: CPU,
                "text_encoder_offload_device": lambda: CPU,
                "vae_offload_device": lambda: CPU,
                "intermediate_device": lambda: CPU,
                "vram_state": management.VRAMState.NORMAL_VRAM,
                "soft_empty_cache": lambda force=False: None,
                "synchronize": lambda: None,
                "NUM_STREAMS": streams,
                "STREAMS": of_streams,
                "current_stream": lambda device: now,
            },
        ),
        (torch.nn.Parameter, {"data": property(torch.Tensor.data.__get__, set_data)}),  # type: ignore[attr-defined]
    ]
    if evict_before_backward:
        replaced.append((torch.autograd, {"backward": evicting(backward), "grad": evicting(grad)}))
    with contextlib.ExitStack() as stack:
        for owner, names in replaced:
            for name, value in names.items():
                stack.enter_context(patch.object(owner, name, value))
        try:
            yield room
        finally:
            management.unload_all_models()


@contextlib.contextmanager
def plain_models() -> Iterator[None]:
    """Models that are made in here have their weights at once, which ComfyUI's loaders give them from a file."""
    with (
        patch.object(comfy.memory_management, "aimdo_enabled", False),
        patch.object(patchers, "CoreModelPatcher", patchers.ModelPatcher),
    ):
        yield


def on_device(patcher: Any, device: torch.device) -> Any:
    """A dynamic patcher of the same network with its weights on the processor, as from a file."""
    patcher.model.to(CPU)
    patcher.model.device = None
    return patchers.ModelPatcherDynamic(patcher.model, load_device=device, offload_device=CPU)
