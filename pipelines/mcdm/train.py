"""Training an MCDM on generated pairs (Chen et al. 2024, section 3.3 and supplement 1.2)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import engine
from ..engine.edit_model import as_edit_model, set_weights, unet_keys
from ..engine.trainable import Text, TrainableNetworks, joined_texts, trainable_networks
from ..engine.weights import first_numbers
from ..shared.errors import IdentityEditError
from ..shared.input_checks import check_choice
from ..training.images import Batch, denoising_losses, preview
from ..training.loop import (
    BFLOAT16,
    Progress,
    TrainingRun,
    TrainingSettings,
    generator_of,
    run_description,
    train,
    training_record,
)
from ..training.processes import OneProcess, Processes
from .encoded_pairs import EncodedPairs, PairFiles, encode_pairs, remove_encoded
from .guidance import IMAGE, NEGATIVE, POSITIVE, UNCONDITIONAL, GuidanceScales, mcdm_estimate
from .model import ALL_CONDITIONS, CONDITIONS, IMAGE_TOKENS, MCDM, ImageEmbedding, new_embedding

SPATIAL_BIT, IMAGE_BIT, TEXT_BIT = 1, 2, 4
_COMBINATIONS = SPATIAL_BIT + IMAGE_BIT + TEXT_BIT
"""Number of combinations of dropped conditions: the numbers 1 to 7, with one bit per condition."""

_UNET, _EMBEDDING = "unet.", "image_embedding."


@dataclass(frozen=True, kw_only=True)
class MCDMSettings(TrainingSettings):
    """Training settings; the defaults are those of Chen et al. 2024.

    Attributes:
        weight_decay: AdamW's default in torch and diffusers, with which Stable Diffusion was trained; not reported in
            the paper.
        ema_decay: Stable Diffusion's; "the training scheme is similar to Stable Diffusion", section 3.3.
        identity_share: share of the pairs in which p_b and x_B are replaced by p_a and x_A.
        dropout: probability that conditions of a pair are dropped: one of the seven combinations of c_s, c_im and c_p,
            drawn uniformly. The paper says "any combination of the following, or even all of them".
        image_tokens: see `ImageEmbedding`.
        conditions: the image conditions that the model learns, a key of `model.CONDITIONS`; the others always have
            their null value, as in the ablations of section 4.
    """

    steps: int = 200_000
    learning_rate: float = 5e-6
    batch_size: int = 4
    weight_decay: float = 0.01
    ema_decay: float = 0.9999
    precision: str = BFLOAT16
    checkpointing: bool = True
    identity_share: float = 0.05
    dropout: float = 0.2
    image_tokens: int = IMAGE_TOKENS
    conditions: str = ALL_CONDITIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_tokens < 0:
            raise IdentityEditError(f"image_tokens is {self.image_tokens}; choose 0 or more.")
        for name in ("identity_share", "dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise IdentityEditError(f"{name} is {getattr(self, name):g}; choose a share from 0 to 1.")
        check_choice(self.conditions, "conditions", CONDITIONS)

    @property
    def never_used(self) -> int:
        """Bits of the image conditions that are dropped from every pair."""
        image, spatial = CONDITIONS[self.conditions]
        return (0 if image else IMAGE_BIT) | (0 if spatial else SPATIAL_BIT)


@dataclass(frozen=True)
class TrainedMCDM:
    """The result of a training.

    Attributes:
        model: MODEL of the InstructPix2Pix family with the trained weights.
        mcdm: the contents of its file other than the UNet.
        weights: the trained weights in float32, by keys of `model.model.state_dict()`.
        encoded: the encoded pairs.
    """

    model: Any
    mcdm: MCDM
    weights: dict[str, torch.Tensor]
    encoded: EncodedPairs


@dataclass(frozen=True)
class MCDMBatch:
    """A training batch of B pairs.

    Attributes:
        chosen: indices of the pairs.
        reconstructs: [B], whether the source is also the target.
        dropped: [B], the dropped conditions as bits.
        t: [B], timesteps.
        noise: [B, C, h, w].
    """

    chosen: list[int]
    reconstructs: torch.Tensor
    dropped: torch.Tensor
    t: torch.Tensor
    noise: torch.Tensor


def draw_mcdm_batch(pairs: EncodedPairs, settings: MCDMSettings, timesteps: int, index: int) -> MCDMBatch:
    """Draw batch `index` (from 0); it depends only on the seed and the index. An epoch contains every pair once."""
    size, seed = settings.batch_size, settings.seed
    orders: dict[int, torch.Tensor] = {}
    chosen = []
    for position in range(index * size, (index + 1) * size):
        epoch, place = divmod(position, len(pairs))
        if epoch not in orders:
            orders[epoch] = torch.randperm(len(pairs), generator=generator_of(seed, epoch, "order of pairs"))
        chosen.append(int(orders[epoch][place]))
    generator = generator_of(seed, index, "draws of pairs")
    reconstructs = torch.rand(size, generator=generator) < settings.identity_share
    drops = torch.rand(size, generator=generator) < settings.dropout
    dropped = torch.randint(1, _COMBINATIONS + 1, (size,), generator=generator) * drops | settings.never_used
    t = torch.randint(timesteps, (size,), generator=generator)
    noise = torch.randn((size, *pairs.latent_shape), generator=generator)
    return MCDMBatch(chosen, reconstructs, dropped, t, noise)


def train_mcdm(
    model: Any,
    clip: Any,
    vae: Any,
    clip_vision: Any,
    pairs: Sequence[PairFiles],
    settings: MCDMSettings,
    folder: str,
    *,
    start: MCDM | None = None,
    sample_pair: PairFiles | None = None,
    progress: Progress | None = None,
    encoding_progress: Callable[[int, int], None] | None = None,
    processes: Processes | None = None,
) -> tuple[TrainedMCDM, TrainingRun]:
    """Train an MCDM: all weights of the UNet, and MLP(.).

    The UNet starts from the model's weights, with zeros for the source image's channels. The text encoder, the VAE and
    CLIP are not trained.

    Args:
        model: MODEL that predicts noise or v: a text-to-image model, or one of the InstructPix2Pix family.
        clip, vae: CLIP and VAE of the same checkpoint.
        clip_vision: CLIP_VISION.
        pairs: all of one size.
        settings: see `MCDMSettings`.
        folder: folder of the encoded pairs and the checkpoints, the same for all processes.
        start: the MCDM in the file of `model`, to continue training its image embedding; None starts a new one.
        sample_pair: pair whose source the previews edit; None for the first of `pairs`.
        progress: see `training.loop.train`; previews are latents [1, C, h, w] in the scale of LATENT sockets.
        encoding_progress: called with (encoded pairs, total pairs).
        processes: see `training.loop.train`.

    Returns:
        the trained model and the record of the training.

    Raises:
        IdentityEditError: when an input cannot be used, or as in `training.loop.train`.
    """
    processes = processes or OneProcess()
    edit_model = as_edit_model(model)
    encode = partial(encode_pairs, vae=vae, clip_vision=clip_vision, folder=folder, processes=processes)
    encoded = encode(pairs, progress=encoding_progress)
    sample_pairs = encode([sample_pair or pairs[0]])
    if sample_pairs.latent_shape != encoded.latent_shape:
        raise IdentityEditError("The sample pair has another size than the other pairs; use pairs of one size.")
    description = _description(model, clip, encoded, settings, start, processes)
    with trainable_networks(
        edit_model,
        clip,
        unet_keys(edit_model),
        dtype=settings.dtype,
        latent_shape=[settings.batch_size, *encoded.latent_shape],
        checkpointing=settings.checkpointing,
    ) as networks:
        embedding = _first_embedding(edit_model, clip_vision, encoded, settings, start)
        embedding = embedding.to(networks.device).requires_grad_(True)
        of_unet = {_UNET + key: value for key, value in networks.model_variables.items()}
        of_embedding = {_EMBEDDING + name: value for name, value in embedding.named_parameters()}
        run = train(
            {**of_unet, **of_embedding},
            partial(_losses, networks, embedding, encoded, settings),
            settings,
            description=description,
            checkpoint=partial(_checkpoint, folder),
            sample=partial(_sample, networks, embedding, sample_pairs, settings),
            progress=progress,
            processes=processes,
            needed=of_unet,  # MLP(.) gets no gradient from a batch without c_im
        )
        weights = {key: value.detach().cpu().clone() for key, value in networks.model_variables.items()}
        embedding = embedding.cpu().requires_grad_(False)
    set_weights(edit_model, weights)
    if processes.index == 0 and sample_pairs.path != encoded.path:
        remove_encoded(sample_pairs)
    record = training_record(
        settings,
        run,
        processes=processes.count,
        pairs=len(encoded),
        prompts=sorted({*encoded.source_prompts, *encoded.target_prompts})[:256],
    )
    mcdm = MCDM(embedding, encoded.vision, engine.model_tag(edit_model), encoded.latent_shape, record)
    return TrainedMCDM(edit_model, mcdm, weights, encoded), run


def _description(
    model: Any, clip: Any, pairs: EncodedPairs, settings: MCDMSettings, start: MCDM | None, processes: Processes
) -> dict[str, Any]:
    """See `run_description`. Batches are counted per step, so a run can resume with another number of processes."""
    encoder = first_numbers(clip.patcher, "clip_", lambda key: key.endswith("_proj.weight"))
    return run_description(
        dataclasses.replace(settings, accumulation=settings.accumulation * processes.count),
        engine.model_tag(model),
        model,
        clip.patcher,
        text_encoder=[list(encoder.items()), clip.layer_idx],
        pairs=pairs.fingerprint,
        **({} if start is None else {"start": start.training.get("run", "unknown")}),
    )


def _losses(
    networks: TrainableNetworks, embedding: ImageEmbedding, pairs: EncodedPairs, settings: MCDMSettings, index: int
) -> Iterator[torch.Tensor]:
    """Mean |eps_theta(z_t, t, C) - eps|^2 of batch `index`."""
    drawn = draw_mcdm_batch(pairs, settings, int(networks.sampling.sigmas.shape[0]), index)
    prompts, targets = [], []
    for number, reconstructs in zip(drawn.chosen, drawn.reconstructs.tolist(), strict=True):
        # "we replace c_{p_b} with c_{p_a} and x_B with x_A by 5 % of time"
        prompts.append((pairs.source_prompts if reconstructs else pairs.target_prompts)[number])
        targets.append(pairs.latents("source" if reconstructs else "target", [number]))
    z_0 = networks.to_model_scale(torch.cat(targets))
    batch = Batch(z_0, torch.ones_like(z_0[:, :1]), drawn.t.to(z_0.device), drawn.noise.to(z_0.device))
    text, spatial = _conditions(networks, embedding, pairs, drawn.chosen, prompts, drawn.dropped.tolist())
    yield denoising_losses(networks, batch, text, source=spatial).mean()


def _sample(
    networks: TrainableNetworks, embedding: ImageEmbedding, pairs: EncodedPairs, settings: MCDMSettings
) -> torch.Tensor:
    """A preview: the paper's guidance on the first pair."""
    scales = GuidanceScales()
    drops = {POSITIVE: 0, NEGATIVE: TEXT_BIT, IMAGE: TEXT_BIT | SPATIAL_BIT, UNCONDITIONAL: _COMBINATIONS}
    names = [name for name, coefficient in scales.coefficients().items() if coefficient != 0.0]
    dropped = [drops[name] | settings.never_used for name in names]
    count = len(names)
    text, spatial = _conditions(networks, embedding, pairs, [0] * count, pairs.target_prompts[:1] * count, dropped)

    def estimate(x: torch.Tensor, sigma: torch.Tensor, t: int) -> torch.Tensor:
        each = networks.denoised(x.expand(count, -1, -1, -1), sigma.expand(count), text, spatial).float()
        return mcdm_estimate(dict(zip(names, each.split(1), strict=True)), scales)

    return preview(networks, pairs.latent_shape, settings, estimate)


