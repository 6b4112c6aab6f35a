"""A Stable Diffusion 1.x checkpoint, as ComfyUI loaded it, for diffusers' pipelines: the same weights in float32.

UNet and text encoder are diffusers' and transformers' classes with ComfyUI's weights. The autoencoder is ComfyUI's own
behind diffusers' interface, so that it costs both the same and no difference comes from it. Works for the demo world's
small checkpoints and for any other of the family.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sd1_clip
import comfy.utils
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 77


class Encoded(SimpleNamespace):
    """The "distribution" of an autoencoder that draws nothing: every draw is its mean [B, C, h, w]."""

    mean: torch.Tensor

    def sample(self, generator: Any = None) -> torch.Tensor:
        return self.mean

    def mode(self) -> torch.Tensor:
        return self.mean


class Autoencoder(ModelMixin, ConfigMixin):
    """ComfyUI's VAE behind the interface of diffusers' AutoencoderKL."""

    @register_to_config
    def __init__(
        self, scaling_factor: float, block_out_channels: tuple[int, ...], latent_channels: int, sample_size: int
    ) -> None:
        super().__init__()
        # A module without parameters has no device and no dtype; pipelines ask for both.
        self.of_device = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        self.comfy: list[Any] = []  # in a list: a VAE is no module, and copies of this one share it

    @torch.no_grad()
    def encode(self, images: torch.Tensor, return_dict: bool = True) -> Any:
        """[B, 3, H, W] in [-1, 1]."""
        latent = self.comfy[0].encode((images / 2 + 0.5).permute(0, 2, 3, 1)).to(images)
        return AutoencoderKLOutput(latent_dist=Encoded(mean=latent))

    @torch.no_grad()
    def decode(self, latent: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """[B, C, h, w] as `encode` gives them."""
        images = (self.comfy[0].decode(latent) * 2 - 1).permute(0, 3, 1, 2).to(latent)
        return DecoderOutput(sample=images) if return_dict else (images,)


def unet(model: Any) -> UNet2DConditionModel:
    """diffusers' UNet with the weights of a MODEL of Stable Diffusion 1.x."""
    config = model.model.model_config.unet_config
    network = model.model.diffusion_model
    depth = config["transformer_depth"]
    per_block = config["num_res_blocks"][0]
    has_attention = [depth[index * per_block] > 0 for index in range(len(config["channel_mult"]))]
    twin = UNet2DConditionModel(
        sample_size=config["image_size"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=tuple(config["model_channels"] * factor for factor in config["channel_mult"]),
        layers_per_block=per_block,
        cross_attention_dim=config["context_dim"],
        attention_head_dim=config["num_heads"],  # diffusers' name for the number of heads
        down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in has_attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)),
    )
    names, ours, theirs = comfy.utils.unet_to_diffusers(config), network.state_dict(), twin.state_dict()
    weights = {name: ours[own].float().cpu() for name, own in names.items() if name in theirs and own in ours}
    twin.load_state_dict(weights, strict=True)
    return twin.eval().requires_grad_(False)


def text_encoder(clip: Any) -> CLIPTextModel:
    """transformers' CLIP with the weights of a CLIP of Stable Diffusion 1.x."""
    own = clip.cond_stage_model.clip_l.transformer
    layers = own.text_model.encoder.layers
    table = own.text_model.embeddings.token_embedding.weight
    twin = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=table.shape[0],
            hidden_size=table.shape[1],
            intermediate_size=layers[0].mlp.fc1.weight.shape[0],
            num_hidden_layers=len(layers),
            num_attention_heads=layers[0].self_attn.heads,
            projection_dim=table.shape[1],
            hidden_act="quick_gelu",
            # transformers takes an end-of-text id of 2 for its early configurations, whose padding it counts from.
            eos_token_id=49407,
            bos_token_id=49406,
        )
    )
    weights = {name: value.float().cpu() for name, value in own.state_dict().items() if name.startswith("text_model.")}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    if unexpected or [name for name in missing if not name.endswith("position_ids")]:
        raise ValueError(f"the text encoder lacks {missing} and has {unexpected}")
    return twin.eval().requires_grad_(False)


def tokenizer() -> CLIPTokenizer:
    """The one that ComfyUI brings."""
    from pathlib import Path

    folder = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=TOKENS)


def autoencoder(vae: Any, model: Any, size: int) -> Autoencoder:
    format_ = model.model.latent_format
    made = Autoencoder(
        scaling_factor=format_.scale_factor,
        block_out_channels=(1,) * 4,  # their number says how much smaller the latent is: 2 to the power of 3
        latent_channels=format_.latent_channels,
        sample_size=size,
    )
    made.comfy.append(vae)
    return made


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's, with the configuration of its published checkpoints."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def components(model: Any, clip: Any, vae: Any, size: int) -> dict[str, Any]:
    """What the pipelines of Stable Diffusion are made of, on ComfyUI's device."""
    device = comfy.model_management.get_torch_device()
    return {
        "vae": autoencoder(vae, model, size).to(device),
        "text_encoder": text_encoder(clip).to(device),
        "tokenizer": tokenizer(),
        "unet": unet(model).to(device),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }
