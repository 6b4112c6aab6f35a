"""The personalised identity prior of LIPE (Liu et al. 2024, section 2.1 and appendix E.2.5).

The attention layers of the UNet and of the text encoders are fine-tuned on a few pictures of one subject, whose
captions call it by a rare token V* and its class word ("sks dog") and say what it does, together with pictures of the
class in general, which keep the rest of the model in place (prior preservation, Ruiz et al. 2023). The result is a
change of these weights: a patch for stock MODEL and CLIP, and a file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import engine
from .engine.trainable import BFLOAT16, PRECISIONS, TrainableNetworks, trainable_networks
from .engine.weights import stored_weights, weight_shapes
from .errors import IdentityEditError
from .files import check_facts, read_tensors, understanding, write_tensors
from .schedule import ddim_schedule, euler_step
from .training import (
    Progress,
    TrainingRun,
    TrainingSettings,
    generator_of,
    patch_strengths,
    run_hash,
    train,
    training_facts,
)
from .training_pictures import Batch, TrainingPictures, batch_indices, denoising_losses, draw_batch, draw_noise

KIND = "identity prior"
STEPS = 1000
LEARNING_RATE = 5e-4
WEIGHT_DECAY = 0.01
"""torch's and diffusers' default for AdamW; Liu et al. 2024 give none."""
REGULARISATION_WEIGHT = 1.0
FILE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_MODEL_KEYS = re.compile(r"diffusion_model\..+\.attn[12]\.to_(q|k|v|out\.0)\.(weight|bias)")
_CLIP_KEYS = re.compile(r"clip_\w\..+\.self_attn\.(q|k|v|out)_proj\.(weight|bias)")
_MODEL, _CLIP = "model.", "clip."


@dataclass(frozen=True)
class PriorSettings:
    """What is trained and on what, beside `TrainingSettings`.

    Attributes:
        token: V*, the rare token.
        class_word: what the subject is.
        batch_size: pictures of each of both sets in a batch.
        regularisation_weight: of the class pictures' loss; 1 in Ruiz et al. 2023.
        text_encoder: whether the text encoders are trained too, as in Liu et al. 2024.
        masked: count the identity pictures' loss inside their masks only.
        min_snr_gamma: see `denoising_losses`; 0 is off.
        precision: a key of PRECISIONS.
        checkpointing: recompute blocks in the backward pass: a fraction of the memory for a third more time.
        sample_prompt: what the sample previews show; "" is the token and the class word.
        sample_guidance_scale, sample_steps: of the sample previews, DDIM.
        file_dtype: in which the change is kept, a key of FILE_DTYPES.
    """

    token: str
    class_word: str
    batch_size: int = 1
    regularisation_weight: float = REGULARISATION_WEIGHT
    text_encoder: bool = True
    masked: bool = False
    min_snr_gamma: float = 0.0
    precision: str = BFLOAT16
    checkpointing: bool = False
    sample_prompt: str = ""
    sample_guidance_scale: float = 5.0
    sample_steps: int = 20
    file_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise IdentityEditError(f"batch_size is {self.batch_size}; choose 1 or more.")
        for name, choices in (("precision", PRECISIONS), ("file_dtype", FILE_DTYPES)):
            if getattr(self, name) not in choices:
                raise IdentityEditError(f"{name} is {getattr(self, name)}; choose one of {', '.join(choices)}.")


_NOT_OF_THE_RUN = ("steps", "checkpoint_every", "sample_every")
_NOT_OF_THE_PRIOR = ("sample_prompt", "sample_guidance_scale", "sample_steps", "file_dtype", "checkpointing")
"""Settings that change no step's result, so that a run with others of them can go on from the same checkpoint."""


@dataclass(frozen=True)
class IdentityPrior:
    """A learned change of weights.

    Attributes:
        model_change: by keys of the MODEL's state dictionary, CPU tensors of the weights' shapes.
        clip_change: by keys of the CLIP's.
        token, class_word: how prompts call the subject.
        model: tag of the model it was trained on.
        training: what the file says about the training: steps, learning rate, settings, the pack's version.
    """

    model_change: dict[str, torch.Tensor]
    clip_change: dict[str, torch.Tensor]
    token: str
    class_word: str
    model: engine.ModelTag
    training: dict[str, Any]

    @property
    def identity_prompt(self) -> str:
        """The token and the class word: P^e in Liu et al. 2024."""
        return f"{self.token} {self.class_word}"