def _first_embedding(
    model: Any, clip_vision: Any, pairs: EncodedPairs, settings: MCDMSettings, start: MCDM | None
) -> ImageEmbedding:
    """MLP(.) before the first step."""
    generator = generator_of(settings.seed, 0, "image embedding")
    embedding = new_embedding(model, clip_vision, pairs.latent_shape, generator, settings.image_tokens)
    if start is None:
        return embedding
    difference = pairs.vision.difference(start.vision)
    if difference is not None:
        raise IdentityEditError(
            f"The image embedding was trained with another CLIP vision ({difference}); load that one to continue its "
            f"training."
        )
    weights = start.embedding.state_dict()
    if {name: tensor.shape for name, tensor in weights.items()} != {
        name: tensor.shape for name, tensor in embedding.state_dict().items()
    }:
        raise IdentityEditError(
            "The image embedding has another size; use the image size and image_tokens of its training, or start a new "
            "one."
        )
    embedding.load_state_dict(weights)
    return embedding


def _conditions(
    networks: TrainableNetworks,
    embedding: ImageEmbedding,
    pairs: EncodedPairs,
    chosen: Sequence[int],
    prompts: Sequence[str],
    dropped: Sequence[int],
) -> tuple[Text, torch.Tensor]:
    """(text and image tokens, c_s) of the chosen pairs, with null values for the dropped conditions.

    The null text is the empty prompt, the null c_im no tokens, the null c_s zeros in latent space.
    """
    spatial = pairs.latents("source", chosen)
    image = embedding(pairs.tokens(chosen).to(networks.device), networks.to_model_scale(spatial)).float()
    texts: list[Text] = []
    for row, (prompt, bits) in enumerate(zip(prompts, dropped, strict=True)):
        tokens, pooled = networks.encode(["" if bits & TEXT_BIT else prompt])
        tokens = tokens.to(image)
        texts.append((tokens if bits & IMAGE_BIT else torch.cat([tokens, image[row : row + 1]], dim=1), pooled))
    kept = torch.tensor([0.0 if bits & SPATIAL_BIT else 1.0 for bits in dropped])
    return joined_texts(texts), (spatial * kept.reshape(-1, 1, 1, 1)).to(networks.device)


def checkpoint_path(folder: str, trained: TrainedMCDM) -> str:
    """Path of a finished run's checkpoint, which can be deleted once the result is saved."""
    return _checkpoint(folder, trained.mcdm.training["run"])


def _checkpoint(folder: str, run: str) -> str:
    return os.path.join(folder, f"{run}.safetensors")
