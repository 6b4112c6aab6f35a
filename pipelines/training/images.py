"""Images as a training sees them: batches of latents with captions and masks, the denoising loss, and previews."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.families.noise import V, training_error
from ..engine.trainable import Text, TrainableNetworks
from ..shared.errors import IdentityEditError
from ..shared.images import encoded
from ..shared.masks import masks_for, of_size
from .loop import TrainingSettings, generator_of


@dataclass(frozen=True)
class TrainingImages:
    """Encoded images; the lists have one entry for each image.

    Attributes:
        latents: z_0 of each image [C, h, w] float32 CPU, in the scale of LATENT sockets; the sizes may differ.
        captions: what each image shows.
        masks: for each image [h, w] float32 CPU, 1 where its loss counts; None where all of it counts.
        fingerprint: hexadecimal digits that name these images, captions and masks.
    """

    latents: list[torch.Tensor]
    captions: list[str]
    masks: list[torch.Tensor | None]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def largest(self) -> torch.Size:
        """[C, h, w] of the largest latent."""
        return max(self.latents, key=torch.Tensor.numel).shape


@dataclass(frozen=True)
class Batch:
    """B images of one size with the noise that is put on them.

    Attributes:
        latents: z_0 [B, C, h, w] in the model's scale.
        masks: [B, 1, h, w], 1 where the loss counts.
        t: [B] rows of the model's noise levels (timesteps, where it is not distilled).
        noise: eps [B, C, h, w].
        captions: what each image shows.
        chosen: the images' numbers.
    """

    latents: torch.Tensor
    masks: torch.Tensor
    t: torch.Tensor
    noise: torch.Tensor
    captions: Sequence[str] = ()
    chosen: Sequence[int] = ()


def encode_images(
    vae: Any,
    images: Sequence[torch.Tensor],
    captions: Sequence[str],
    masks: Sequence[torch.Tensor | None] | None = None,
) -> TrainingImages:
    """Encode every image once, each at its own size cut to a multiple of 8 pixels as VAE Encode does.

    Args:
        vae: VAE of the checkpoint.
        images: [H, W, 3] float32, 0 to 1.
        captions: one for each image.
        masks: [H, W], 1 on the subject, or None; averaged to the latent's resolution.

    Raises:
        IdentityEditError: when there is no image, a caption is missing, a mask is empty, or a latent is of a video or
            not finite.
    """
    masks = list(masks) if masks is not None else [None] * len(images)
    if not images:
        raise IdentityEditError("There is no image to train on; connect at least one.")
    if not len(images) == len(captions) == len(masks):
        raise IdentityEditError(
            f"There are {len(images)} images, {len(captions)} captions and {len(masks)} masks; give one caption, "
            f"and a mask or none, for each image."
        )
    digest = hashlib.sha256()
    latents, small_masks = [], []
    for number, (image, caption, mask) in enumerate(zip(images, captions, masks, strict=True), start=1):
        height, width = image.shape[:2]
        latent = encoded(vae, image[None], f"Image {number}")[0].clone()
        latents.append(latent)
        small_masks.append(None if mask is None else _latent_mask(mask, image, latent, number))
        # The image and not its latent: encoding it again need not give the same bits.
        for part in (image, mask):
            if part is not None:
                digest.update((part * 255).round().clamp(0, 255).to(torch.uint8).cpu().contiguous().numpy().tobytes())
        digest.update(f"{height} {width} {mask is not None} {caption}".encode())
    return TrainingImages(latents, list(captions), small_masks, digest.hexdigest()[:16])


def _latent_mask(mask: torch.Tensor, image: torch.Tensor, latent: torch.Tensor, number: int) -> torch.Tensor:
    of_image = masks_for(mask, f"The mask of image {number}", image.shape[0], image.shape[1], 1)
    small = of_size(of_image, latent.shape[1], latent.shape[2])[0].clone()
    if not float(small.sum()) > 0.0:
        raise IdentityEditError(f"The mask of image {number} is empty; paint the subject white, or remove the mask.")
    return small


def batch_indices(images: TrainingImages, batch_size: int, index: int, seed: int, what: str) -> list[int]:
    """Which images batch `index` (from 0) holds: always of one size, every image once in a round.

    A round goes through all sizes in a random order, drawn from the seed and the number of the round. Where the
    images of a size do not fill their last batch, it is filled with others of them.
    """
    sizes: dict[tuple[int, ...], list[int]] = {}
    for number, latent in enumerate(images.latents):
        sizes.setdefault(tuple(latent.shape), []).append(number)
    in_a_round = sum(-(-len(members) // batch_size) for members in sizes.values())
    generator = generator_of(seed, index // in_a_round, f"order of {what}")
    batches = []
    for members in sizes.values():
        order = [members[place] for place in torch.randperm(len(members), generator=generator).tolist()]
        for start in range(0, len(order), batch_size):
            batches.append([order[(start + offset) % len(order)] for offset in range(batch_size)])
    return batches[int(torch.randperm(in_a_round, generator=generator)[index % in_a_round])]


def draw_batch(
    networks: TrainableNetworks,
    images: TrainingImages,
    settings: TrainingSettings,
    index: int,
    what: str,
    *,
    masked: bool,
    generator: torch.Generator | None = None,
) -> Batch:
    """Batch `index` of a run, with timesteps drawn uniformly.

    Args:
        networks: what it is for.
        images: what it is of.
        settings: the batch's size, and the seed.
        index: from 0.
        what: a name for the draws, which depend on the seed, the index and it alone.
        masked: whether the images' masks count.
        generator: for timesteps and noise, in the place of that of `what`.
    """
    chosen = batch_indices(images, settings.batch_size, index, settings.seed, what)
    latents = torch.stack([images.latents[number] for number in chosen])
    masks = [images.masks[number] if masked else None for number in chosen]
    whole = torch.ones(latents.shape[2:])
    generator = generator or generator_of(settings.seed, index, what)
    t = torch.randint(networks.sampling.sigmas.shape[0], (len(chosen),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    return Batch(
        latents=networks.to_model_scale(latents),
        masks=torch.stack([whole if mask is None else mask for mask in masks])[:, None].to(networks.device),
        t=t.to(networks.device),
        noise=noise.to(networks.device),
        captions=[images.captions[number] for number in chosen],
        chosen=chosen,
    )


def check_masks(masks: Sequence[torch.Tensor | None], masked: bool) -> None:
    """Raise `IdentityEditError` when the loss is to be counted inside the images' masks and there is none."""
    if masked and all(mask is None for mask in masks):
        raise IdentityEditError("masked_loss is on but no image has a mask; add masks, or switch it off.")