def attention_keys(model: Any, clip: Any) -> tuple[list[str], list[str]]:
    """Keys of what is trained: all projections of the UNet's and the text encoders' attention, biases included.

    Raises:
        IdentityEditError: when the CLIP has no such layers.
    """
    model_keys = [key for key in weight_shapes(model.model) if _MODEL_KEYS.fullmatch(key)]
    clip_keys = [key for key in weight_shapes(clip.patcher.model) if _CLIP_KEYS.fullmatch(key)]
    if not model_keys or not clip_keys:
        raise IdentityEditError(
            "The CLIP has no CLIP text encoder to train; use the CLIP of a Stable Diffusion 1.x, 2.x or XL checkpoint."
        )
    return model_keys, clip_keys


def train_identity_prior(
    model: Any,
    clip: Any,
    identity: TrainingPictures,
    regularisation: TrainingPictures | None,
    settings: PriorSettings,
    training: TrainingSettings,
    *,
    checkpoint: Callable[[str], str] | None = None,
    progress: Progress | None = None,
) -> tuple[IdentityPrior, TrainingRun]:
    """Learn a subject (Liu et al. 2024, section 2.1).

    Every step takes one batch of the identity set and one of the regularisation set:
    loss = mean |eps_theta - eps|^2 over the former + regularisation_weight * the same over the latter.

    Args:
        model: MODEL that predicts noise or velocity; LoRAs on it count as part of it.
        clip: its CLIP.
        identity: pictures of the subject.
        regularisation: pictures of its class, or None.
        settings, training: see there. E.2.5 gives AdamW, 5e-4 for both networks, 1000 steps.
        checkpoint: gives the file of the checkpoint for a hash of the run, see `training.train`.
        progress: called after every step; samples are latents [1, C, h, w] in the scale of LATENT sockets.

    Returns:
        the prior and the record of the training.

    Raises:
        IdentityEditError: when an input cannot be used, or as in `training.train`.
    """
    sampling = engine.require_noise_prediction_model(model)
    tag = engine.model_tag(model)
    model_keys, clip_keys = attention_keys(model, clip)
    if not settings.text_encoder:
        clip_keys = []
    training = dataclasses.replace(training, bfloat16=settings.precision == BFLOAT16)
    description = _run_description(model, clip, tag, identity, regularisation, settings, training)
    run = run_hash(description)
    sets = {"identity": (identity, 1.0)}
    if regularisation is not None and settings.regularisation_weight > 0.0:
        sets["regularisation"] = (regularisation, settings.regularisation_weight)
    to_model_scale = partial(engine.to_model_scale, model)

    def losses(networks: TrainableNetworks, index: int) -> Iterator[torch.Tensor]:
        parts = []
        for what, (pictures, weight) in sets.items():
            chosen = batch_indices(pictures, settings.batch_size, index, training.seed, what)
            batch = draw_batch(pictures, chosen, to_model_scale, networks.device)
            if what == "identity" and not settings.masked:
                batch = dataclasses.replace(batch, masks=torch.ones_like(batch.masks))
            generator = generator_of(training.seed, index, f"noise of {what}")
            t, noise = draw_noise(batch, sampling.sigmas.shape[0], generator)
            parts.append((batch, t, noise, torch.full(t.shape, weight / t.shape[0])))
        if len({part[0].latents.shape for part in parts}) == 1:  # of one size: one evaluation for both sets
            parts = [_joined(parts)]
        for batch, t, noise, weights in parts:
            each = denoising_losses(networks, sampling, tag.prediction, batch, t, noise, settings.min_snr_gamma)
            yield (weights.to(each.device) * each).sum()

    largest = max((latent for part, _ in sets.values() for latent in part.latents), key=torch.Tensor.numel)
    shape = [settings.batch_size * len(sets), *largest.shape]
    with trainable_networks(
        model,
        clip,
        model_keys,
        clip_keys,
        precision=settings.precision,
        latent_shape=shape,
        checkpointing=settings.checkpointing,
    ) as networks:
        variables: dict[str, torch.Tensor] = {_MODEL + key: value for key, value in networks.model_variables.items()}
        variables |= {_CLIP + key: value for key, value in networks.clip_variables.items()}
        latent_size = identity.latents[0].shape

        def sample() -> torch.Tensor:
            prompt = settings.sample_prompt or f"{settings.token} {settings.class_word}"
            latent = _sample(networks, sampling, latent_size, prompt, settings, training.seed)
            return engine.to_socket_scale(model, latent)

        record = train(
            variables,
            partial(losses, networks),
            training,
            checkpoint=checkpoint(run) if checkpoint is not None else None,
            run=run,
            sample=sample,
            progress=progress,
            # Of the text encoder, the layers behind the one that is read get no gradient.
            needed=[_MODEL + key for key in networks.model_variables],
        )
        model_change, clip_change = networks.changes(FILE_DTYPES[settings.file_dtype])
    prior = IdentityPrior(
        model_change=model_change,
        clip_change=clip_change,
        token=settings.token,
        class_word=settings.class_word,
        model=tag,
        training=training_facts(
            training,
            settings,
            run,
            identity_pictures=len(identity),
            regularisation_pictures=0 if regularisation is None else len(regularisation),
            last_losses_mean=sum(record.losses[-50:]) / len(record.losses[-50:]),
            pack_version=_pack_version(),
        ),
    )
    return prior, record


