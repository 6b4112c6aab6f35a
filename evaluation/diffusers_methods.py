"""Editing with other people's implementations on the same weights: diffusers, its community, and the authors' code.

The community's and the authors' files are no part of this project: a run names the folders that they lie in. They are
imported as they are; what they ask for and this use does not need (a video library, half precision) is replaced for
them alone, and said where it is done.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from identity_edit_pack.attention.mutual_self_attention import mutual_layers
from identity_edit_pack.attention.unet import attention_layers
from identity_edit_pack.pipelines.attention_control.mutual_self_attention import START_STEP

from . import diffusers_models
from .cases import EditCase
from .method import PREPARATION, Checkpoint, Method, MethodSettings
from .stock_methods import eight_channel_checkpoint

diffusers.utils.logging.set_verbosity_error()


def components(checkpoint: Checkpoint, settings: MethodSettings) -> dict[str, Any]:
    """The checkpoint's parts for diffusers' pipelines; made once, at no one's cost."""

    def make() -> dict[str, Any]:
        return diffusers_models.components(checkpoint.model, checkpoint.clip, checkpoint.vae, checkpoint.size)

    made = settings.work.once(("diffusers", checkpoint.path), make, PREPARATION)
    # A scheduler remembers its timesteps: everyone gets one of their own.
    return {**made, "scheduler": diffusers_models.scheduler()}


