"""Training an MCDM on generated pairs (Chen et al. 2024, section 3.3 and supplement 1.2)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import engine
from .encoded_pairs import EncodedPairs, PairFiles, encode_pairs, remove_encoded
from .engine.edit_model import as_edit_model, set_weights, unet_keys
from .engine.trainable import BFLOAT16, PRECISIONS, Text, TrainableNetworks, joined_texts, trainable_networks
from .engine.weights import stored_weights
from .errors import IdentityEditError
from .mcdm import IMAGE_TOKENS, MCDM, ImageEmbedding, new_embedding
from .mcdm_guidance import IMAGE, NEGATIVE, POSITIVE, UNCONDITIONAL, GuidanceScales, guided_estimate
from .schedule import ddim_schedule, euler_step
from .training import (
    OneProcess,
    Processes,
    Progress,
    TrainingRun,
    TrainingSettings,
    generator_of,
    patch_strengths,
    run_hash,
    train,
)
from .training_pictures import losses_of

STEPS, LEARNING_RATE, BATCH_SIZE = 200_000, 5e-6, 4
WEIGHT_DECAY = 0.01
"""AdamW's default in torch and diffusers, with which Stable Diffusion was trained; Chen et al. 2024 give none."""
EMA_DECAY = 0.9999
"""Stable Diffusion's; "the training scheme is similar to Stable Diffusion", section 3.3."""
IDENTITY_SHARE, DROPOUT = 0.05, 0.2

SPATIAL_BIT, IMAGE_BIT, TEXT_BIT = 1, 2, 4
_COMBINATIONS = SPATIAL_BIT + IMAGE_BIT + TEXT_BIT
"""Seven ways to drop something of three: the numbers 1 to 7, a bit for each condition."""

_UNET, _EMBEDDING = "unet.", "image_embedding."
_NOT_OF_THE_RUN = ("steps", "checkpoint_every", "sample_every", "sample_steps", "checkpointing")
"""Settings that change no step's result, so that a run with others of them can go on from the same checkpoint."""