def _joined(parts: list[tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor]]) -> Any:
    batches, t, noise, weights = zip(*parts, strict=True)
    batch = Batch(
        latents=torch.cat([batch.latents for batch in batches]),
        captions=[caption for batch in batches for caption in batch.captions],
        masks=torch.cat([batch.masks for batch in batches]),
    )
    return batch, torch.cat(t), torch.cat(noise), torch.cat(weights)


def _sample(
    networks: TrainableNetworks, sampling: Any, size: torch.Size, prompt: str, settings: PriorSettings, seed: int
) -> torch.Tensor:
    """DDIM with guidance by the networks as they are now -> latent [1, C, h, w] in the model's scale."""
    sigmas = ddim_schedule(sampling, settings.sample_steps, end_at_zero=True).sigmas.to(networks.device)
    noise = torch.randn((1, *size), generator=generator_of(seed, 0, "sample")).to(networks.device)
    x = sigmas[0] * noise
    text = networks.encode([prompt, ""])
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        both = networks.denoised(torch.cat([x, x]), sigma.expand(2), text).float()
        denoised = both[1:] + settings.sample_guidance_scale * (both[:1] - both[1:])
        x = euler_step(x, denoised, sigma, sigma_next)
    return x


def apply_identity_prior(
    model: Any, clip: Any, prior: IdentityPrior, strength_model: float = 1.0, strength_clip: float = 1.0
) -> tuple[Any, Any]:
    """Clones of MODEL and CLIP with the prior as stock weight patches; strength 1 is what was trained.

    Raises:
        IdentityEditError: when the prior belongs to another model family.
    """
    check_identity_prior(model, clip, prior)
    patched_model, patched_clip = model.clone(), clip.clone()
    if strength_model != 0.0:
        patched_model.add_patches(_patches(prior.model_change), strength_model)
    if strength_clip != 0.0:
        patched_clip.add_patches(_patches(prior.clip_change), strength_clip)
    return patched_model, patched_clip


def check_identity_prior(model: Any, clip: Any, prior: IdentityPrior) -> str | None:
    """Check that a prior can be applied to a model.

    Returns:
        a warning when the model is of the prior's family but has other weights than it was trained on, or None.

    Raises:
        IdentityEditError: when the model is of another family: architecture, prediction or shapes differ.
    """
    tag = engine.model_tag(model)
    # Of another checkpoint of the same family only the weights differ; `difference` names what is different first.
    difference = dataclasses.replace(tag, weights=prior.model.weights).difference(prior.model)
    parts = (
        (weight_shapes(model.model), prior.model_change, "MODEL"),
        (weight_shapes(clip.patcher.model), prior.clip_change, "CLIP"),
    )
    for shapes, change, socket in parts:
        for key, tensor in change.items():
            if difference is None and shapes.get(key) != tensor.shape:
                difference = f"the {socket} has no weight {key} of the shape {tuple(tensor.shape)}"
    if difference is not None:
        raise IdentityEditError(
            f"The identity prior '{prior.identity_prompt}' was trained on another model family ({difference}); load a "
            f"checkpoint of the family it was trained on."
        )
    if tag.difference(prior.model) is not None:
        return "The prior was trained on another checkpoint of this family; the subject may look less like itself."
    return None


def save_identity_prior(prior: IdentityPrior, path: str) -> None:
    """Write a prior as safetensors, whole or not at all; no file of this pack holds code.

    Raises:
        IdentityEditError: when the file cannot be written.
    """
    tensors = {_MODEL + key: tensor for key, tensor in prior.model_change.items()}
    tensors |= {_CLIP + key: tensor for key, tensor in prior.clip_change.items()}
    description = {
        "kind": KIND,
        "token": prior.token,
        "class_word": prior.class_word,
        "model": dataclasses.asdict(prior.model),
        "training": prior.training,
    }
    write_tensors(path, tensors, description)


