"""Training batches: latents with captions and masks, the denoising loss, and previews."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..engine.families.noise import V, training_error
from ..engine.trainable import Text, TrainableNetworks
from ..shared.comfy_types import Vae
from ..shared.errors import IdentityEditError
from ..shared.images import encoded
from ..shared.masks import masks_for, of_size
from .loop import TrainingSettings, generator_of


@dataclass(frozen=True)
class TrainingImages:
    """Encoded images; the lists have one entry for each image.

    Attributes:
        latents: z_0 of each image [C, h, w] float32 CPU, in the scale of LATENT sockets; the sizes may differ.
        captions: caption of each image.
        masks: loss mask of each image [h, w] float32 CPU, or None for the whole image.
        fingerprint: hexadecimal hash of the images, captions and masks.
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
    """B images of one size with their noise.

    Attributes:
        latents: z_0 [B, C, h, w] in the model's scale.
        masks: [B, 1, h, w], loss masks.
        t: [B] rows of the model's noise levels (timesteps, unless it is distilled).
        noise: eps [B, C, h, w].
        captions: caption of each image.
        chosen: indices of the images.
    """

    latents: torch.Tensor
    masks: torch.Tensor
    t: torch.Tensor
    noise: torch.Tensor
    captions: Sequence[str] = ()
    chosen: Sequence[int] = ()


def encode_images(
    vae: Vae,
    images: Sequence[torch.Tensor],
    captions: Sequence[str],
    masks: Sequence[torch.Tensor | None] | None = None,
) -> TrainingImages:
    """Encode images, each at its own size, cropped to multiples of 8 pixels like VAE Encode.

    Args:
        vae: VAE of the checkpoint.
        images: [H, W, 3] float32, 0 to 1.
        captions: one for each image.
        masks: [H, W], 1 on the subject, or None; averaged to the latent's resolution.

    Raises:
        IdentityEditError: for no images, a missing caption, an empty mask, or invalid latents.
    """
    masks = list(masks) if masks is not None else [None] * len(images)
    if not images:
        raise IdentityEditError("There is no image to train on; connect at least one.")
    if not len(images) == len(captions) == len(masks):
        raise IdentityEditError(
            f"There are {len(images)} images, {len(captions)} captions and {len(masks)} masks; provide one caption and "
            f"at most one mask per image."
        )
    digest = hashlib.sha256()
    latents, small_masks = [], []
    for number, (image, caption, mask) in enumerate(zip(images, captions, masks, strict=True), start=1):
        height, width = image.shape[:2]
        latent = encoded(vae, image[None], f"Image {number}")[0].clone()
        latents.append(latent)
        small_masks.append(None if mask is None else _latent_mask(mask, image, latent, number))
        # Hash the image, not the latent, because encoding is not exactly reproducible.
        for part in (image, mask):
            if part is not None:
                digest.update((part * 255).round().clamp(0, 255).to(torch.uint8).cpu().contiguous().numpy().tobytes())
        digest.update(f"{height} {width} {mask is not None} {caption}".encode())
    return TrainingImages(latents, list(captions), small_masks, digest.hexdigest()[:16])


def _latent_mask(mask: torch.Tensor, image: torch.Tensor, latent: torch.Tensor, number: int) -> torch.Tensor:
    image_mask = masks_for(mask, f"The mask of image {number}", image.shape[0], image.shape[1], 1)
    small = of_size(image_mask, latent.shape[1], latent.shape[2])[0].clone()
    if not float(small.sum()) > 0.0:
        raise IdentityEditError(f"The mask of image {number} is empty; paint the subject white, or remove the mask.")
    return small


