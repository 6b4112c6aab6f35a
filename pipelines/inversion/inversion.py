"""The `Inversion` data type, deterministic inversion, sampling from an inversion, and files.

An inversion is the trajectory of an image from its latent to noise, in ComfyUI's scale, x = alpha z_0 + sigma * eps.
The deterministic methods are in `methods`; with DDIM it is the pivot of Mokady et al. 2023 (section 3.2). RF-Inversion
is in `rf_inversion`, edit-friendly DDPM inversion in `edit_friendly`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from .. import engine
from ..engine.families.schedule import SAME_LEVEL, check_ends_at_image, given_schedule
from ..shared import files
from ..shared.comfy_types import Model
from ..shared.conditioning import Conditioning, with_embedding
from ..shared.errors import IN_FLOAT32, IdentityEditError, check_batch_matches, check_finite
from ..shared.input_checks import check_choice, check_number
from ..text.step_embeddings import StepEmbeddings, apply_step_embeddings
from .methods import DDIM, ITERATIONS, METHODS, OWN_SAMPLERS, steps_of

EDIT_FRIENDLY_DDPM = "edit-friendly ddpm"

_KIND = "inversion"
_FORMAT = 3
"""Format 1 had no noise maps and no eta; formats 1 and 2 had timesteps, which are not needed. Both can be read."""
_SAVE_AGAIN = "make and save the inversion again"


@dataclass(frozen=True)
class Inversion:
    """The trajectory of an image to noise, with the data needed to reconstruct the image.

    Attributes:
        trajectory: [N + 1, B, C, H, W] float32 CPU in the model's scale, in sampling order: trajectory[0] is the
            noisiest latent, trajectory[N] the image's. [N + 1, B, C, 1, H, W] for models whose latents have frames.
        sigmas: [N + 1] float32 CPU, descending: trajectory[i] is at noise level sigmas[i].
        method: one of `methods.METHODS`, `rf_inversion.RF_INVERSION` or `EDIT_FRIENDLY_DDPM`.
        guidance_scale: guidance scale of the inversion.
        model: tag of the inverting model.
        embeddings: its per-step embeddings (from null-text optimization), or None.
        noise_maps: [N, B, C, H, W] float32 CPU, of unit scale: noise_maps[i] is the z of the step from sigmas[i] to
            sigmas[i + 1] (Huberman-Spiegelglas et al. 2024, eq. 5). None for a deterministic inversion.
        eta: fraction of each step's noise: 0 for a deterministic inversion, otherwise up to 1 (DDPM).
        last_update: the largest change of a latent by the last iteration of the fixed point, relative to it; 0 for
            other methods and for inversions from files.
    """

    trajectory: torch.Tensor
    sigmas: torch.Tensor
    method: str
    guidance_scale: float
    model: engine.ModelTag
    embeddings: StepEmbeddings | None = None
    noise_maps: torch.Tensor | None = None
    eta: float = 0.0
    last_update: float = 0.0

    @property
    def steps(self) -> int:
        """N, the number of steps."""
        return int(self.sigmas.shape[0]) - 1

    @property
    def batch(self) -> int:
        """B, the number of images."""
        return int(self.trajectory.shape[1])

    @property
    def noise_path(self) -> engine.NoisePath:
        """The noise path of its model."""
        return self.model.noise_path

    @property
    def image(self) -> torch.Tensor:
        """z_0 [B, C, H, W] of the inverted image, in the model's scale."""
        return self.trajectory[-1] / self.noise_path.image_scale(self.sigmas[-1])

    def levels(self, index: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sigmas[index] and sigmas[index + 1], copied to the device of `x` so that autograd can save them."""
        sigma, sigma_next = self.sigmas[index : index + 2].clone().to(x.device)
        return sigma, sigma_next

    def with_embeddings(self, embeddings: StepEmbeddings | None) -> Inversion:
        """The same inversion with other per-step embeddings."""
        return replace(self, embeddings=embeddings)

    def row(self, sigma: float) -> int:
        """The index i with sigmas[i] equal to `sigma` (relative tolerance 1e-4).

        Raises:
            IdentityEditError: when there is none; nothing is interpolated.
        """
        distances = (self.sigmas - sigma).abs()
        nearest = int(distances.argmin())
        if float(distances[nearest]) > SAME_LEVEL * max(sigma, float(self.sigmas[nearest])):
            raise IdentityEditError(
                f"The sampler uses the noise level {sigma:.5g}, which the inversion does not contain (the nearest is "
                f"{float(self.sigmas[nearest]):.5g}); invert with DDIM or fixed point, and sample with the "
                f"inversion's sigmas and a sampler without intermediate steps, such as euler."
            )
        return nearest

    def rows(self, sigmas: torch.Tensor) -> list[int]:
        """The indices of consecutive noise levels.

        Raises:
            IdentityEditError: when one is not the inversion's, or the next one is missing.
        """
        rows = [self.row(float(sigma)) for sigma in sigmas]
        if rows != list(range(rows[0], rows[0] + len(rows))):
            raise IdentityEditError(
                "The sigmas skip noise levels of the inversion; connect those of Inversion Sampler."
            )
        return rows

    def start_latent(self, model: Model, skip: int = 0) -> torch.Tensor:
        """The LATENT [B, C, H, W] to sample from, without added noise, after the first `skip` steps.

        It is trajectory[skip] in the scale of LATENT sockets. On a flow model it is the image: ComfyUI multiplies a
        LATENT by 1 - sigma, so that an inversion reaches the sampler only as noise (`inverted_noise`).
        """
        check_skip(skip, self.steps)
        if self.noise_path is engine.FLOW:
            return self.end_latent(model)
        return engine.to_socket_scale(model, self.trajectory[skip].clone())

    def end_latent(self, model: Model) -> torch.Tensor:
        """The inverted image's latent z_0 [B, C, H, W] in the scale of LATENT sockets."""
        return engine.to_socket_scale(model, self.image)


def check_inversion(
    inversion: Inversion, model: Model, steps: int | None = None, latent_shape: tuple[int, ...] | None = None
) -> None:
    """Raise `IdentityEditError` unless an inversion matches a model, a step count and a latent's shape (None: any)."""
    check_finite(inversion.trajectory, "The inversion", "invert the image again")
    difference = inversion.model.difference(engine.model_tag(model))
    if difference is not None:
        raise IdentityEditError(
            f"The inversion was made with another model ({difference}); load that checkpoint, or invert the image "
            f"again with this one."
        )
    check_step_count(inversion, steps)
    shape = tuple(inversion.trajectory.shape[1:])
    # One frame may be missing in a LATENT, as in those of Empty SD3 Latent Image for Qwen-Image.
    if latent_shape is not None and tuple(latent_shape) not in (shape, shape[:2] + shape[-2:]):
        raise IdentityEditError(
            f"The inversion holds latents {shape} but the latent is {tuple(latent_shape)}; use the size and batch of "
            f"the inverted image."
        )


def check_step_count(inversion: Inversion, steps: int | None) -> None:
    """Raise `IdentityEditError` if `steps` is not None and differs from the inversion's step count."""
    if steps is not None and steps != inversion.steps:
        raise IdentityEditError(
            f"The inversion has {inversion.steps} steps but steps is {steps}; set steps to {inversion.steps}, or "
            f"invert again."
        )


def check_sampled_latent(
    inversion: Inversion,
    x: torch.Tensor,
    remedy: str = "sample at the inverted image's size",
    name: str = "the sampled one",
) -> None:
    """Raise `IdentityEditError` if latents [B, C, H, W] have another size or batch than the inversion."""
    check_batch_matches(inversion.batch, x.shape[0], "The inversion")
    if inversion.trajectory.shape[2:] != x.shape[1:]:
        raise IdentityEditError(
            f"The inversion holds latents {tuple(inversion.trajectory.shape[2:])} but {name} is {tuple(x.shape[1:])}; "
            f"{remedy}."
        )


def check_skip(skip: int, steps: int) -> None:
    """Raise `IdentityEditError` unless 0 <= `skip` < `steps`: at least one step must remain."""
    if not 0 <= skip < steps:
        raise IdentityEditError(f"skip is {skip} of {steps} steps; choose a number from 0 to {steps - 1}.")


def check_deterministic(inversion: Inversion, remedy: str) -> None:
    """Raise `IdentityEditError`, ending in `remedy`, for an inversion with noise maps."""
    if inversion.method == EDIT_FRIENDLY_DDPM:
        raise IdentityEditError(f"The inversion was made by {inversion.method} inversion, not by ddim; {remedy}.")


def sampling_step(inversion: Inversion, index: int, x: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
    """One sampling step from sigmas[index] to sigmas[index + 1] with the inversion's method.

    Euler's step, which is DDIM (eta 0), for a deterministic inversion; for one with noise maps, the step of
    Huberman-Spiegelglas et al. 2024 (eq. 3 and 4) with the map as noise, see `NoisePath.distribution`.

    Args:
        inversion: inversion of one image, or of as many as `x` has latents.
        index: 0 to N - 1.
        x: latent at sigmas[index] [B, C, H, W] in the model's scale.
        denoised: the guided estimate of z_0 at x [B, C, H, W].

    Returns:
        latent at sigmas[index + 1] [B, C, H, W].

    Raises:
        IdentityEditError: when the noise maps and the latent differ in batch or size.
    """
    if inversion.noise_maps is None:
        return inversion.noise_path.step(x, denoised, *inversion.levels(index, x))
    check_sampled_latent(inversion, x, "sample from the inversion's latent")
    sigma, sigma_next = inversion.sigmas[index : index + 2].tolist()
    mean, deviation = inversion.noise_path.distribution(x, denoised, sigma, sigma_next, inversion.eta)
    return mean + deviation * inversion.noise_maps[index].to(x)


def invert_image(
    model: Model,
    latent: torch.Tensor,
    positive: Conditioning,
    negative: Conditioning | None = None,
    steps: int = 50,
    guidance_scale: float = 1.0,
    end_at_zero: bool = False,
    callback: engine.Callback | None = None,
    *,
    method: str = DDIM,
    iterations: int = ITERATIONS,
    sigmas: torch.Tensor | None = None,
) -> Inversion:
    """Invert an image with a deterministic method (`methods`).

    Args:
        model: MODEL.
        latent: the image [B, C, H, W] in the scale of LATENT sockets.
        positive: the source prompt's CONDITIONING.
        negative: CONDITIONING of the negative side; required for a guidance scale other than 1.
        steps: N, 1 to 1000; fewer on a distilled model (`schedule.ddim_schedule`). The papers use 50.
        guidance_scale: 1 in the reference implementation; larger values make the inversion less exact.
        end_at_zero: place the image at sigma 0 instead of the lowest level of the model (see `Family.schedule`).
        callback: progress with preview.
        method: one of `methods.METHODS`.
        iterations: model calls per step of the fixed point, from 1.
        sigmas: [N + 1] descending noise levels to use instead of the model's schedule; `steps` and `end_at_zero` then
            have no effect.

    Returns:
        the inversion. Model calls, doubled unless guidance scale is 1: N (DDIM), N + 1 (Uni-Inv, FireFlow), 2 N
        (midpoint), N * iterations (fixed point).
    """
    path = engine.require(model).noise_path
    check_choice(method, "method", METHODS)
    check_number(iterations, "iterations", 1, None)
    levels = levels_of(model, steps, end_at_zero, sigmas)
    check_negative(negative, guidance_scale)
    updates = [0.0]

    def loop(evaluator: engine.NetworkEvaluator, z_0: torch.Tensor) -> torch.Tensor:
        ascending = levels.flip(0).to(evaluator.device)
        start = z_0 * path.image_scale(ascending[0])
        trajectory = [start.cpu()]
        estimate = partial(evaluator.guided, guidance_scale=guidance_scale)
        for i, (x, denoised) in enumerate(steps_of(method, path, start, ascending, estimate, iterations, updates)):
            trajectory.append(x.cpu())
            evaluator.report(i, denoised, x, len(levels) - 1)
        return torch.stack(trajectory[::-1])

    z_0 = engine.model_latent(model, latent)
    trajectory = engine.run_loop(model, positive, negative, z_0, levels, loop, callback=callback)
    check_finite(trajectory, "The inversion's trajectory", IN_FLOAT32)
    return Inversion(
        trajectory=trajectory,
        sigmas=levels,
        method=method,
        guidance_scale=float(guidance_scale),
        model=engine.model_tag(model),
        last_update=max(updates),
    )


def levels_of(model: Model, steps: int, end_at_zero: bool, sigmas: torch.Tensor | None) -> torch.Tensor:
    """[N + 1] descending noise levels: the model's schedule, or `sigmas`."""
    family = engine.require(model)
    if sigmas is None:
        return family.schedule(steps, end_at_zero).sigmas
    levels = given_schedule(family, sigmas)
    check_ends_at_image(family.noise_path, levels)
    return levels


def sample_inversion(
    model: Model,
    inversion: Inversion,
    positive: Conditioning,
    negative: Conditioning | None = None,
    guidance_scale: float = 1.0,
    skip: int = 0,
    callback: engine.Callback | None = None,
) -> torch.Tensor:
    """Sample from an inversion with its method's step and its per-step embeddings, if any.

    Args:
        model: MODEL, the one that made the inversion.
        inversion: inversion of the image.
        positive, negative: CONDITIONING; negative is required for a guidance scale other than 1 if the inversion has no
            per-step embeddings.
        guidance_scale: classifier-free guidance scale.
        skip: number of first steps to skip, 0 to N - 1; sampling starts from trajectory[skip].
        callback: progress with preview.

    Returns:
        z_0 [B, C, H, W] in the scale of LATENT sockets.
    """
    check_inversion(inversion, model)
    check_skip(skip, inversion.steps)
    negative = negative_side(inversion, positive, negative, guidance_scale)
    if inversion.embeddings is not None:
        model = apply_step_embeddings(model, inversion.embeddings, "negative")
    return follow_back(model, inversion, positive, negative, guidance_scale, skip, callback)[0]


def follow_back(
    model: Model,
    inversion: Inversion,
    positive: Conditioning,
    negative: Conditioning | None,
    guidance_scale: float,
    first: int = 0,
    callback: engine.Callback | None = None,
) -> tuple[torch.Tensor, int]:
    """The sampling loop of `sample_inversion`, without checks and without applying per-step embeddings.

    Returns:
        z_0 [B, C, H, W] in the scale of LATENT sockets, and the number of model calls.
    """
    steps = inversion.steps

    path = inversion.noise_path

    def loop(evaluator: engine.NetworkEvaluator, x_start: torch.Tensor) -> tuple[torch.Tensor, int]:
        x, levels = x_start, sigmas.to(evaluator.device)
        estimate = partial(evaluator.guided, guidance_scale=guidance_scale)
        if inversion.method in OWN_SAMPLERS:
            for i, (x, denoised) in enumerate(steps_of(inversion.method, path, x_start, levels, estimate)):
                evaluator.report(i, denoised, x, steps - first)
        else:
            for i in range(first, steps):
                denoised = estimate(x, levels[i - first])
                x = sampling_step(inversion, i, x, denoised)
                evaluator.report(i - first, denoised, x, steps - first)
        return engine.to_socket_scale(model, (x / path.image_scale(levels[-1])).cpu()), evaluator.evaluations

    start, sigmas = inversion.trajectory[first], inversion.sigmas[first:]
    return engine.run_loop(model, positive, negative, start, sigmas, loop, callback=callback)


def check_negative(
    negative: Conditioning | None, guidance_scale: float, remedy: str = "connect one, or set it to 1"
) -> None:
    """Raise `IdentityEditError`, ending in `remedy`, if guidance lacks a negative conditioning."""
    if guidance_scale != 1.0 and negative is None:
        raise IdentityEditError(f"A guidance scale of {guidance_scale:g} needs a negative conditioning; {remedy}.")


def negative_side(
    inversion: Inversion, positive: Conditioning, negative: Conditioning | None, guidance_scale: float
) -> Conditioning | None:
    """The negative conditioning for sampling from an inversion: `negative`, or one of its per-step embeddings."""
    table = inversion.embeddings
    if negative is None and guidance_scale != 1.0 and table is not None:
        return with_embedding(positive[:1], table.embeddings[0], table.pooled_row(0))
    remedy = "connect one, use an inversion from Null-Text Optimization, or set the scale to 1"
    check_negative(negative, guidance_scale, remedy)
    return negative


def save_inversion(inversion: Inversion, path: str) -> None:
    """Write an inversion to a .safetensors file atomically."""
    tensors = {"trajectory": inversion.trajectory, "sigmas": inversion.sigmas}
    if inversion.embeddings is not None:
        tensors["embeddings.sigmas"] = inversion.embeddings.sigmas
        tensors["embeddings.embeddings"] = inversion.embeddings.embeddings
        if inversion.embeddings.pooled is not None:
            tensors["embeddings.pooled"] = inversion.embeddings.pooled
    if inversion.noise_maps is not None:
        tensors["noise_maps"] = inversion.noise_maps
    description = {
        "kind": _KIND,
        "format": _FORMAT,
        "method": inversion.method,
        "guidance_scale": inversion.guidance_scale,
        "eta": inversion.eta,
        "embeddings.guidance_scale": inversion.embeddings.guidance_scale if inversion.embeddings else None,
        "model": asdict(inversion.model),
    }
    files.write_tensors(path, tensors, description)


def load_inversion(path: str) -> Inversion:
    """Read a file written by `save_inversion`. Use `check_inversion` to check it against a model.

    Raises:
        IdentityEditError: when the file is missing, damaged, of another kind, or from a newer version of this pack.
    """
    tensors, description = files.read_tensors(path, _KIND)
    if description.get("format") not in range(1, _FORMAT + 1):
        raise IdentityEditError(f"The file {path} was written by a newer version of this pack; update the pack.")
    with files.parsing_file(path, "The inversion", "save the inversion again"):
        embeddings = None
        if "embeddings.embeddings" in tensors:
            embeddings = StepEmbeddings(
                sigmas=tensors["embeddings.sigmas"],
                embeddings=tensors["embeddings.embeddings"],
                pooled=tensors.get("embeddings.pooled"),
                guidance_scale=description.get("embeddings.guidance_scale"),
            )
        inversion = Inversion(
            trajectory=tensors["trajectory"],
            sigmas=tensors["sigmas"],
            method=str(description["method"]),
            guidance_scale=float(description["guidance_scale"]),
            model=engine.ModelTag.from_description(description["model"]),
            embeddings=embeddings,
            noise_maps=tensors.get("noise_maps"),
            eta=float(description.get("eta", 0.0)),
        )
    trajectory, sigmas = inversion.trajectory, inversion.sigmas
    if sigmas.ndim != 1 or len(sigmas) < 2 or trajectory.ndim not in (5, 6) or len(trajectory) != len(sigmas):
        raise IdentityEditError(f"The file {path} is damaged (inconsistent trajectory); save the inversion again.")
    maps, expected = inversion.noise_maps, (inversion.steps, *inversion.trajectory.shape[1:])
    if (maps is None) != (inversion.eta == 0.0) or (maps is not None and tuple(maps.shape) != expected):
        raise IdentityEditError(f"The file {path} is damaged (inconsistent noise maps); save the inversion again.")
    check_finite(inversion.trajectory, f"The file {path}", _SAVE_AGAIN)
    check_finite(inversion.sigmas, f"The file {path}", _SAVE_AGAIN)
    if maps is not None:
        check_finite(maps, f"The file {path}", _SAVE_AGAIN)
    return inversion
