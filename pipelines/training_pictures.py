"""Pictures as a training sees them: latents with captions and masks, batches of one size, and the denoising loss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .engine.trainable import TrainableNetworks
from .errors import IdentityEditError
from .masks import masks_for, of_size
from .pictures import encoded
from .schedule import DiscreteSampling
from .training import generator_of


@dataclass(frozen=True)
class TrainingPictures:
    """Encoded pictures; the lists have one entry for each picture.

    Attributes:
        latents: z_0 of each picture [C, h, w] float32 CPU, in the scale of LATENT sockets; the sizes may differ.
        captions: what each picture shows.
        masks: for each picture [h, w] float32 CPU, 1 where its loss counts; None where all of it counts.
        fingerprint: hexadecimal digits that name these pictures, captions and masks.
    """

    latents: list[torch.Tensor]
    captions: list[str]
    masks: list[torch.Tensor | None]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class Batch:
    """Pictures of one size: z_0 [B, C, h, w] in the model's scale, B captions, masks [B, 1, h, w]."""

    latents: torch.Tensor
    captions: list[str]
    masks: torch.Tensor


def encode_pictures(
    vae: Any,
    pictures: Sequence[torch.Tensor],
    captions: Sequence[str],
    masks: Sequence[torch.Tensor | None] | None = None,
) -> TrainingPictures:
    """Encode every picture once, each at its own size cut to a multiple of 8 pixels as VAE Encode does.

    Args:
        vae: VAE of the checkpoint.
        pictures: [H, W, 3] float32, 0 to 1.
        captions: one for each picture.
        masks: [H, W], 1 on the subject, or None; averaged to the latent's resolution.

    Raises:
        IdentityEditError: when there is no picture, a caption is missing, a mask is empty, or a latent is of a video or
            not finite.
    """
    masks = list(masks) if masks is not None else [None] * len(pictures)
    if not pictures:
        raise IdentityEditError("There is no picture to train on; connect at least one.")
    if not len(pictures) == len(captions) == len(masks):
        raise IdentityEditError(
            f"There are {len(pictures)} pictures, {len(captions)} captions and {len(masks)} masks; give one caption, "
            f"and a mask or none, for each picture."
        )
    digest = hashlib.sha256()
    latents, small_masks = [], []
    for number, (picture, caption, mask) in enumerate(zip(pictures, captions, masks, strict=True), start=1):
        height, width = picture.shape[:2]
        latent = encoded(vae, picture[None], f"Picture {number}")[0].clone()
        latents.append(latent)
        small_masks.append(None if mask is None else _latent_mask(mask, picture, latent, number))
        # The picture and not its latent: encoding it again need not give the same bits.
        for part in (picture, mask):
            if part is not None:
                digest.update((part * 255).round().clamp(0, 255).to(torch.uint8).cpu().contiguous().numpy().tobytes())
        digest.update(f"{height} {width} {mask is not None} {caption}".encode())
    return TrainingPictures(latents, list(captions), small_masks, digest.hexdigest()[:16])


def _latent_mask(mask: torch.Tensor, picture: torch.Tensor, latent: torch.Tensor, number: int) -> torch.Tensor:
    of_picture = masks_for(mask, f"The mask of picture {number}", picture.shape[0], picture.shape[1], 1)
    small = of_size(of_picture, latent.shape[1], latent.shape[2])[0].clone()
    if not float(small.sum()) > 0.0:
        raise IdentityEditError(f"The mask of picture {number} is empty; paint the subject white, or remove the mask.")
    return small


