"""Gradients through frozen networks: the torch-only part of `engine.gradient_context`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .errors import IdentityEditError

_SEARCH_DEPTH = 6


@contextlib.contextmanager
def plain_frozen_tensors(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Let autograd pass through `modules`: no parameter requires a gradient, none is an inference tensor.

    Autograd cannot save tensors created in `torch.inference_mode` for the backward pass. Within this context, such
    parameters and buffers are replaced by ordinary tensors that share their memory.
    """
    replaced: list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]] = []
    frozen: list[torch.Tensor] = []
    try:
        for module in {id(part): part for root in modules for part in root.modules()}.values():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if not _can_be_saved_for_backward(tensor):
                    plain = _plain_tensor(tensor)
                    if isinstance(tensor, torch.nn.Parameter):
                        plain = torch.nn.Parameter(plain, requires_grad=False)
                    setattr(module, name, plain)
                    replaced.append((module, name, tensor, plain))
                elif tensor.requires_grad and tensor.is_leaf:
                    tensor.requires_grad_(False)
                    frozen.append(tensor)
        yield
    finally:
        for module, name, original, plain in replaced:
            if getattr(module, name, None) is plain:
                setattr(module, name, original)
        for tensor in frozen:
            tensor.requires_grad_(True)


def _can_be_saved_for_backward(tensor: torch.Tensor) -> bool:
    # `is_inference()` is not enough: after `.data = ` or Module.to() it is False although autograd rejects the tensor.
    try:
        tensor._version  # noqa: B018  (reading it is the test)
    except RuntimeError:
        return False
    return not tensor.is_inference()


def _plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor.data) is not torch.Tensor:  # quantized and other subclasses know how to copy themselves
        return tensor.detach().clone()
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