def load_identity_prior(path: str) -> IdentityPrior:
    """Read a prior that `save_identity_prior` wrote.

    Raises:
        IdentityEditError: when the file is missing, damaged, or holds something else.
    """
    tensors, description = read_tensors(path, KIND)
    with understanding(path, "The identity prior"):
        return IdentityPrior(
            model_change=_below(tensors, _MODEL),
            clip_change=_below(tensors, _CLIP),
            token=str(description["token"]),
            class_word=str(description["class_word"]),
            model=engine.ModelTag.from_description(description["model"]),
            training=check_facts(
                description["training"], ("steps", "learning_rate", "identity_pictures", "regularisation_pictures")
            ),
        )


def as_lora(
    prior: IdentityPrior, rank: int, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, torch.Tensor], float]:
    """The prior as a LoRA that stock loaders read: the best approximation of each weight's change of a rank.

    Each change is cut after the `rank` largest singular values (Eckart and Young 1936); biases are kept as they are.

    Args:
        prior: what to approximate.
        rank: at most; smaller matrices get their full rank, which is exact.
        progress: called with (weights done, weights in all).

    Returns:
        float16 or wider tensors by the keys of a LoRA file (`lora_unet_...`, `lora_te_...`; for SDXL `lora_te1_...`
        and `lora_te2_...`), and the relative error |change - approximation| / |change| in the Frobenius norm over all
        weights, rounding included.

    Raises:
        IdentityEditError: when the rank is below 1.
    """
    if rank < 1:
        raise IdentityEditError(f"rank is {rank}; choose 1 or more.")
    both_encoders = any(key.startswith("clip_g.") for key in prior.clip_change) and any(
        key.startswith("clip_l.") for key in prior.clip_change
    )
    named = {
        _lora_key(key, both_encoders): change for key, change in {**prior.model_change, **prior.clip_change}.items()
    }
    tensors: dict[str, torch.Tensor] = {}
    error, size = 0.0, 0.0
    for done, (key, change) in enumerate(named.items(), start=1):
        if progress is not None:
            progress(done, len(named))
        name, _, part = key.rpartition(".")
        if part == "bias":
            tensors[f"{name}.diff_b"] = change
            continue
        exact = change.float()
        u, s, v = torch.linalg.svd(exact, full_matrices=False)
        kept = min(rank, s.shape[0])
        root = s[:kept].sqrt()
        up, down = (u[:, :kept] * root).to(change.dtype), (root[:, None] * v[:kept]).to(change.dtype)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = torch.tensor(float(kept))
        error += float((exact - up.float() @ down.float()).square().sum())
        size += float(exact.square().sum())
    return tensors, (error / size) ** 0.5 if size else 0.0


def save_lora(prior: IdentityPrior, tensors: dict[str, torch.Tensor], rank: int, error: float, path: str) -> None:
    """Write what `as_lora` gave, with its rank and relative error in the file's header."""
    description = {
        "kind": "lora",
        "token": prior.token,
        "class_word": prior.class_word,
        "rank": rank,
        "relative_error": error,
        "training": prior.training,
    }
    write_tensors(path, tensors, description)


def _lora_key(key: str, both_encoders: bool) -> str:
    name, _, part = key.rpartition(".")
    if name.startswith("diffusion_model."):
        return f"lora_unet_{name.removeprefix('diffusion_model.').replace('.', '_')}.{part}"
    encoder, _, layer = name.partition(".transformer.")
    number = {"clip_l": "1", "clip_g": "2"}.get(encoder, "") if both_encoders else ""
    return f"lora_te{number}_{layer.replace('.', '_')}.{part}"


def _patches(change: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {key: ("diff", (tensor,)) for key, tensor in change.items()}


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _run_description(
    model: Any,
    clip: Any,
    tag: engine.ModelTag,
    identity: TrainingPictures,
    regularisation: TrainingPictures | None,
    settings: PriorSettings,
    training: TrainingSettings,
) -> dict[str, Any]:
    """Everything that the result of a step depends on; weights by samples of them, patches of others by strengths."""
    optimisation = {**dataclasses.asdict(training), **dataclasses.asdict(settings)}
    for name in (*_NOT_OF_THE_RUN, *_NOT_OF_THE_PRIOR):
        del optimisation[name]
    # A text encoder is told by a few of its weights as the checkpoint holds them.
    encoder = [
        [] if weight is None else weight.flatten()[:1].float().cpu().tolist()
        for key, weight, _ in stored_weights(clip.patcher, "clip_")
        if _CLIP_KEYS.fullmatch(key)
    ]
    return {
        "settings": optimisation,
        "model": dataclasses.asdict(tag),
        "patches": patch_strengths(model, clip.patcher),
        "text_encoder": [encoder, clip.layer_idx],
        "identity": identity.fingerprint,
        "regularisation": None if regularisation is None else regularisation.fingerprint,
    }


def _pack_version() -> str:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return found.group(1) if found else "unknown"