@dataclass(frozen=True)
class MCDMSettings:
    """How an MCDM is trained, beside `TrainingSettings`; the defaults are those of Chen et al. 2024.

    Attributes:
        batch_size: pairs of a batch.
        identity_share: of the pairs, in which p_b and x_B are replaced by p_a and x_A.
        dropout: probability with which a pair loses conditions. Which ones is drawn evenly from the seven combinations
            of c_s, c_im and c_p: the paper says "any combination of the following, or even all of them".
        image_tokens: see `mcdm.ImageEmbedding`.
        precision: a key of PRECISIONS.
        checkpointing: recompute blocks in the backward pass: a fraction of the memory for a third more time.
        sample_steps: DDIM steps of the sample previews.
    """

    batch_size: int = BATCH_SIZE
    identity_share: float = IDENTITY_SHARE
    dropout: float = DROPOUT
    image_tokens: int = IMAGE_TOKENS
    precision: str = BFLOAT16
    checkpointing: bool = True
    sample_steps: int = 20

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.image_tokens < 0:
            raise IdentityEditError(
                f"batch_size is {self.batch_size}, image_tokens {self.image_tokens}; choose 1 or more, and 0 or more."
            )
        for name in ("identity_share", "dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise IdentityEditError(f"{name} is {getattr(self, name):g}; choose a share from 0 to 1.")
        if self.precision not in PRECISIONS:
            raise IdentityEditError(f"precision is {self.precision}; choose one of {', '.join(PRECISIONS)}.")


@dataclass(frozen=True)
class TrainedMCDM:
    """The result of a training.

    Attributes:
        model: MODEL of the InstructPix2Pix family with the trained weights.
        mcdm: what its file has beside the UNet.
        weights: the trained weights in float32, by keys of `model.model.state_dict()`.
        encoded: the encoded pairs.
    """

    model: Any
    mcdm: MCDM
    weights: dict[str, torch.Tensor]
    encoded: EncodedPairs


@dataclass(frozen=True)
class MCDMBatch:
    """What a batch of B pairs is trained on.

    Attributes:
        chosen: which pairs.
        reconstructs: [B] whether the pair's target is its source.
        dropped: [B] the conditions that are dropped, as bits.
        t: timesteps [B].
        noise: [B, C, h, w].
    """

    chosen: list[int]
    reconstructs: torch.Tensor
    dropped: torch.Tensor
    t: torch.Tensor
    noise: torch.Tensor


def draw_mcdm_batch(pairs: EncodedPairs, settings: MCDMSettings, timesteps: int, index: int, seed: int) -> MCDMBatch:
    """All draws of batch `index` (from 0), from the seed and the index alone. Every pair is seen once in a round."""
    size = settings.batch_size
    orders: dict[int, torch.Tensor] = {}
    chosen = []
    for position in range(index * size, (index + 1) * size):
        number, place = divmod(position, len(pairs))
        if number not in orders:
            orders[number] = torch.randperm(len(pairs), generator=generator_of(seed, number, "order of pairs"))
        chosen.append(int(orders[number][place]))
    generator = generator_of(seed, index, "draws of pairs")
    reconstructs = torch.rand(size, generator=generator) < settings.identity_share
    drops = torch.rand(size, generator=generator) < settings.dropout
    dropped = torch.randint(1, _COMBINATIONS + 1, (size,), generator=generator) * drops
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
    training: TrainingSettings,
    folder: str,
    *,
    start: MCDM | None = None,
    sample_pair: PairFiles | None = None,
    progress: Progress | None = None,
    encoding_progress: Callable[[int, int], None] | None = None,
    processes: Processes | None = None,
) -> tuple[TrainedMCDM, TrainingRun]:
    """Learn edits from pairs.

    All weights of the UNet are trained, from those of the given model and zeros for the source picture, together with
    MLP(.); the text encoder, the VAE and CLIP stay as they are. loss = mean |eps_theta(z_t, t, C) - eps|^2.

    Args:
        model: MODEL that predicts noise or velocity: a text-to-image model, or one of the InstructPix2Pix family.
        clip, vae: CLIP and VAE of the same checkpoint.
        clip_vision: CLIP_VISION.
        pairs: all of one size.
        settings, training: see there.
        folder: where the encoded pairs and the checkpoint of the run are, one for all processes; both are named by what
            they depend on.
        start: of the file of `model`, where that is an MCDM: the image embedding goes on from it. None begins anew.
        sample_pair: whose source the samples edit; None takes the first of `pairs`.
        progress: called after every step; samples are latents [1, C, h, w] in the scale of LATENT sockets.
        encoding_progress: called with (pairs encoded, pairs in all).
        processes: that train together; see `training.train`.

    Returns:
        the trained model and the record of the training.

    Raises:
        IdentityEditError: when an input cannot be used, or as in `training.train`.
    """
    processes = processes or OneProcess()
    edit_model = as_edit_model(model)
    sampling = engine.require_noise_prediction_model(edit_model)
    training = dataclasses.replace(training, bfloat16=settings.precision == BFLOAT16)
    sample_pair = sample_pair or (pairs[0] if pairs else None)
    encode = partial(encode_pairs, vae=vae, clip_vision=clip_vision, folder=folder, processes=processes)
    encoded = encode(pairs, progress=encoding_progress)
    of_sample = encode([sample_pair]) if sample_pair is not None else encoded
    if of_sample.latent_shape != encoded.latent_shape:
        raise IdentityEditError("The pair for samples has another size than the others; use pairs of one size.")
    run = run_hash(_run_description(model, clip, encoded, settings, training, processes, start))
    latent_shape = [settings.batch_size, *encoded.latent_shape]
    keys = unet_keys(edit_model)
    with trainable_networks(
        edit_model,
        clip,
        keys,
        [],
        precision=settings.precision,
        latent_shape=latent_shape,
        checkpointing=settings.checkpointing,
    ) as networks:
        embedding = _first_embedding(edit_model, clip_vision, encoded, settings, training.seed, start)
        embedding = embedding.to(networks.device).requires_grad_(True)
        variables: dict[str, torch.Tensor] = {_UNET + key: value for key, value in networks.model_variables.items()}
        variables |= {_EMBEDDING + name: value for name, value in embedding.named_parameters()}
        tag = engine.model_tag(edit_model)
        contexts = _Contexts(networks, embedding, encoded, partial(engine.to_model_scale, edit_model))

        def losses(index: int) -> Iterator[torch.Tensor]:
            batch = draw_mcdm_batch(encoded, settings, int(sampling.sigmas.shape[0]), index, training.seed)
            yield _loss(contexts, batch, sampling, tag.prediction)

        samples = _Contexts(networks, embedding, of_sample, contexts.to_model_scale)

        def sample() -> torch.Tensor:
            return engine.to_socket_scale(edit_model, _sample(samples, sampling, settings.sample_steps, training.seed))

        record = train(
            variables,
            losses,
            training,
            checkpoint=os.path.join(folder, f"{run}.safetensors"),
            run=run,
            sample=sample,
            progress=progress,
            processes=processes,
        )
        weights = {key: value.detach().cpu().clone() for key, value in networks.model_variables.items()}
        embedding = embedding.cpu().requires_grad_(False)
    set_weights(edit_model, weights)
    if processes.index == 0 and of_sample.path != encoded.path:
        remove_encoded(of_sample)
    mcdm = MCDM(
        embedding=embedding,
        vision=encoded.vision,
        model=engine.model_tag(edit_model),
        latent=encoded.latent_shape,
        training={
            "steps": training.steps,
            "settings": {**dataclasses.asdict(training), **dataclasses.asdict(settings)},
            "processes": processes.count,
            "pairs": len(encoded),
            "prompts": sorted({*encoded.source_prompts, *encoded.target_prompts})[:256],
            "last_losses_mean": sum(record.losses[-50:]) / len(record.losses[-50:]),
            "run": run,
        },
    )
    return TrainedMCDM(edit_model, mcdm, weights, encoded), record