@contextlib.contextmanager
def inputs_survive_changes_in_place(model: torch.nn.Module) -> Iterator[None]:
    """Make networks differentiable that add to their residual stream in place (`x += ...`): Flux, Chroma, and some text
    encoders.

    A normalization saves its input for the backward pass, and autograd raises an error if it was modified since; each
    normalization therefore gets a copy. The context must last until after the backward pass: with checkpointing, blocks
    run again there.
    """

    def copy_input(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (torch.is_grad_enabled() and inputs[0].requires_grad):
            return None
        return (inputs[0].clone(), *inputs[1:])

    normalizations = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    handles = [module.register_forward_pre_hook(copy_input) for module in normalizations]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def checkpointed_blocks(blocks: Iterable[torch.nn.Module], *, change_inputs: bool = False) -> Iterator[None]:
    """Gradient checkpointing: recompute these blocks in the backward pass instead of storing activations.

    A UNet writes its current position ("block", "transformer_index"...) into the options dictionary that it passes to
    its blocks, so in the backward pass every block would read the last position. Each block therefore stores a copy of
    its dictionaries from the forward pass.

    Args:
        blocks: modules of one network, none inside another.
        change_inputs: whether they may change their input tensors in place; they then work on copies.
    """
    originals: list[tuple[torch.nn.Module, bool, Any]] = []
    try:
        for block in blocks:
            originals.append((block, "forward" in vars(block), block.forward))
            block.forward = _checkpointed(block.forward, _copied if change_inputs else _copy_of_dictionary)
        yield
    finally:
        for block, was_replaced, forward in originals:
            if was_replaced:  # by another node, before this context
                block.forward = forward
            else:
                del block.forward


def _checkpointed(forward: Callable[..., Any], copied: Callable[[Any], Any]) -> Callable[..., Any]:
    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        args_then = [_copy_of_dictionary(value) for value in args]
        kwargs_then = {key: _copy_of_dictionary(value) for key, value in kwargs.items()}

        def run(*tensors_and_options: Any) -> Any:
            # Runs in the forward and again in the backward pass, each time with fresh copies: blocks write into them.
            copies = {key: copied(value) for key, value in kwargs_then.items()}
            return forward(*[copied(value) for value in tensors_and_options], **copies)

        return checkpoint(run, *args_then, use_reentrant=False)

    return checkpointed_forward


def _copy_of_dictionary(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else _copy_of_dictionary(value)


def modules_in(value: Any) -> list[torch.nn.Module]:
    """Modules referenced by other nodes' patches: in dictionaries, lists, closures, bound methods and attributes.

    For example, an adapter's projection layers are held by a patch function in the model options, not by the model.
    """
    found: dict[int, torch.nn.Module] = {}
    seen: set[int] = set()

    def search(item: Any, left: int) -> None:
        if left < 0 or id(item) in seen or isinstance(item, (str, bytes, int, float, torch.Tensor, type)):
            return
        seen.add(id(item))
        if isinstance(item, torch.nn.Module):
            found[id(item)] = item
        elif isinstance(item, dict):
            for part in item.values():
                search(part, left - 1)
        elif isinstance(item, (list, tuple, set)):
            for part in item:
                search(part, left - 1)
        else:
            search(getattr(item, "__self__", None), left - 1)
            for cell in getattr(item, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # an empty closure cell
                    search(cell.cell_contents, left - 1)
            search(getattr(item, "__dict__", None), left - 1)

    search(value, _SEARCH_DEPTH)
    return list(found.values())


_PACK = __name__.rsplit(".", 3)[0]


def autograd_safe_options(model_options: dict[str, Any]) -> dict[str, Any]:
    """Model options in which other nodes' patches cannot break autograd.

    Some patches modify tensors that the backward pass needs: their arguments, or intermediate results (FreeU multiplies
    part of the hidden state by its mean, in place). Each patch therefore gets copies of its arguments, and tensors that
    autograd saves inside it are copied too. This pack's patches never write in place and are left alone: they may
    contain the weights being trained, and copying these every step would cost time and memory.
    """

    def safe(patch: Callable[..., Any]) -> Callable[..., Any]:
        def safe_patch(*args: Any, **kwargs: Any) -> Any:
            copies = {key: _copy_with_gradient(value) for key, value in kwargs.items()}
            with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach().clone(), lambda copy: copy):
                return patch(*map(_copy_with_gradient, args), **copies)

        return safe_patch

    options = model_options.get("transformer_options", {})
    patches = {
        name: [safe(patch) if callable(patch) and not _is_from_this_pack(patch) else patch for patch in entries]
        for name, entries in options.get("patches", {}).items()
    }
    return {**model_options, "transformer_options": {**options, "patches": patches}}


def _is_from_this_pack(patch: Callable[..., Any]) -> bool:
    return str(getattr(patch, "__module__", "")).startswith((f"{_PACK}.attention.", f"{_PACK}.pipelines."))


def _copy_with_gradient(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) and value.requires_grad else value


def gradients_by_sample(loss: torch.Tensor, output: torch.Tensor, variables: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a sum of per-sample losses, with per-sample gradient scaling for float16 networks.

    The gradient at the network's output is scaled to about one by a power of two per sample, and the result scaled
    back: exact in float32, and without underflow in float16.

    Args:
        loss: scalar, the sum of the samples' losses.
        output: the network's output [B, C, H, W], between `variables` and `loss` in the graph.
        variables: B tensors; the b-th affects sample b only.

    Returns:
        B gradients in float32, zero for a sample that the loss does not contain.

    Raises:
        IdentityEditError: when a gradient is not finite.
    """
    if not output.requires_grad:
        raise IdentityEditError(
            "The conditioning to optimize does not apply at this noise level; remove its timestep range."
        )
    (at_output,) = torch.autograd.grad(loss, output)
    largest = at_output.flatten(1).abs().amax(dim=1)
    exponent = torch.floor(torch.log2(largest.clamp(min=torch.finfo(torch.float32).tiny)))
    scale = torch.exp2(-torch.where(largest > 0, exponent, torch.zeros_like(exponent)))
    scaled = torch.autograd.grad(
        output, variables, grad_outputs=at_output * scale.view(-1, *[1] * (at_output.ndim - 1))
    )
    gradients = [gradient.float() / scale[index] for index, gradient in enumerate(scaled)]
    if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        raise IdentityEditError(
            "The gradient contains NaN or infinite values; lower the learning rate, or start ComfyUI with --bf16-unet "
            "or --fp32-unet."
        )
    return gradients


def differentiable_attention(
    pytorch_attention: Callable[..., torch.Tensor], previous: Callable[..., torch.Tensor] | None
) -> Callable[..., torch.Tensor]:
    """An attention override that uses PyTorch's attention whenever a gradient is needed.

    Other attention functions may have no backward pass, or only part of the gradient (queries and keys quantized,
    values not), and neither the function nor its result reveals this, so none of them is used for gradients.

    Args:
        pytorch_attention: ComfyUI's attention of that name.
        previous: another node's override, or None; used where no gradient is needed.

    Returns:
        a function for `transformer_options["optimized_attention_override"]`.
    """

    def override(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        inputs = (*args, *kwargs.values())
        if torch.is_grad_enabled() and any(getattr(value, "requires_grad", False) for value in inputs):
            return pytorch_attention(*args, **kwargs)
        return previous(function, *args, **kwargs) if previous is not None else function(*args, **kwargs)

    return override