def denoising_losses(
    networks: TrainableNetworks,
    batch: Batch,
    text: Text,
    *,
    source: torch.Tensor | None = None,
    min_snr_gamma: float = 0.0,
) -> torch.Tensor:
    """The loss that diffusion models are trained with, for each image of a batch [B].

    With z_0 the latent, eps the noise and x = z_0 + sigma_t eps in ComfyUI's scale, it is the mean over the mask of
    |eps_theta - eps|^2, or of |v_theta - v|^2 for models that predict velocity.

    Args:
        networks: evaluates the network.
        batch: what to denoise.
        text, source: see `TrainableNetworks.denoised`.
        min_snr_gamma: min-SNR weights of Hang et al. 2023, who use 5; 0 weights every timestep equally, as Ho et al.
            2020 and LIPE do.
    """
    eps = batch.noise
    sigma = networks.sampling.sigmas.detach().to(device=eps.device, dtype=torch.float32)[batch.t]
    level = sigma.reshape(-1, 1, 1, 1)
    noise, prediction = networks.family.noise, networks.family.prediction
    x = noise.noised(batch.latents, eps, level)
    denoised = networks.denoised(x, sigma, text, source).float()
    error = training_error(prediction, batch.latents, eps, level, denoised)
    channels = error.shape[1]
    loss = (batch.masks * error.square()).sum(dim=(1, 2, 3)) / (channels * batch.masks.sum(dim=(1, 2, 3)))
    if min_snr_gamma > 0.0:
        snr = 1.0 / sigma**2
        loss = loss * snr.clamp(max=min_snr_gamma) / (snr + 1.0 if prediction == V else snr)
    return loss


def preview(
    networks: TrainableNetworks,
    latent_shape: Sequence[int],
    settings: TrainingSettings,
    estimate: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    """An image by DDIM from a noise of the run's seed, by the networks as they are now.

    Args:
        networks: what is trained.
        latent_shape: (C, h, w).
        settings: the steps and the seed.
        estimate: gives for x [1, C, h, w], its noise level sigma and the timestep the estimate of z_0, with guidance.

    Returns:
        [1, C, h, w] in the scale of LATENT sockets.
    """
    schedule = networks.family.schedule(settings.sample_steps, end_at_zero=True)
    sigmas = schedule.sigmas.to(networks.device)
    noise = torch.randn((1, *latent_shape), generator=generator_of(settings.seed, 0, "sample"))
    x = sigmas[0] * noise.to(networks.device)
    for t, sigma, sigma_next in zip(schedule.timesteps.tolist(), sigmas[:-1], sigmas[1:], strict=True):
        x = networks.family.noise.step(x, estimate(x, sigma, t), sigma, sigma_next)
    return networks.to_socket_scale(x)


def guided_preview(
    networks: TrainableNetworks,
    latent_shape: Sequence[int],
    settings: TrainingSettings,
    text_at: Callable[[int], Text],
) -> torch.Tensor:
    """`preview` with classifier-free guidance; `text_at` gives, at a timestep, the prompt's text and the empty one."""

    def estimate(x: torch.Tensor, sigma: torch.Tensor, t: int) -> torch.Tensor:
        both = networks.denoised(torch.cat([x, x]), sigma.expand(2), text_at(t)).float()
        return both[1:] + settings.sample_guidance_scale * (both[:1] - both[1:])

    return preview(networks, latent_shape, settings, estimate)
