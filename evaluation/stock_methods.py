"""Editing with ComfyUI's own nodes alone: image-to-image, SDEdit, InstructPix2Pix."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd
import torch

from ..benchmarks.edits import embed
from .cases import EditCase
from .method import PREPARATION, Checkpoint, Method, MethodSettings


@torch.no_grad()
def img2img(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """VAE Encode and KSampler: `steps` deterministic steps over the last `strength` of the schedule."""
    return _by_ksampler(checkpoint, case, settings, "ddim", settings.steps)


@torch.no_grad()
def sdedit(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """Meng et al. 2022: the reverse SDE, which draws new noise in every step, where image-to-image follows the ODE.

    Its steps are those of the whole schedule, of which t_0 = `strength` remain (algorithm 3, variance preserving), so
    that it has fewer of them than image-to-image.
    """
    return _by_ksampler(checkpoint, case, settings, "ddpm", round(settings.strength * settings.steps))


def _by_ksampler(
    checkpoint: Checkpoint, case: EditCase, settings: MethodSettings, sampler: str, steps: int
) -> torch.Tensor:
    latent = checkpoint.vae.encode(case.load_image(checkpoint.size))
    positive, negative = embed(checkpoint.clip, [case.target_prompt]), embed(checkpoint.clip, [""])
    made = comfy.sample.sample(
        checkpoint.model, comfy.sample.prepare_noise(latent, settings.seed), steps, settings.guidance_scale, sampler,
        "ddim_uniform", positive, negative, latent, denoise=settings.strength, disable_pbar=True, seed=settings.seed,
    )  # fmt: skip
    return checkpoint.vae.decode(made).cpu()


def eight_channel_checkpoint(settings: MethodSettings, checkpoint: Checkpoint) -> Checkpoint:
    """A UNet that also sees the source image's latent, with the checkpoint's text encoder and VAE."""
    path = settings.mcdm
    assert path is not None

    def load() -> Checkpoint:
        model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
        return dataclasses.replace(checkpoint, model=model, path=path)

    return settings.work.once(("checkpoint", path), load, PREPARATION)


@torch.no_grad()
def instruct_pix2pix(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """InstructPixToPixConditioning and DualCFGGuider (Brooks et al. 2023, eq. 3)."""
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG
    from comfy_extras.nodes_ip2p import InstructPixToPixConditioning

    edit = eight_channel_checkpoint(settings, checkpoint)
    text, empty = embed(edit.clip, [case.instruction]), embed(edit.clip, [""])
    with_image = InstructPixToPixConditioning.execute(text, empty, case.load_image(edit.size), edit.vae)
    positive, middle, latent = with_image.result
    guider: Any = Guider_DualCFG(edit.model)
    guider.set_conds(positive, middle, empty)
    guider.set_cfg(settings.guidance_scale, settings.image_guidance_scale)
    zeros = latent["samples"]
    sampling = edit.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", settings.steps)
    noise = comfy.sample.prepare_noise(zeros, settings.seed)
    sampler = comfy.samplers.sampler_object("ddim")
    return edit.vae.decode(guider.sample(noise, zeros, sampler, sigmas, disable_pbar=True, seed=settings.seed)).cpu()


METHODS = {
    "img2img": Method("stock", "VAE Encode and KSampler with the target prompt", "ComfyUI", img2img),
    "sdedit": Method("stock", "the same with the stochastic sampler of the paper", "Meng et al. 2022", sdedit),
    "instruct-pix2pix": Method(
        "stock",
        "DualCFGGuider with an eight-channel checkpoint",
        "Brooks et al. 2023",
        instruct_pix2pix,
        ("mcdm", "instruction"),
    ),
}