def _first_embedding(
    model: Any, clip_vision: Any, encoded: EncodedPairs, settings: MCDMSettings, seed: int, start: MCDM | None
) -> ImageEmbedding:
    """MLP(.) before the first step."""
    generator = generator_of(seed, 0, "image embedding")
    embedding = new_embedding(model, clip_vision, encoded.latent_shape, generator, settings.image_tokens)
    if start is not None:
        difference = encoded.vision.difference(start.vision)
        if difference is not None:
            raise IdentityEditError(
                f"The image embedding to go on from was trained with another CLIP vision ({difference}); load that one."
            )
        weights = start.embedding.state_dict()
        if {name: tensor.shape for name, tensor in weights.items()} != {
            name: tensor.shape for name, tensor in embedding.state_dict().items()
        }:
            raise IdentityEditError(
                "The image embedding to go on from has another size; use pairs of the size and the image_tokens of its "
                "training, or begin a new one."
            )
        embedding.load_state_dict(weights)
    return embedding


def checkpoint_path(folder: str, trained: TrainedMCDM) -> str:
    """The checkpoint of the run that made a result, which is no longer needed once the result is saved."""
    return os.path.join(folder, f"{trained.mcdm.training['run']}.safetensors")


@dataclass(frozen=True)
class _Contexts:
    """The three conditions of encoded pairs while the networks are trained."""

    networks: TrainableNetworks
    embedding: ImageEmbedding
    pairs: EncodedPairs
    to_model_scale: Callable[[torch.Tensor], torch.Tensor]

    def conditions(
        self, chosen: Sequence[int], prompts: Sequence[str], dropped: Sequence[int]
    ) -> tuple[Text, torch.Tensor]:
        """(text and image tokens, c_s) of the chosen pairs, without what is dropped.

        The null text is the empty prompt, the null c_im no tokens, the null c_s zeros in latent space.
        """
        device = self.networks.device
        spatial = self.pairs.latents("source", chosen)
        seen = self.pairs.tokens(chosen).to(device)
        image = self.embedding(seen, self.to_model_scale(spatial).to(device)).float()
        texts: list[Text] = []
        for row, (prompt, bits) in enumerate(zip(prompts, dropped, strict=True)):
            tokens, pooled = self.networks.encode(["" if bits & TEXT_BIT else prompt])
            tokens = tokens.to(image)
            texts.append((tokens if bits & IMAGE_BIT else torch.cat([tokens, image[row : row + 1]], dim=1), pooled))
        kept = torch.tensor([0.0 if bits & SPATIAL_BIT else 1.0 for bits in dropped])
        return joined_texts(texts), (spatial * kept.reshape(-1, 1, 1, 1)).to(device)


