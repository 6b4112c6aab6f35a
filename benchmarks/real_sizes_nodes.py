"""What the benchmark real_sizes runs: each node of the pack that touches a model, with the fewest steps it can take.

A row is a function of `Models`, named in real_sizes.ROWS. What it needs beside its nodes (an inversion, a sampler) is
the pack's or stock too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from comfy_extras import nodes_custom_sampler as samplers
from comfy_extras.nodes_model_advanced import ModelComputeDtype
from identity_edit_pack.nodes import NODE_CLASSES
from identity_edit_pack.pipelines.lipe.identity_prior import attention_keys
from identity_edit_pack.pipelines.pidiff.w_plus import WPlus
from identity_edit_pack.pipelines.training.weights import ATTENTION, LOW_RANK

import nodes as stock

from .real_sizes_checkpoints import write_untrained_mcdm

PREFIX = "IdentityEdit"
PACK = {node.GET_SCHEMA().node_id: node for node in NODE_CLASSES}
SOURCE_PROMPT, TARGET_PROMPT, CLASS_WORD = "a photo of a cat on a sofa", "a photo of a dog on a sofa", "cat"
SAMPLING = "sampling with it"
MODEL_SOCKETS = {"MODEL", "CLIP", "VAE", "CLIP_VISION"}
CHOSEN_BY_COMFYUI = "as ComfyUI chooses"
BYTES_OF_A_TRAINED_WEIGHT = 16
"""Itself, its gradient and AdamW's two moments, each in float32."""


class TooLargeError(Exception):
    """A training needs more memory than there is."""


class NotFiniteError(Exception):
    """A node gave NaN or infinite values."""