def pipeline(kind: Any, parts: dict[str, Any]) -> Any:
    made = kind(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def as_input(case: EditCase, size: int) -> torch.Tensor:
    """The image as diffusers' pipelines take it, [1, 3, H, W] in [0, 1]."""
    return case.load_image(size).permute(0, 3, 1, 2)


def as_image(made: torch.Tensor) -> torch.Tensor:
    """[1, 3, H, W] in [0, 1] to [1, H, W, 3]."""
    return made.detach().float().cpu().permute(0, 2, 3, 1).clamp(0, 1)


def generator(settings: MethodSettings) -> torch.Generator:
    return torch.Generator().manual_seed(settings.seed)


def img2img(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """As many steps as KSampler makes: the pipeline leaves out the part of its steps that `strength` does."""
    pipe = pipeline(diffusers.StableDiffusionImg2ImgPipeline, components(checkpoint, settings))
    made = pipe(
        prompt=case.target_prompt, image=as_input(case, checkpoint.size), strength=settings.strength,
        num_inference_steps=int(settings.steps / settings.strength), guidance_scale=settings.guidance_scale,
        generator=generator(settings), output_type="pt",
    )  # fmt: skip
    return as_image(made.images)


def diffedit(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    parts = components(checkpoint, settings)
    inverse = diffusers.DDIMInverseScheduler.from_config(parts["scheduler"].config)
    pipe = pipeline(diffusers.StableDiffusionDiffEditPipeline, {**parts, "inverse_scheduler": inverse})
    image = as_input(case, checkpoint.size)
    mask = pipe.generate_mask(
        image=image, source_prompt=case.source_prompt, target_prompt=case.target_prompt,
        num_maps_per_mask=settings.mask_seeds, mask_encode_strength=0.5, mask_thresholding_ratio=3.0,
        num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale, generator=generator(settings),
        output_type="np",
    )  # fmt: skip
    ratio = settings.encoding_ratio
    latents = pipe.invert(
        prompt="", image=image, inpaint_strength=ratio, num_inference_steps=settings.steps, guidance_scale=1.0,
        generator=generator(settings),
    ).latents  # fmt: skip
    made = pipe(
        prompt=case.target_prompt, mask_image=mask, image_latents=latents, inpaint_strength=ratio,
        num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale, generator=generator(settings),
        output_type="pt",
    )  # fmt: skip
    return as_image(made.images)


def instruct_pix2pix(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    edit = eight_channel_checkpoint(settings, checkpoint)
    parts = components(edit, settings)
    pipe = pipeline(diffusers.StableDiffusionInstructPix2PixPipeline, parts)
    made = pipe(
        prompt=case.instruction, image=as_input(case, edit.size), num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale, image_guidance_scale=settings.image_guidance_scale,
        generator=generator(settings), output_type="pt",
    )  # fmt: skip
    return as_image(made.images)


@contextlib.contextmanager
def absent_modules(*names: str) -> Iterator[None]:
    """Empty modules in the place of those that a file imports, does not need here, and that are not installed."""
    stood_in = [name for name in names if importlib.util.find_spec(name) is None]
    for name in stood_in:
        module = ModuleType(name)
        module.seed_everything = None  # type: ignore[attr-defined]
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in stood_in:
            del sys.modules[name]


@functools.lru_cache
def community_module(folder: Path, name: str) -> ModuleType:
    """One of diffusers' community pipelines, a file of its own."""
    spec = importlib.util.spec_from_file_location(f"community_{name}", folder / f"{name}.py")
    if spec is None or spec.loader is None or not (folder / f"{name}.py").is_file():
        raise FileNotFoundError(f"{folder} holds no {name}.py; name diffusers' examples/community.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def null_text(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """Its guidance scale of 7.5 is built in; the threshold is that of the paper's code (the pipeline's is 1e-6)."""
    assert settings.community is not None
    module = community_module(settings.community, "pipeline_null_text_inversion")
    parts = components(checkpoint, settings)
    # The whole network requires gradients, as a pipeline's does that nobody has frozen.
    parts["unet"].requires_grad_(True)
    try:
        pipe = pipeline(module.NullTextPipeline, parts)
        with tempfile.TemporaryDirectory() as folder:  # it keeps what it found beside the image
            image = Path(folder) / case.image.name
            shutil.copy(case.image, image)
            latent, embeddings = pipe.invert(
                str(image), case.source_prompt, num_inner_steps=10, early_stop_epsilon=1e-5,
                num_inference_steps=settings.steps,
            )  # fmt: skip
        made = pipe(
            case.target_prompt, embeddings, latent, num_inference_steps=settings.steps, guidance_scale=7.5,
            output_type="pt",
        )  # fmt: skip
    finally:
        parts["unet"].requires_grad_(False)
        for parameter in parts["unet"].parameters():
            parameter.grad = None
    return as_image(made.images)


def imagic(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """Text optimization, fine-tuning of the network (on a copy), and sampling from noise."""
    import accelerate

    assert settings.community is not None
    module = community_module(settings.community, "imagic_stable_diffusion")
    # It asks for half precision, which a processor has not, and which the other methods do not use.
    module.Accelerator = lambda **_: accelerate.Accelerator(mixed_precision="no")  # type: ignore[attr-defined]
    parts = components(checkpoint, settings)
    pipe = pipeline(module.ImagicStableDiffusionPipeline, {**parts, "unet": copy.deepcopy(parts["unet"])})
    torch.manual_seed(settings.seed)  # it draws its training noise from torch's own generator
    side = checkpoint.size
    pipe.train(
        case.target_prompt, as_input(case, side) * 2 - 1, side, side, generator(settings),
        text_embedding_optimization_steps=settings.imagic_text_steps,
        model_fine_tuning_optimization_steps=settings.imagic_model_steps,
    )  # fmt: skip
    made = pipe(
        alpha=settings.eta, height=side, width=side, num_inference_steps=settings.steps, generator=generator(settings),
        guidance_scale=settings.guidance_scale, output_type="np",
    )  # fmt: skip
    return torch.from_numpy(made.images).float().clamp(0, 1)


@functools.lru_cache
def masactrl_modules(folder: Path) -> tuple[Any, Any, Any]:
    """(pipeline, control, registration) of the reference implementation."""
    if not (folder / "masactrl" / "masactrl.py").is_file():
        raise FileNotFoundError(f"{folder} holds no masactrl/masactrl.py; name a checkout of MasaCtrl.")
    sys.path.insert(0, str(folder))
    try:
        with absent_modules("cv2", "pytorch_lightning"):
            utilities = importlib.import_module("masactrl.masactrl_utils")
            control = importlib.import_module("masactrl.masactrl")
            pipe = importlib.import_module("masactrl.diffuser_utils")
    finally:
        sys.path.remove(str(folder))
    return pipe.MasaCtrlPipeline, control.MutualSelfAttentionControl, utilities.regiter_attention_editor_diffusers


def masactrl(checkpoint: Checkpoint, case: EditCase, settings: MethodSettings) -> torch.Tensor:
    """Its "real editing" with the inversion's own latents for the source, guidance 1 in the inversion.

    Its numbers are for a UNet of 16 layers and 50 steps; here they are the same places of this UNet and this run.
    """
    assert settings.masactrl is not None
    pipeline_class, control_class, register = masactrl_modules(settings.masactrl)
    parts = components(checkpoint, settings)
    pipe = pipeline(pipeline_class, {**parts, "unet": copy.deepcopy(parts["unet"])})
    size, steps = checkpoint.size, settings.steps
    network = checkpoint.model.get_model_object("diffusion_model")
    own = [layer.key for layer in attention_layers(network) if layer.attends_to_itself]
    layers = [own.index(key) for key in mutual_layers(network)]
    with contextlib.redirect_stdout(None):
        image = as_input(case, size) * 2 - 1
        last, latents = pipe.invert(
            image, case.source_prompt, num_inference_steps=steps, guidance_scale=1.0, return_intermediates=True
        )
        editor = control_class(round(START_STEP * steps), layer_idx=layers, total_steps=steps)
        register(pipe, editor)
        made = pipe(
            [case.source_prompt, case.target_prompt], latents=last.expand(2, -1, -1, -1), height=size, width=size,
            num_inference_steps=steps, guidance_scale=settings.guidance_scale, ref_intermediate_latents=latents,
        )  # fmt: skip
    return as_image(made[-1:])


METHODS = {
    "diffusers-img2img": Method("diffusers", "StableDiffusionImg2ImgPipeline", "diffusers", img2img),
    "diffusers-diffedit": Method(
        "diffusers", "StableDiffusionDiffEditPipeline", "diffusers; Couairon et al. 2023", diffedit
    ),
    "diffusers-instruct-pix2pix": Method(
        "diffusers", "StableDiffusionInstructPix2PixPipeline", "diffusers; Brooks et al. 2023", instruct_pix2pix,
        ("mcdm", "instruction"),
    ),
    "community-null-text": Method(
        "community", "NullTextPipeline and the target prompt, guidance 7.5", "diffusers; Mokady et al. 2023",
        null_text, ("community",),
    ),
    "community-imagic": Method(
        "community", "ImagicStableDiffusionPipeline", "diffusers; Kawar et al. 2023", imagic, ("community",)
    ),
    "reference-masactrl": Method(
        "reference", "the authors' MasaCtrlPipeline", "Cao et al. 2023", masactrl, ("masactrl",)
    ),
}  # fmt: skip