def _loss(contexts: _Contexts, batch: MCDMBatch, sampling: Any, prediction: str) -> torch.Tensor:
    """Mean over the batch of |eps_theta(z_t, t, {c_s, c_im, c_p}) - eps|^2."""
    pairs, device = contexts.pairs, contexts.networks.device
    prompts, targets = [], []
    for number, reconstructs in zip(batch.chosen, batch.reconstructs.tolist(), strict=True):
        # "we replace c_{p_b} with c_{p_a} and x_B with x_A by 5 % of time"
        prompts.append((pairs.source_prompts if reconstructs else pairs.target_prompts)[number])
        targets.append(pairs.latents("source" if reconstructs else "target", [number]))
    text, spatial = contexts.conditions(batch.chosen, prompts, batch.dropped.tolist())
    z_0 = contexts.to_model_scale(torch.cat(targets)).to(device)
    everywhere = torch.ones_like(z_0[:, :1])
    denoise = partial(contexts.networks.denoised, text=text, source=spatial)
    return losses_of(denoise, sampling, prediction, z_0, everywhere, batch.t, batch.noise).mean()


def _sample(contexts: _Contexts, sampling: Any, steps: int, seed: int) -> torch.Tensor:
    """DDIM with the paper's guidance on the first of the pairs -> [1, C, h, w] in the model's scale."""
    scales = GuidanceScales()
    drops = {POSITIVE: 0, NEGATIVE: TEXT_BIT, IMAGE: TEXT_BIT | SPATIAL_BIT, UNCONDITIONAL: _COMBINATIONS}
    names = [name for name, coefficient in scales.coefficients().items() if coefficient != 0.0]
    text, spatial = contexts.conditions(
        [0] * len(names), [contexts.pairs.target_prompts[0]] * len(names), [drops[name] for name in names]
    )
    sigmas = ddim_schedule(sampling, steps, end_at_zero=True).sigmas.to(spatial.device)
    noise = torch.randn((1, *contexts.pairs.latent_shape), generator=generator_of(seed, 0, "sample"))
    x = sigmas[0] * noise.to(spatial.device)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        repeated = x.expand(len(names), -1, -1, -1)
        estimates = contexts.networks.denoised(repeated, sigma.expand(len(names)), text, spatial).float()
        by_name = {name: estimates[row : row + 1] for row, name in enumerate(names)}
        x = euler_step(x, guided_estimate(by_name, scales), sigma, sigma_next)
    return x


def _run_description(
    model: Any,
    clip: Any,
    encoded: EncodedPairs,
    settings: MCDMSettings,
    training: TrainingSettings,
    processes: Processes,
    start: MCDM | None,
) -> dict[str, Any]:
    """Everything that the result of a step depends on; weights by samples of them, patches of others by strengths."""
    optimisation = {**dataclasses.asdict(training), **dataclasses.asdict(settings)}
    for name in _NOT_OF_THE_RUN:
        del optimisation[name]
    # Batches of a step, however they are shared out: so a run may go on with another number of processes.
    optimisation["accumulation"] *= processes.count
    encoder = [
        [key, [] if weight is None else weight.flatten()[:1].float().cpu().tolist()]
        for key, weight, _ in stored_weights(clip.patcher, "clip_")
        if key.endswith("_proj.weight")
    ]
    went_before = {} if start is None else {"start": start.training.get("run", "unknown")}
    return went_before | {
        "settings": optimisation,
        "model": dataclasses.asdict(engine.model_tag(model)),
        "patches": patch_strengths(model, clip.patcher),
        "text_encoder": [encoder, clip.layer_idx],
        "pairs": encoded.fingerprint,
    }