@dataclass
class Models:
    """A loaded checkpoint of a family, and what rows do with it.

    Attributes:
        family: "sd15", "sd21" or "sdxl".
        dtype: in which the UNet computes and trainings are done; CHOSEN_BY_COMFYUI leaves it to ComfyUI, which takes
            float32 on a CPU, and trainings to their default.
        memory_gib: what trained weights may take at most.
        size: pixels of an image's side.
        seconds: by what ran.
    """

    family: str
    dtype: str
    memory_gib: float = 0.0
    size: int = 512
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.load(f"{self.family}.safetensors")

    def load(self, file: str) -> None:
        model, self.clip, self.vae = stock.CheckpointLoaderSimple().load_checkpoint(file)
        short = {"bfloat16": "bf16", "float32": "fp32"}
        self.model = ModelComputeDtype().patch(model, short[self.dtype])[0] if self.dtype in short else model

    def at_size(self, size: int) -> Models:
        """The same models for another row."""
        row = copy.copy(self)
        row.size, row.seconds = size, {}
        return row

    def clip_vision(self) -> Any:
        return stock.CLIPVisionLoader().load_clip("vision.safetensors")[0]

    def prompt(self, text: str) -> Any:
        return stock.CLIPTextEncode().encode(self.clip, text)[0]

    def latent(self, width: int = 1, batch: int = 1) -> dict[str, Any]:
        """An image's latent; `width` images side by side."""
        cells = self.size // 8
        generator = torch.Generator().manual_seed(1)
        return {"samples": torch.randn(batch, 4, cells, cells * width, generator=generator)}

    def images(self, count: int, size: int | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        side = size or self.size
        coarse = torch.rand(count, 3, 8, 8, generator=generator)
        return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").movedim(1, 3)

    def mask(self, size: int | None = None) -> torch.Tensor:
        side = size or self.size
        mask = torch.zeros(1, side, side)
        mask[:, side // 4 : -side // 4, side // 4 : -side // 4] = 1.0
        return mask

    def subject(self, size: int) -> Any:
        """Two images, through the pack's own node, which takes lists."""
        caption = f"a photo of a sks {CLASS_WORD}"
        settings = {"class_word": [CLASS_WORD], "token": ["sks"], "add_token": [False]}
        images = {"images": [self.images(2, size)], "captions": [f"{caption}\n{caption} on a sofa"]}
        return self.run("SubjectFromImages", **images, **settings, masks=[self.mask(size).expand(2, -1, -1)])[0]

    def inversion(self, steps: int = 1) -> Any:
        return self.run("NoiseInversion", steps=steps)[0]

    def null_text(self, checkpointing: bool = True, **settings: Any) -> tuple[Any, ...]:
        settings |= {"inner_steps": 1, "checkpointing": checkpointing}
        return self.run("NullTextOptimization", inversion=self.inversion(), negative=self.prompt(""), **settings)

    @property
    def pair_folder(self) -> str:
        return f"pairs/{self.family}_{self.size}"

    def check_memory(self, trained: int) -> None:
        """Raise TooLargeError when so many trained weights do not fit into memory."""
        gib = BYTES_OF_A_TRAINED_WEIGHT * trained / 2**30
        if gib > self.memory_gib:
            raise TooLargeError(
                f"{trained / 1e6:.0f} million trained weights take {gib:.1f} GiB ({BYTES_OF_A_TRAINED_WEIGHT} bytes "
                f"each) beside the model, and {max(0.0, self.memory_gib):.1f} GiB were left for them"
            )

    def run(self, name: str, /, **inputs: Any) -> tuple[Any, ...]:
        """A node's outputs; inputs that are not given have the schema's defaults, and required ones the checkpoint's
        parts, the prompts and a latent."""
        node = PACK[PREFIX + name]
        schema = node.GET_SCHEMA()
        defaults = {each.id: each.default for each in schema.inputs if getattr(each, "default", None) is not None}
        for each in schema.inputs:
            if each.id in USUAL and not each.optional and each.id not in inputs:
                defaults[each.id] = USUAL[each.id](self)
        begin = time.perf_counter()
        outputs = node.execute(**{**defaults, **inputs}).args
        self._add(schema.display_name, time.perf_counter() - begin)
        check_finite(outputs, schema.display_name)
        return tuple(outputs)

    def sample(
        self,
        model: Any,
        positive: Any = None,
        latent: dict[str, Any] | None = None,
        sigmas: torch.Tensor | None = None,
        sampler: Any = None,
        guider: Any = None,
        negative: Any = None,
        add_noise: bool = True,
    ) -> torch.Tensor:
        """The stock SamplerCustomAdvanced, one step of euler where nothing else is said."""
        if guider is None:
            positive = self.prompt(TARGET_PROMPT) if positive is None else positive
            negative = self.prompt("") if negative is None else negative
            guider = samplers.CFGGuider.execute(model, positive, negative, 7.5).args[0]
        if sigmas is None:
            sigmas = samplers.BasicScheduler.execute(model, "normal", 1, 1.0).args[0]
        noise = (samplers.RandomNoise.execute(5) if add_noise else samplers.DisableNoise.execute()).args[0]
        sampler = sampler or comfy.samplers.sampler_object("euler")
        begin = time.perf_counter()
        sampled = samplers.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent or self.latent())
        self._add(SAMPLING, time.perf_counter() - begin)
        check_finite(sampled.args, SAMPLING)
        return sampled.args[0]["samples"]

    def _add(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds


USUAL: dict[str, Callable[[Models], Any]] = {
    "model": lambda models: models.model,
    "clip": lambda models: models.clip,
    "vae": lambda models: models.vae,
    "source": lambda models: models.prompt(SOURCE_PROMPT),
    "target": lambda models: models.prompt(TARGET_PROMPT),
    "latent": Models.latent,
}


def nodes_with_models() -> list[str]:
    """Display names of the pack's nodes that take a model of any kind."""
    schemas = [node.GET_SCHEMA() for node in PACK.values()]
    return [
        schema.display_name for schema in schemas if any(each.get_io_type() in MODEL_SOCKETS for each in schema.inputs)
    ]


def check_finite(outputs: Iterable[Any], name: str) -> None:
    """Raise NotFiniteError when a tensor among a node's outputs is not finite."""
    for output in outputs:
        for tensor in tensors_in(output):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NotFiniteError(f"{name} gave NaN or infinite values")


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors inside of a node's output; networks are left out."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors_in(part)]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


def in_output_folder(path: str) -> str:
    """The name under which a loader lists a file of the output folder."""
    folder = Path(path).parent
    return f"{folder.name}/{Path(path).name} [output]"


def invert_image(models: Models) -> None:
    path = models.run("SaveInversion", inversion=models.inversion())[0]
    models.run("LoadInversion", file=in_output_folder(path))


def edit_friendly(models: Models) -> None:
    inversion = models.run("EditFriendlyDDPMInversion", steps=2, negative=models.prompt(""))[0]
    sampler, sigmas, start, _ = models.run("InversionSampler", inversion=inversion, skip=0.5)
    models.sample(models.model, latent=start, sigmas=sigmas, sampler=sampler, add_noise=False)


def null_text(models: Models) -> None:
    model, negative, found, latent, _ = models.null_text()
    models.sample(model, models.prompt(SOURCE_PROMPT), latent, found.sigmas, negative=negative, add_noise=False)


def null_text_adaptive(models: Models) -> None:
    models.null_text(method="null-text optimization (adaptive)")


def null_text_without_checkpointing(models: Models) -> None:
    models.null_text(checkpointing=False)


def negative_prompt_inversion(models: Models) -> None:
    models.null_text(method="negative-prompt inversion (fast)")


def optimize_text_embedding(models: Models) -> None:
    optimized = models.run("OptimizeTextEmbedding", steps=1, checkpointing=True)[0]
    prompts = {"ratio": 0.5, "optimized": optimized, "negative": models.prompt("")}
    models.run("TimestepAwareTextInjectionSampler", inversion=models.inversion(2), **prompts)


def text_injection(models: Models) -> None:
    inversion = models.inversion(2)
    positive = models.run("TimestepAwareTextInjection", sigmas=inversion.sigmas, ratio=0.5)[0]
    start = {"samples": inversion.start_latent(models.model)}
    models.sample(models.model, positive, start, inversion.sigmas, add_noise=False)


def text_injection_model(models: Models) -> None:
    sigmas = samplers.BasicScheduler.execute(models.model, "normal", 2, 1.0).args[0]
    model, positive = models.run("TimestepAwareTextInjectionModel", sigmas=sigmas, ratio=0.5)
    models.sample(model, positive, sigmas=sigmas)


def identity_attention(models: Models) -> None:
    model, found = models.run("IdentityAttention", identity_prompt=CLASS_WORD)
    models.sample(model)
    models.run("AttentionHeatmap", image=models.images(1), identity_attention=found)


def mask_blend(models: Models) -> None:
    settings = {"identity_prompt": CLASS_WORD, "negative": models.prompt("")}
    models.run("IdentityAwareMaskBlend", inversion=models.inversion(), **settings)


def segment_subject(models: Models) -> None:
    settings = {"subject": CLASS_WORD, "timesteps": "101", "longest_side": models.size}
    models.run("SegmentSubject", images=models.images(1), vae=models.vae, **settings)


def training(models: Models, **more: Any) -> dict[str, Any]:
    chosen = {} if models.dtype == CHOSEN_BY_COMFYUI else {"precision": models.dtype}
    return {"steps": 1, "training_settings": models.run("TrainingSettings", batch_size=1, **chosen, **more)[0]}


def identity_prior(models: Models) -> None:
    of_model, of_clip = attention_keys(models.model, models.clip)
    weights = {**models.model.model.state_dict(), **models.clip.patcher.model.state_dict()}
    models.check_memory(sum(weights[key].numel() for key in (*of_model, *of_clip)))
    train_and_use_prior(models, ATTENTION)


def identity_prior_of_low_rank(models: Models) -> None:
    train_and_use_prior(models, LOW_RANK)


def train_and_use_prior(models: Models, weights: str) -> None:
    settings = {**training(models), "weights": weights, "subject": models.subject(models.size)}
    path = models.run("TrainIdentityPrior", vae=models.vae, **settings)[5]
    file = in_output_folder(path)
    model, clip, prompt, _ = models.run("LoadIdentityPrior", file=file)
    models.sample(model, stock.CLIPTextEncode().encode(clip, prompt)[0])
    models.run("SaveIdentityPriorAsLoRA", file=file, rank=1)


def subject_embedding(models: Models) -> None:
    settings = {"updates_per_step": 1, "sampling_steps": 1, "images": models.subject(models.size)}
    path = models.run("TrainSubjectEmbedding", **training(models), vae=models.vae, **settings)[3]
    learned, name, _ = models.run("StepWiseEmbeddingLoader", file=in_output_folder(path))
    model, positive, _ = models.run("ApplySubject", subject=learned, prompt=f"a photo of a {name}")
    models.sample(model, positive)


def subject_word(models: Models) -> None:
    settings = {"kind": "word", "updates_per_step": 0, "images": models.subject(models.size)}
    learned = models.run("TrainSubjectEmbedding", **training(models), vae=models.vae, **settings)[0]
    models.run("SaveSubjectAsEmbedding", subject=learned, name=f"random_{models.family}", overwrite=True)
    prompt = f"a photo of a {learned.token} {learned.class_word}"
    model, positive, _ = models.run("ApplySubject", subject=learned, prompt=prompt)
    models.sample(model, positive)


def select_reference(models: Models) -> None:
    images = {"generated": models.images(1), "images": models.images(2)}
    masks = {"masks": models.mask().expand(2, -1, -1), "generated_mask": models.mask()}
    models.run("SelectReference", **images, **masks, encoder="CLIP_VISION input", clip_vision=models.clip_vision())


def reference_guidance(models: Models) -> None:
    settings = {"start_percent": 0.0, "end_percent": 1.0, "inner_steps": 1, "checkpointing": True}
    inputs = {"positive": models.prompt(TARGET_PROMPT), "negative": models.prompt(""), "latent": models.latent()}
    inversion, mask = models.inversion(), models.mask()
    models.run("ReferenceGuidedNullTextOptimizer", inversion=inversion, mask=mask, **inputs, **settings)


def mutual_self_attention(models: Models) -> None:
    inversion = models.inversion()
    settings = {"start_step": 0.0, "source_mask": models.mask(), "target_mask": models.mask()}
    model = models.run("MutualSelfAttention", inversion=inversion, **settings)[0]
    start = {"samples": inversion.start_latent(models.model)}
    models.sample(model, latent=start, sigmas=inversion.sigmas, add_noise=False)


def prompt_to_prompt(models: Models) -> None:
    prompts = {"source_prompt": SOURCE_PROMPT, "target_prompt": TARGET_PROMPT}
    settings = {"blend_words": "cat dog", "blend_start": 0.0, "reweight": "dog: 2"}
    models.sample(*models.run("PromptToPrompt", **prompts, **settings))


def replace_subject(models: Models) -> None:
    found = models.null_text(method="negative-prompt inversion (fast)")[2]
    prompts = {"source_prompt": SOURCE_PROMPT, "target_prompt": TARGET_PROMPT}
    models.run("ReplaceSubject", inversion=found, local_blend=True, guidance_scale=7.5, **prompts)


def pair_guider(models: Models) -> None:
    shared = models.prompt("the same cat on the left and right")
    guider = models.run("PairGuider", shared=shared, negative=models.prompt(""))[0]
    models.sample(models.model, latent=models.latent(width=2), guider=guider)


def generate_pairs(models: Models) -> None:
    sigmas = samplers.BasicScheduler.execute(models.model, "normal", 1, 1.0).args[0]
    sampling = {"sampler": comfy.samplers.sampler_object("euler"), "sigmas": sigmas}
    size = {"count": 1, "width": models.size, "height": models.size, "folder": models.pair_folder}
    check = {"smallest_similarity": 0.01, "attempts": 1, "clip_vision": models.clip_vision()}
    nodes = {"prompts": models.run("PairPrompts")[0], "settings": models.run("PairSettings", **check)[0]}
    models.run("GeneratePairs", **sampling, **size, **nodes)


def identity_words(models: Models) -> None:
    subject, vision = models.subject(models.size), models.clip_vision()
    settings = {"images": subject, "clip_vision": vision}
    path = models.run("TrainIdentityWords", **training(models), vae=models.vae, **settings)[2]
    words = models.run("LoadIdentityWords", file=in_output_folder(path))[0]
    seen = stock.CLIPVisionEncode().encode(vision, models.images(1), "none")[0]
    inputs = {"identity_words": words, "clip_vision_output": seen, "prompt": f"a photo of a {CLASS_WORD}"}
    models.sample(models.model, models.run("ApplyIdentityWords", **inputs)[0])


def train_mcdm(models: Models) -> None:
    network = models.model.get_model_object("diffusion_model")
    models.check_memory(sum(weight.numel() for weight in network.parameters()))
    generate_pairs(models)
    settings = training(models, ema_decay=0.0)
    models.run("TrainMCDM", **settings, clip_vision=models.clip_vision(), folder=models.pair_folder)


def mcdm_editing(models: Models) -> None:
    """With the file of an MCDM that was not trained: the checkpoint's weights, and an image embedding as it begins."""
    file = f"mcdm_{models.family}.safetensors"
    path = Path(stock.folder_paths.folder_names_and_paths["checkpoints"][0][0]) / file
    vision = models.clip_vision()
    write_untrained_mcdm(models.model, models.clip, models.vae, vision, path, models.size)
    models.load(file)
    prompts = {"target_prompt": TARGET_PROMPT, "source_prompt": SOURCE_PROMPT}
    inputs = {"clip_vision": vision, "image": models.images(1), "file": file, **prompts}
    positive, negative, source, latent, _ = models.run("MCDMConditioner", **inputs)
    settings = {"seeds": 1, "steps": 2, "noise_steps": 1}
    mask = models.run("MCDMEditMask", source=source, target=positive, latent=latent, **settings)[0]
    guided = {"positive": positive, "negative": negative, "source": source, "mask": models.mask()}
    models.sample(models.model, guider=models.run("MCDMGuider", **guided)[0], latent=latent)
    if mask.shape[1:] != (models.size, models.size):
        raise AssertionError(f"the mask is {tuple(mask.shape)}")


def diffedit(models: Models) -> None:
    models.run("MCDMEditMask", source=models.prompt(SOURCE_PROMPT), seeds=1, steps=2, noise_steps=1)
    settings = {"negative": models.prompt(""), "mask": models.mask(), "encoding_ratio": 1.0}
    models.run("DiffEdit", inversion=models.inversion(), **settings)


def style_attention(models: Models) -> None:
    rows = torch.randn(2, 18, 512, generator=torch.Generator().manual_seed(4))
    person, one = (WPlus(each, torch.zeros(18, 512), "random") for each in (rows, rows[:1]))
    settings = {"images": models.subject(models.size), "w_plus": person}
    path = models.run("TrainStyleAttention", **training(models), vae=models.vae, **settings)[3]
    loaded = models.run("LoadStyleAttention", file=in_output_folder(path))[0]
    models.sample(models.run("ApplyStyleCrossAttention", style_attention=loaded, w_plus=one)[0])


def plain(models: Models) -> None:
    models.sample(models.model)