def batch_indices(pictures: TrainingPictures, batch_size: int, index: int, seed: int, what: str) -> list[int]:
    """Which pictures batch `index` (from 0) holds: always of one size, every picture once in a round.

    A round goes through all sizes in a random order, drawn from the seed and the number of the round. Where the
    pictures of a size do not fill their last batch, it is filled with others of them.
    """
    sizes: dict[tuple[int, ...], list[int]] = {}
    for number, latent in enumerate(pictures.latents):
        sizes.setdefault(tuple(latent.shape), []).append(number)
    in_a_round = sum(-(-len(members) // batch_size) for members in sizes.values())
    generator = generator_of(seed, index // in_a_round, f"order of {what}")
    batches = []
    for members in sizes.values():
        order = [members[place] for place in torch.randperm(len(members), generator=generator).tolist()]
        for start in range(0, len(order), batch_size):
            batches.append([order[(start + offset) % len(order)] for offset in range(batch_size)])
    return batches[int(torch.randperm(in_a_round, generator=generator)[index % in_a_round])]


def draw_batch(pictures: TrainingPictures, chosen: list[int], to_model_scale: Any, device: torch.device) -> Batch:
    """The chosen pictures, of one size, on a device; `to_model_scale` is `engine.to_model_scale` of the model."""
    latents = torch.stack([pictures.latents[number] for number in chosen])
    masks = [pictures.masks[number] for number in chosen]
    whole = torch.ones(latents.shape[2:])
    return Batch(
        latents=to_model_scale(latents).to(device),
        captions=[pictures.captions[number] for number in chosen],
        masks=torch.stack([whole if mask is None else mask for mask in masks])[:, None].to(device),
    )


def draw_noise(batch: Batch, levels: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [B] of the model's noise levels drawn uniformly and noise of the batch's shape, both on the CPU."""
    t = torch.randint(levels, (batch.latents.shape[0],), generator=generator)
    return t, torch.randn(batch.latents.shape, generator=generator)


def denoising_losses(
    networks: TrainableNetworks,
    sampling: DiscreteSampling,
    prediction: str,
    batch: Batch,
    t: torch.Tensor,
    noise: torch.Tensor,
    min_snr_gamma: float = 0.0,
) -> torch.Tensor:
    """The loss that diffusion models are trained with, for each picture of a batch [B].

    With z_0 the latent, eps the noise and x = z_0 + sigma_t eps in ComfyUI's scale, it is the mean over the mask of
    |eps_theta - eps|^2, or of |v_theta - v|^2 for models that predict velocity.

    Args:
        networks: evaluates the captions and the network.
        sampling: the model's sampling object.
        prediction: "eps" or "v".
        batch: what to denoise.
        t: [B] rows of the model's noise levels (timesteps, where it is not distilled).
        noise: eps [B, C, h, w].
        min_snr_gamma: min-SNR weights of Hang et al. 2023, who use 5; 0 weights every timestep equally, as Ho et al.
            2020 and LIPE do.
    """
    text = networks.encode(batch.captions)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return networks.denoised(x, sigma, text)

    return losses_of(denoise, sampling, prediction, batch.latents, batch.masks, t, noise, min_snr_gamma)


def losses_of(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    sampling: DiscreteSampling,
    prediction: str,
    latents: torch.Tensor,
    masks: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    min_snr_gamma: float = 0.0,
) -> torch.Tensor:
    """As `denoising_losses`, for any `denoise(x, sigma)` that estimates z_0 [B, C, h, w] of x at noise levels [B].

    `latents` [B, C, h, w] are in the model's scale, `masks` [B, 1, h, w].
    """
    sigma = sampling.sigmas.detach().to(device=latents.device, dtype=torch.float32)[t.to(latents.device)]
    eps = noise.to(latents.device)
    level = sigma.reshape(-1, 1, 1, 1)
    x = latents + level * eps
    denoised = denoise(x, sigma).float()
    error = (x - denoised) / level - eps  # eps_theta - eps
    if prediction == "v":
        error = error * torch.sqrt(1.0 + level**2)  # v_theta - v: v = (eps - sigma z_0) / sqrt(1 + sigma^2)
    channels = error.shape[1]
    loss = (masks * error.square()).sum(dim=(1, 2, 3)) / (channels * masks.sum(dim=(1, 2, 3)))
    if min_snr_gamma > 0.0:
        snr = 1.0 / sigma**2
        loss = loss * snr.clamp(max=min_snr_gamma) / (snr + 1.0 if prediction == "v" else snr)
    return loss