def batch_indices(images: TrainingImages, batch_size: int, index: int, seed: int, what: str) -> list[int]:
    """Image indices of batch `index` (from 0): all of one size, and every image once per epoch.

    An epoch contains all sizes in random order, drawn from the seed and the epoch's number. If the images of a size do
    not fill their last batch, some are repeated.
    """
    sizes: dict[tuple[int, ...], list[int]] = {}
    for number, latent in enumerate(images.latents):
        sizes.setdefault(tuple(latent.shape), []).append(number)
    epoch = sum(-(-len(members) // batch_size) for members in sizes.values())  # batches
    generator = generator_of(seed, index // epoch, f"order of {what}")
    batches = []
    for members in sizes.values():
        order = [members[place] for place in torch.randperm(len(members), generator=generator).tolist()]
        for start in range(0, len(order), batch_size):
            batches.append([order[(start + offset) % len(order)] for offset in range(batch_size)])
    return batches[int(torch.randperm(epoch, generator=generator)[index % epoch])]


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
    """Batch `index` of a run, with uniformly drawn timesteps.

    Args:
        networks: the trained networks.
        images: the training images.
        settings: batch size and seed.
        index: from 0.
        what: name of the random stream; draws depend only on it, the seed and the index.
        masked: whether to use the images' masks.
        generator: for timesteps and noise, instead of that of `what`.
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
    """Raise `IdentityEditError` if the loss is masked but no image has a mask."""
    if masked and all(mask is None for mask in masks):
        raise IdentityEditError("masked_loss is on but no image has a mask; add masks, or turn it off.")


def denoising_losses(
    networks: TrainableNetworks,
    batch: Batch,
    text: Text,
    *,
    source: torch.Tensor | None = None,
    min_snr_gamma: float = 0.0,
) -> torch.Tensor:
    """The denoising loss of each image of a batch [B].

    With z_0 the latent, eps the noise and x = z_0 + sigma_t eps in ComfyUI's scale, it is the mean over the mask of
    |eps_theta - eps|^2, or of |v_theta - v|^2 for models with v prediction.

    Args:
        networks: the trained networks.
        batch: the batch.
        text, source: see `TrainableNetworks.denoised`.
        min_snr_gamma: gamma of min-SNR weighting (Hang et al. 2023, who use 5); 0 weights all timesteps equally, as in
            Ho et al. 2020 and LIPE.
    """
    eps = batch.noise
    sigma = networks.sampling.sigmas.detach().to(device=eps.device, dtype=torch.float32)[batch.t]
    level = sigma.reshape(-1, 1, 1, 1)
    path, prediction = networks.family.noise_path, networks.family.prediction
    x = path.noised(batch.latents, eps, level)
    denoised = networks.denoised(x, sigma, text, source).float()
    error = training_error(prediction, batch.latents, eps, level, denoised)
    channels = error.shape[1]
    loss = (batch.masks * error.square()).sum(dim=(1, 2, 3)) / (channels * batch.masks.sum(dim=(1, 2, 3)))
    if min_snr_gamma > 0.0:
        snr = path.alpha(sigma) ** 2 / sigma**2
        # min(snr, gamma) weights the error of z_0; those of the noise and of a velocity are 1 / sigma times as large.
        loss = loss * snr.clamp(max=min_snr_gamma) / (snr + 1.0 if prediction == V else 1.0 / sigma**2)
    return loss


def preview(
    networks: TrainableNetworks,
    latent_shape: Sequence[int],
    settings: TrainingSettings,
    estimate: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    """Sample a preview with DDIM from the current networks, with noise of the run's seed.

    Args:
        networks: the trained networks.
        latent_shape: (C, h, w).
        settings: preview steps and seed.
        estimate: (x [1, C, h, w], sigma, timestep) -> the guided estimate of z_0.

    Returns:
        [1, C, h, w] in the scale of LATENT sockets.
    """
    schedule = networks.family.schedule(settings.sample_steps, end_at_zero=True)
    sigmas = schedule.sigmas.to(networks.device)
    noise = torch.randn((1, *latent_shape), generator=generator_of(settings.seed, 0, "sample"))
    x = sigmas[0] * noise.to(networks.device)
    for t, sigma, sigma_next in zip(schedule.timesteps.tolist(), sigmas[:-1], sigmas[1:], strict=True):
        x = networks.family.noise_path.step(x, estimate(x, sigma, t), sigma, sigma_next)
    return networks.to_socket_scale(x)


def guided_preview(
    networks: TrainableNetworks,
    latent_shape: Sequence[int],
    settings: TrainingSettings,
    text_at: Callable[[int], Text],
) -> torch.Tensor:
    """`preview` with classifier-free guidance; `text_at(timestep)` is a batch of the prompt and the empty prompt."""

    def estimate(x: torch.Tensor, sigma: torch.Tensor, t: int) -> torch.Tensor:
        both = networks.denoised(torch.cat([x, x]), sigma.expand(2), text_at(t)).float()
        return both[1:] + settings.sample_guidance_scale * (both[:1] - both[1:])

    return preview(networks, latent_shape, settings, estimate)
