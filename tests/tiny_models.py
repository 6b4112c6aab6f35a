"""Stable Diffusion's architectures at a size that a test runs in milliseconds, with random weights.

The models are ComfyUI's own classes (BaseModel or SDXL, UNetModel, ModelPatcher) in float32 on the CPU; conditionings
are random embeddings. For the SD1-like one there is a twin in diffusers with the same weights.
"""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch

CONTEXT = 32
TOKENS = 8
POOLED = 16


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far apart two samples are, in parts of their size. A random network's samples may lie in the thousands, and
    one processor rounds otherwise than another, also by the size of the batch: what is the same but for rounding
    differs by less than 1e-5."""
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())


def _unet_config(**changes: Any) -> dict[str, Any]:
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "context_dim": CONTEXT,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "use_spatial_transformer": True,
        "legacy": False,
    }
    return {**config, **changes}


def _patcher(model: Any, seed: int, output_gain: float) -> comfy.model_patcher.ModelPatcher:
    """A random network depends on its text far more than a trained one; `output_gain` scales its output, and with it
    that effect, so that an inversion is as exact and null-text optimization as quick as with a trained one."""
    _draw_weights(model, seed)
    with torch.no_grad():
        for parameter in model.diffusion_model.out[2].parameters():
            parameter.mul_(output_gain)
    model.eval()
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    """ComfyUI's operations leave their memory as they find it: draw every weight, of a size that keeps signals up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn / parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):  # of a normalization
                parameter.copy_(1.0 + 0.1 * drawn)
            else:
                parameter.copy_(0.1 * drawn)


def sd1(
    seed: int = 0, dtype: torch.dtype = torch.float32, output_gain: float = 1.0, **unet: Any
) -> comfy.model_patcher.ModelPatcher:
    """Like SD1.x: eps-prediction, eight heads, convolutions around the transformers."""
    config = comfy.supported_models.SD15(_unet_config(**unet))
    config.set_inference_dtype(dtype, None)
    model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.EPS, device=torch.device("cpu"))
    return _patcher(model, seed, output_gain)


def sd2_v(seed: int = 0, zero_snr: bool = False, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    """Like SD2.x: v-prediction, linear layers around the transformers; `zero_snr` for the rescaled schedule."""
    config = comfy.supported_models.SD20(_unet_config(use_linear_in_transformer=True))
    config.unet_config["num_head_channels"] = 16
    config.sampling_settings["zsnr"] = zero_snr
    config.set_inference_dtype(torch.float32, None)
    kind = comfy.model_base.ModelType.V_PREDICTION
    model = comfy.model_base.BaseModel(config, model_type=kind, device=torch.device("cpu"))
    return _patcher(model, seed, output_gain)


def sdxl(seed: int = 0, output_gain: float = 1.0) -> comfy.model_patcher.ModelPatcher:
    """Like SDXL: pooled output and sizes as vector conditioning, no transformer at the latent's resolution."""
    return _like_sdxl(comfy.supported_models.SDXL, comfy.model_base.SDXL, 6 * 256, seed, output_gain)


def sdxl_refiner(seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """Like SDXL's refiner, whose vector conditioning is the pooled output, two sizes and a score."""
    return _like_sdxl(comfy.supported_models.SDXLRefiner, comfy.model_base.SDXLRefiner, 5 * 256, seed, 1.0)


def _like_sdxl(
    supported: Any, base: Any, behind_the_pooled_output: int, seed: int, output_gain: float
) -> comfy.model_patcher.ModelPatcher:
    unet = _unet_config(
        use_linear_in_transformer=True,
        transformer_depth=[0, 2],
        transformer_depth_output=[0, 0, 2, 2],
        transformer_depth_middle=2,
        adm_in_channels=POOLED + behind_the_pooled_output,
        num_classes="sequential",
    )
    config = supported(unet)
    config.unet_config["num_head_channels"] = 16
    config.set_inference_dtype(torch.float32, None)
    return _patcher(base(config, device=torch.device("cpu")), seed, output_gain)


FAMILIES: dict[str, Any] = {"sd1": sd1, "sd2_v": sd2_v, "sdxl": sdxl}


def conditioning(seed: int, batch: int = 1, tokens: int = TOKENS, channels: int = CONTEXT) -> list[Any]:
    """A CONDITIONING with a random embedding, and a pooled output for the models that take one."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(batch, tokens, channels, generator=generator)
    return [[embedding, {"pooled_output": torch.randn(batch, POOLED, generator=generator)}]]


def near(conditioning_: list[Any], distance: float, seed: int) -> list[Any]:
    """A CONDITIONING whose embedding is `distance` (per element) away from another's."""
    embedding, options = conditioning_[0]
    step = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(seed))
    return [[embedding + distance * step, dict(options)]]


def latent(seed: int, batch: int = 1, height: int = 8, width: int = 8) -> torch.Tensor:
    """An image's latent in the scale of LATENT sockets (Stable Diffusion's have a deviation of about 5)."""
    return 5.0 * torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def diffusers_twin(patcher: comfy.model_patcher.ModelPatcher) -> Any:
    """diffusers' UNet2DConditionModel with the weights of an `sd1` model."""
    from diffusers import UNet2DConditionModel

    network = patcher.model.diffusion_model
    config = _unet_config()
    twin = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=CONTEXT,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    names = comfy.utils.unet_to_diffusers(config)
    ours = network.state_dict()
    weights = {theirs: ours[name] for theirs, name in names.items() if theirs in twin.state_dict() and name in ours}
    twin.load_state_dict({name: weight.clone() for name, weight in weights.items()}, strict=True)
    return twin.eval()
