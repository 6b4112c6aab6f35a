"""Tiny models with their linear layers quantized, as ComfyUI loads such checkpoints, and as GGUF packs do.

Formats of ComfyUI's own need an engine that has them: see `formats`. GGUF is no format of ComfyUI's; its packs bring
layers that keep a weight as bytes and a ModelPatcher that hands LoRAs to them, and both are made here in small.
"""

from __future__ import annotations

import json
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

GGUF = "GGUF-like"
NAMES = {"int8_tensorwise": "int8", "float8_e4m3fn": "scaled float8", "nvfp4": "nvfp4"}
"""ComfyUI's name of a format, and the usual one."""


def formats() -> list[str]:
    """The formats that this ComfyUI reads, GGUF-like among them."""
    try:
        import comfy_kitchen  # noqa: F401  (the kernels)
        from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

        own = [name for name in NAMES if name in QUANT_ALGOS and hasattr(QuantizedTensor, "from_float")]
    except ImportError:
        own = []
    return [*own, GGUF]


def quantized(patcher: Any, kind: str) -> comfy.model_patcher.ModelPatcher:
    """A model with every linear layer in a quantized form: the same weights but for rounding. The given one is no
    longer to be used."""
    if kind == GGUF:
        _with_layers_of_bytes(patcher.model.diffusion_model)
        return GGUFLikePatcher(patcher.model, patcher.load_device, patcher.offload_device)
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    network = patcher.model.diffusion_model
    layers = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    weights: dict[str, torch.Tensor] = {}
    for key, value in network.state_dict().items():
        layer, _, part = key.rpartition(".")
        value = value.to(torch.bfloat16)
        if layer in layers and part == "weight":
            weights |= QuantizedTensor.from_float(value, QUANT_ALGOS[kind]["comfy_tensor_layout"]).state_dict(key)
            description = json.dumps({"format": kind}).encode()
            weights[f"{layer}.comfy_quant"] = torch.tensor(list(description), dtype=torch.uint8)
        else:
            weights[key] = value
    of_patcher = patcher.model.model_config
    config = type(of_patcher)(dict(of_patcher.unet_config))
    config.unet_config.update(of_patcher.unet_config)  # in place of the family's own sizes
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(torch.bfloat16, torch.float32)
    model = type(patcher.model)(config, model_type=patcher.model.model_type, device=torch.device("cpu"))
    missing = model.diffusion_model.load_state_dict(weights, strict=False).missing_keys
    assert not missing, missing
    return comfy.model_patcher.ModelPatcher(model.eval(), patcher.load_device, patcher.offload_device)


class Bytes(torch.Tensor):
    """A weight as bytes, which answers with the shape of the numbers in it."""

    of_numbers: torch.Size

    def __new__(cls, data: torch.Tensor, of_numbers: torch.Size) -> Bytes:
        made = data.as_subclass(cls)
        made.of_numbers = of_numbers
        return made

    def to(self, *args: Any, **kwargs: Any) -> Bytes:
        return Bytes(self.as_subclass(torch.Tensor).to(*args, **kwargs), self.of_numbers)

    def clone(self, *args: Any, **kwargs: Any) -> Bytes:
        return self

    def detach(self) -> Bytes:
        return self

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return getattr(self, "of_numbers", self.size())


class LayerOfBytes(comfy.ops.manual_cast.Linear):
    """Eight bits a number, with a float16 scale in front of each row."""

    patches: tuple[list[Any], str] | None = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):  # for memory estimates only
            if parameter is not None:
                destination[prefix + name] = torch.zeros(parameter.size(), device="meta", dtype=parameter.dtype)

    def forward_comfy_cast_weights(self, x: torch.Tensor) -> torch.Tensor:
        data = self.weight.as_subclass(torch.Tensor)
        weight = (data[:, 2:].float() - 128.0) * data[:, :2].contiguous().view(torch.float16).float()
        if self.patches is not None:
            weight = comfy.lora.calculate_weight(self.patches[0], weight, self.patches[1])
        for function in self.weight_function:
            weight = function(weight)
        return torch.nn.functional.linear(x, weight.to(x.dtype), self.bias)


class GGUFLikePatcher(comfy.model_patcher.ModelPatcher):
    """Hands a LoRA to the layer, which adds it to the numbers."""

    def patch_weight_to_device(self, key: str, device_to: Any = None, inplace_update: bool = False) -> Any:
        if key not in self.patches:
            return None
        path, _, name = key.rpartition(".")
        layer = self.model.get_submodule(path)
        if name == "weight" and isinstance(layer, LayerOfBytes):
            layer.patches = self.patches[key], key
            return None
        return super().patch_weight_to_device(key, device_to, inplace_update)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        if unpatch_weights:
            for module in self.model.modules():
                if isinstance(module, LayerOfBytes):
                    module.patches = None
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)


def _with_layers_of_bytes(network: torch.nn.Module) -> None:
    for module in list(network.modules()):
        for name, linear in list(module.named_children()):
            if not isinstance(linear, torch.nn.Linear):
                continue
            weight = linear.weight.detach()
            scale = weight.abs().amax(dim=1, keepdim=True) / 127.0
            numbers = ((weight / scale).round() + 128.0).clamp(1, 255).to(torch.uint8)
            data = torch.cat([scale.to(torch.float16).view(torch.uint8), numbers], dim=1)
            layer = LayerOfBytes(linear.in_features, linear.out_features, linear.bias is not None)
            layer.weight = torch.nn.Parameter(Bytes(data, weight.shape), requires_grad=False)
            layer.bias = linear.bias
            layer.comfy_cast_weights = True
            setattr(module, name, layer)
