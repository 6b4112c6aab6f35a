"""For every node inputs that it takes, on models so small that it runs in milliseconds.

`test_bad_inputs` changes them one by one. A node that has no entry in `GOOD` fails there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
import numpy as np
import tiny_styles
import torch
from identity_edit_pack.attention.capture import IdentityAttention
from identity_edit_pack.nodes import NODE_CLASSES
from identity_edit_pack.nodes.hifi_tuner import segmentation
from identity_edit_pack.nodes.mcdm import train_mcdm
from identity_edit_pack.nodes.pidiff import face
from identity_edit_pack.pipelines.engine import edit_model
from identity_edit_pack.pipelines.faces import detection as faces
from identity_edit_pack.pipelines.faces import similarity as identity_similarity
from identity_edit_pack.pipelines.hifi_tuner import subject_embedding, subject_files
from identity_edit_pack.pipelines.inversion import edit_friendly as edit_friendly_inversion
from identity_edit_pack.pipelines.inversion import inversion as inversions
from identity_edit_pack.pipelines.inversion import null_text
from identity_edit_pack.pipelines.lipe import identity_prompt
from identity_edit_pack.pipelines.mcdm import identity_words, pair_dataset
from identity_edit_pack.pipelines.mcdm import model as mcdm
from identity_edit_pack.pipelines.mcdm.pair_folder import PairFolder
from identity_edit_pack.pipelines.pidiff import style_attention_files, w_plus_encoder
from identity_edit_pack.pipelines.pidiff import w_plus as w_plus_rows
from identity_edit_pack.pipelines.subjects.images import SubjectImages
from identity_edit_pack.pipelines.text import step_embeddings
from identity_edit_pack.tests import tiny_models, tiny_text_encoders, tiny_vision
from identity_edit_pack.tests.attention.sampling import sample

SIDE = 64
"""Pixels along a side of the images; latents have 8 cells."""
POINTS = np.array([[20.0, 24.0], [40.0, 24.0], [30.0, 34.0], [22.0, 44.0], [38.0, 44.0]])
CLASSES = {node.define_schema().node_id.removeprefix("IdentityEdit"): node for node in NODE_CLASSES}


class Detector:
    """Finds one face at known points."""

    name = "given"

    def detect(self, image: np.ndarray) -> list[faces.Face]:
        return [faces.Face((16.0, 16.0, 44.0, 52.0), POINTS, 0.9)]


class Recognizer:
    """Embeds a face by the color of its middle."""

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images[:, 40:80, 40:80].mean(dim=(1, 2)), dim=1)


class Segmenter:
    """Segments the middle of any image."""

    def by_prompt(self, image: torch.Tensor, prompt: Any) -> segmentation.pipeline.Segment:
        mask = torch.zeros(image.shape[:2], dtype=torch.bool)
        height, width = mask.shape
        mask[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
        return segmentation.pipeline.Segment(mask, 0.9)

    def everything(self, image: torch.Tensor) -> list[segmentation.pipeline.Segment]:
        return [self.by_prompt(image, None)]


class VAE(tiny_vision.VAE):
    """As strict as ComfyUI's own: an image without its three channels is an error deep inside of a network."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        assert images.ndim == 4 and images.shape[-1] == 3, tuple(images.shape)
        height, width = (side // 8 * 8 for side in images.shape[1:3])
        top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
        return super().encode(images[:, top : top + height, left : left + width].float())


class World:
    """Everything that nodes are given; made once, where it is first asked for. Files lie in ComfyUI's folders."""

    @functools.cached_property
    def model(self) -> Any:
        return tiny_models.sd1(output_gain=0.1)

    @functools.cached_property
    def other_model(self) -> Any:
        return tiny_models.sd1(seed=3, output_gain=0.1)

    @functools.cached_property
    def edit_model(self) -> Any:
        return edit_model.as_edit_model(tiny_models.sd1(seed=4, output_gain=0.1))

    @functools.cached_property
    def clip(self) -> Any:
        return tiny_text_encoders.clip("sd1")

    @functools.cached_property
    def clip_vision(self) -> Any:
        return tiny_vision.clip_vision()

    vae = VAE()

    @functools.cached_property
    def images(self) -> torch.Tensor:
        return torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(2))

    @functools.cached_property
    def mask(self) -> torch.Tensor:
        mask = torch.zeros(1, SIDE, SIDE)
        mask[:, 16:56, 12:50] = 1.0
        return mask

    @functools.cached_property
    def latent(self) -> dict[str, Any]:
        return {"samples": tiny_models.latent(4)}

    @staticmethod
    def conditioning(seed: int, tokens: int = tiny_models.TOKENS) -> list[Any]:
        return tiny_models.conditioning(seed, tokens=tokens)

    def conditioning_with_image(self, seed: int) -> list[Any]:
        """As MCDM Conditioner gives it: three tokens of the image behind those of the text."""
        seen = mcdm.SourceImages(
            self.latent["samples"], torch.randn(1, 3, tiny_models.CONTEXT, generator=torch.Generator().manual_seed(6))
        )
        return mcdm.with_images(self.conditioning(seed), seen)

    @functools.cached_property
    def inversion(self) -> inversions.Inversion:
        return inversions.invert_image(self.model, self.latent["samples"], self.conditioning(1), steps=2)

    @functools.cached_property
    def inversion_with_embeddings(self) -> inversions.Inversion:
        found = null_text.null_text_optimization(
            self.model, self.inversion, self.conditioning(1), self.conditioning(3), guidance_scale=3.0, inner_steps=1
        )
        return self.inversion.with_embeddings(found.embeddings)

    @functools.cached_property
    def inversion_of_words(self) -> inversions.Inversion:
        """With CLIP's own 77 tokens, for nodes that encode prompts."""
        empty = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(""))
        made = inversions.invert_image(self.model, self.latent["samples"], empty, steps=2)
        embedding = empty[0][0]
        table = step_embeddings.StepEmbeddings(
            sigmas=made.sigmas, embeddings=embedding[None].expand(2, -1, -1, -1).clone(), guidance_scale=3.0
        )
        return made.with_embeddings(table)

    @functools.cached_property
    def ddpm_inversion(self) -> inversions.Inversion:
        return edit_friendly_inversion.edit_friendly_ddpm_inversion(
            self.model, self.latent["samples"], self.conditioning(1), self.conditioning(3), steps=3, guidance_scale=3.5
        )

    @functools.cached_property
    def sigmas(self) -> torch.Tensor:
        return self.inversion.sigmas.clone()

    @functools.cached_property
    def subject(self) -> SubjectImages:
        generator = torch.Generator().manual_seed(0)
        return SubjectImages(
            images=[torch.rand(SIDE, SIDE, 3, generator=generator) for _ in range(2)],
            captions=["a sks cat sitting", "a smiling sks cat"],
            masks=[self.mask[0].clone() for _ in range(2)],
            names=["1.png", "2.png"],
            class_word="cat",
            token="sks",
        )

    @functools.cached_property
    def subject_embedding(self) -> subject_embedding.SubjectEmbedding:
        generator = torch.Generator().manual_seed(1)
        return subject_embedding.SubjectEmbedding(
            kind=subject_embedding.WORD,
            vectors={"clip_l": torch.randn(2, tiny_models.CONTEXT, generator=generator)},
            class_word="cat",
            token="sks",
        )

    @functools.cached_property
    def identity_words(self) -> identity_words.IdentityWords:
        widths = {"clip_l": tiny_models.CONTEXT}
        with torch.inference_mode(False):
            torch.manual_seed(0)
            encoder = identity_words.IdentityEncoder(tiny_vision.WIDTH, widths, 2).requires_grad_(False)
        return identity_words.IdentityWords(encoder, 2, widths, (tiny_vision.TOKENS, tiny_vision.WIDTH), "cat")

    @functools.cached_property
    def clip_vision_output(self) -> Any:
        return self.clip_vision.encode_image(self.images)

    @functools.cached_property
    def w_plus(self) -> w_plus_rows.WPlus:
        return tiny_styles.w_plus()

    @functools.cached_property
    def w_plus_encoder(self) -> w_plus_encoder.WPlusEncoder:
        return w_plus_encoder.load_w_plus_encoder(self.model_file("w_plus_encoders", "tiny.safetensors"))

    @functools.cached_property
    def style_attention(self) -> Any:
        return tiny_styles.style_attention(self.model)

    @functools.cached_property
    def identity_attention(self) -> IdentityAttention:
        identity = identity_prompt.encode_identity_prompt(self.clip, "a cat", "cat")
        model, attention = identity_prompt.capture_identity(self.model, identity, "all", by_step=True)
        sample(model, self.latent["samples"])
        return attention

    @functools.cached_property
    def sampler(self) -> Any:
        return comfy.samplers.sampler_object("euler")

    def example(self, kind: str) -> Any:
        """A value for a socket that a node's good inputs leave free."""
        examples = {"IMAGE": self.images, "W_PLUS": self.w_plus, "SUBJECT_IMAGES": self.subject}
        return {**examples, "SIGMAS": torch.tensor([14.0, 3.0, 0.0])}.get(kind)

    # -- files ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def model_file(folder: str, name: str) -> str:
        """The path of a file in ComfyUI's models, which are in a folder of the tests."""
        path = Path(folder_paths.models_dir, folder, name)
        if not path.exists():
            torch.manual_seed(0)
            network = w_plus_encoder.SmallWPlusEncoder(
                size=32, groups=((2, 3), (4, 1)), width=6, channels=(8, 16, 16), hidden=12, grid=2
            )
            w_plus_encoder.save_w_plus_encoder(str(path), network, torch.randn(6, 6), "tiny")
        return str(path)

    @staticmethod
    def saved(name: str, save: Callable[[str], Any]) -> str:
        """A file below the output folder, as combos name it."""
        path = Path(folder_paths.get_output_directory(), name)
        if not path.exists():
            save(str(path))
        return f"{name} [output]"

    def saved_prior(self) -> str:
        name = "identity_priors/prior_00001_.safetensors"
        if not Path(folder_paths.get_output_directory(), name).exists():
            CLASSES["TrainIdentityPrior"].execute(**good(self, "TrainIdentityPrior"))
        return f"{name} [output]"

    def saved_mcdm(self) -> str:
        """A checkpoint that knows its image embedding."""
        folder = Path(folder_paths.get_output_directory(), "checkpoints")
        if not list(folder.glob("mcdm*")):
            CLASSES["TrainMCDM"].execute(**good(self, "TrainMCDM"))
        folder_paths.filename_list_cache.clear()
        return f"{next(folder.glob('mcdm*')).name} [diffusion_models]"

    def pair_folder(self) -> str:
        path = Path(folder_paths.get_output_directory(), "pairs", "mine")
        if not (path / "index.jsonl").exists():
            generator = torch.Generator().manual_seed(0)
            shown = torch.rand(2, 3, SIDE, SIDE, 3, generator=generator)
            pair_dataset.save_pairs(
                PairFolder(path), shown[0], shown[1], source_prompt="a cat, calm", target_prompt="a cat, laughing",
                edit="laughing", validation_share=0.0,
            )  # fmt: skip
        return "pairs/mine"

    def image_folder(self) -> str:
        from PIL import Image

        folder = Path(folder_paths.get_input_directory(), "cat")
        if not folder.exists():
            folder.mkdir()
            for name, image in zip(("1", "2"), self.subject.images, strict=True):
                Image.fromarray((image * 255).byte().numpy()).save(folder / f"{name}.png")
                (folder / f"{name}.txt").write_text("a sks cat")
        return "cat"


def world_in(root: Path, patch: Any) -> World:
    """A world whose files are below `root`: ComfyUI's folders are there until `patch`, pytest's, undoes it."""
    for name in ("output", "input", "temp"):
        (root / name).mkdir()
        patch.setattr(folder_paths, f"{name}_directory", str(root / name))
    patch.setattr(folder_paths, "models_dir", str(root / "models"))
    known = dict(folder_paths.folder_names_and_paths)
    for name in ("w_plus_encoders", "embeddings", "subject_embeddings", "style_attention"):
        (root / "models" / name).mkdir(parents=True)
        known[name] = ([str(root / "models" / name)], {".safetensors", ".pt", ".pth", ".bin"})
    (root / "output" / "checkpoints").mkdir()
    for name in ("checkpoints", "diffusion_models"):
        known[name] = ([str(root / "output" / "checkpoints")], {".safetensors"})
    patch.setattr(folder_paths, "folder_names_and_paths", known)
    patch.setattr(folder_paths, "filename_list_cache", {})
    # Their networks are files that a test has not; what the nodes do with them is tested.
    patch.setattr(face.pipeline, "load_detector", lambda name, score: Detector())
    patch.setattr(identity_similarity, "load_recognizer", lambda name: Recognizer())
    (root / "models" / "sams").mkdir()
    (root / "models" / "sams" / "given.pth").touch()
    patch.setattr(segmentation.pipeline, "load_segmenter", lambda path: contextlib.nullcontext(Segmenter()))
    return World()


TRAINING: dict[str, Any] = {"precision": "float32", "checkpointing": False, "sample_every": 0, "batch_size": 1}
PROMPTS = {"source_prompt": "a cat on the grass", "target_prompt": "a dog on the grass"}


def _edit(world: World) -> dict[str, Any]:
    return {"model": world.model, "source": world.conditioning(1), "target": world.conditioning(2)}


def grouped(inputs: dict[str, Any], **nodes: str) -> dict[str, Any]:
    """Inputs of a node, those of other nodes among them replaced by what these nodes give for them.

    nodes: the node by the input that it is connected to.
    """
    items = {socket: CLASSES[name].define_schema().inputs for socket, name in nodes.items()}
    taken = {item.id for each in items.values() for item in each}
    made = {
        socket: CLASSES[name]
        .execute(
            **{item.id: item.default for item in items[socket] if getattr(item, "default", None) is not None}
            | {item.id: inputs[item.id] for item in items[socket] if item.id in inputs}
        )
        .args[0]
        for socket, name in nodes.items()
    }
    return {name: value for name, value in inputs.items() if name not in taken} | made


def with_training_settings(inputs: dict[str, Any]) -> dict[str, Any]:
    return grouped(inputs, training_settings="TrainingSettings")


def with_mcdm_settings(inputs: dict[str, Any]) -> dict[str, Any]:
    return grouped(inputs, mcdm_settings="MCDMTrainingSettings")


def with_blend_settings(inputs: dict[str, Any]) -> dict[str, Any]:
    return grouped(inputs, blend_settings="MaskBlendSettings")


def with_pair_nodes(inputs: dict[str, Any]) -> dict[str, Any]:
    return grouped(inputs, prompts="PairPrompts", conditions="PairConditions", settings="PairSettings")


def _training(world: World, **settings: Any) -> dict[str, Any]:
    parts = {"model": world.model, "clip": world.clip, "vae": world.vae, "steps": 1}
    return with_training_settings({**parts, **TRAINING, **settings})


GOOD: dict[str, Callable[[World], dict[str, Any]]] = {
    "NoiseInversion": lambda w: {
        "model": w.model, "source": w.conditioning(1), "latent": w.latent, "steps": 2, "guidance_scale": 2.0,
        "negative": w.conditioning(3),
    },
    "EditFriendlyDDPMInversion": lambda w: {
        "model": w.model, "source": w.conditioning(1), "latent": w.latent, "steps": 2, "negative": w.conditioning(3),
    },
    "InversionSampler": lambda w: {"model": w.model, "inversion": w.ddpm_inversion},
    "RFInversionSampler": lambda w: {},
    "SourceTargetGuider": lambda w: {
        "model": w.model, "source": w.conditioning(1), "target": w.conditioning(2), "negative": w.conditioning(3),
        "target_guidance_scale": 3.0,
    },
    "FlowEditSampler": lambda w: {},
    "UniEditSampler": lambda w: {},
    "DirectInversionSampler": lambda w: {"model": w.model, "inversion": w.inversion},
    "NullTextOptimization": lambda w: {
        "model": w.model, "inversion": w.inversion, "source": w.conditioning(1), "negative": w.conditioning(3),
        "inner_steps": 1,
    },
    "SaveInversion": lambda w: {"inversion": w.inversion_with_embeddings},
    "LoadInversion": lambda w: {
        "model": w.model, "latent": w.latent,
        "file": w.saved("inversions/cat.safetensors", lambda path: inversions.save_inversion(w.inversion, path)),
    },
    "OptimizeTextEmbedding": lambda w: {
        "model": w.model, "latent": w.latent, "target": w.conditioning(2), "steps": 1,
    },
    "ImagicFineTuning": lambda w: with_training_settings({
        **TRAINING, "model": w.model, "latent": w.latent, "optimized": w.conditioning(2), "steps": 1,
        "weights": "low rank", "learning_rate": 5e-4,
    }),
    "TimestepAwareTextInjection": lambda w: {**_edit(w), "sigmas": w.sigmas, "optimized": w.conditioning(5)},
    "TimestepAwareTextInjectionModel": lambda w: {**_edit(w), "sigmas": w.sigmas, "optimized": w.conditioning(5)},
    "TimestepAwareTextInjectionSampler": lambda w: {
        **_edit(w), "inversion": w.inversion, "optimized": w.conditioning(5), "negative": w.conditioning(3),
    },
    "IdentityAttention": lambda w: {
        "model": w.model, "clip": w.clip, "identity_prompt": "a cat", "identity_words": "cat", "layers": "all",
    },
    "IdentityAwareMaskBlend": lambda w: with_blend_settings({
        **_edit(w), "clip": w.clip, "inversion": w.inversion_of_words, "identity_prompt": "a cat", "layers": "all",
        "source": w.conditioning(1, 77), "target": w.conditioning(2, 77), "negative": w.conditioning(3, 77),
        "source_mask": w.mask, "target_mask": w.mask, "given_masks": "united with attention masks",
    }),
    "MaskBlendSettings": lambda w: {},
    "AttentionHeatmap": lambda w: {
        "image": w.images, "identity_attention": w.identity_attention, "mask": w.mask,
    },
    "AttentionMapsByStep": lambda w: {"image": w.images, "identity_attention": w.identity_attention},
    "SegmentSubject": lambda w: {
        "images": w.images, "subject": "cat", "timesteps": "101", "layers": "all", "model": w.model,
        "clip": w.clip, "vae": w.vae,
    },
    "SegmentSubjectWithSAM": lambda w: {
        "images": w.images, "sam": "given.pth", "grounding_dino": segmentation.NO_MODEL, "points": "20, 20",
    },
    "LoadSubjectImages": lambda w: {"folder": w.image_folder(), "class_word": "cat", "size": 32},
    "SubjectFromImages": lambda w: {
        "images": [w.images], "captions": ["a sks cat"], "class_word": ["cat"], "token": ["sks"],
        "add_token": [False], "masks": [w.mask],
    },
    "AugmentImages": lambda w: {"images": w.images, "mask": w.mask, "count": 2},
    "CaptionImages": lambda w: {"subject": w.subject, "captions": "a cat\na second cat"},
    "SaveImagesWithCaptions": lambda w: {"images": w.images, "caption": "a cat", "filename_prefix": "captioned/cat"},
    "RegularizationPrompts": lambda w: {"class_word": "cat", "count": 2},
    "TrainingSettings": lambda w: {},
    "TrainIdentityPrior": lambda w: {**_training(w), "subject": w.subject, "regularization": w.subject},
    "LoadIdentityPrior": lambda w: {"model": w.model, "clip": w.clip, "file": w.saved_prior()},
    "SaveIdentityPriorAsLoRA": lambda w: {"file": w.saved_prior(), "rank": 2},
    "TrainSubjectEmbedding": lambda w: {
        **_training(w), "images": w.subject, "updates_per_step": 1, "sampling_steps": 1,
    },
    "StepWiseEmbeddingLoader": lambda w: {
        "file": w.saved(
            "subject_embeddings/cat.safetensors", lambda path: subject_files.save_subject(w.subject_embedding, path)
        ),
    },
    "ApplySubject": lambda w: {
        "model": w.model, "clip": w.clip, "subject": w.subject_embedding, "prompt": "a sks cat",
    },
    "SaveSubjectAsEmbedding": lambda w: {"subject": w.subject_embedding, "overwrite": True},
    "SelectReference": lambda w: {
        "generated": w.images, "images": w.images, "masks": w.mask, "generated_mask": w.mask,
        "clip_vision": w.clip_vision,
    },
    "AlignReference": lambda w: {
        "reference": w.images, "reference_mask": w.mask, "generated_mask": w.mask, "generated": w.images,
    },
    "ReferenceGuidedNullTextOptimizer": lambda w: {
        "model": w.model, "positive": w.conditioning(1), "negative": w.conditioning(3), "inversion": w.inversion,
        "latent": {"samples": torch.zeros(1, 4, 8, 8)}, "mask": w.mask, "inner_steps": 1, "start_percent": 0.0,
    },
    "MutualSelfAttention": lambda w: {
        "model": w.model, "inversion": w.inversion, "source": w.conditioning(1), "negative": w.conditioning(3),
        "source_mask": w.mask, "target_mask": w.mask, "start_step": 0.0,
    },
    "PromptToPrompt": lambda w: {
        "model": w.model, "clip": w.clip, **PROMPTS, "reweight": "dog: 2", "blend_words": "cat dog",
        "inversion": w.inversion_of_words,
    },
    "ReplaceSubject": lambda w: {
        "model": w.model, "clip": w.clip, **PROMPTS, "inversion": w.inversion_of_words,
        "target": w.conditioning(2, 77), "subject_words": "dog",
    },
    "PairGuider": lambda w: {
        **_edit(w), "shared": w.conditioning(4), "negative": w.conditioning(3),
    },
    "SplitPair": lambda w: {"images": w.images, "latent": w.latent},
    "PairPrompts": lambda w: {},
    "PairConditions": lambda w: {
        "clip_vision": w.clip_vision, "identity_words": w.identity_words, "identity_images": w.images,
    },
    "PairSettings": lambda w: {"attempts": 1, "clip_vision": w.clip_vision},
    "GeneratePairs": lambda w: with_pair_nodes({
        "model": w.model, "clip": w.clip, "vae": w.vae, "sampler": w.sampler, "sigmas": w.sigmas, "count": 1,
        "width": SIDE, "height": SIDE, "folder": "pairs/made", **GOOD["PairConditions"](w), **GOOD["PairSettings"](w),
    }),
    "SavePair": lambda w: {"source": w.images, "target": w.images, "folder": "pairs/saved"},
    "TrainIdentityWords": lambda w: {
        **_training(w), "clip_vision": w.clip_vision, "images": w.subject,
    },
    "LoadIdentityWords": lambda w: {
        "file": w.saved(
            "identity_words/cat.safetensors", lambda path: identity_words.save_identity_words(w.identity_words, path)
        ),
    },
    "ApplyIdentityWords": lambda w: {
        "clip": w.clip, "identity_words": w.identity_words, "clip_vision_output": w.clip_vision_output,
        "prompt": "a cat",
    },
    "MCDMTrainingSettings": lambda w: {},
    "TrainMCDM": lambda w: with_mcdm_settings({
        **_training(w, ema_decay=0.5), "clip_vision": w.clip_vision, "folder": w.pair_folder(),
        "file_contents": train_mcdm.UNET_ALONE,
    }),
    "MCDMConditioner": lambda w: {
        "model": w.edit_model, "clip": w.clip, "clip_vision": w.clip_vision, "vae": w.vae, "image": w.images,
        "file": w.saved_mcdm(), **PROMPTS,
    },
    "MCDMGuider": lambda w: {
        "model": w.edit_model, "positive": w.conditioning_with_image(2), "mask": w.mask,
        "negative": w.conditioning_with_image(3), "source": w.conditioning_with_image(1),
    },
    "MCDMEditMask": lambda w: {**_edit(w), "latent": w.latent, "steps": 2, "noise_steps": 1, "seeds": 1},
    "DiffEdit": lambda w: {
        "model": w.model, "inversion": w.inversion, "target": w.conditioning(2), "negative": w.conditioning(3),
        "mask": w.mask,
    },
    "LoadFaceDetector": lambda w: {"detector": "given.onnx"},
    "AlignFace": lambda w: {
        "images": w.images, "face_detector": Detector(), "mask": w.mask, "size": 64, "smallest_face": 8,
        "background_model": face.NO_MODEL, "points": "\n".join(f"{x}, {y}" for x, y in POINTS),
    },
    "IdentitySimilarity": lambda w: {
        "images": w.images, "reference": w.images, "face_detector": Detector(), "recognizer": "given.onnx",
    },
    "LoadWPlusEncoder": lambda w: {"file": Path(w.model_file("w_plus_encoders", "tiny.safetensors")).name},
    "SaveWPlusEncoder": lambda w: {"encoder": w.w_plus_encoder},
    "EncodeWPlus": lambda w: {"encoder": w.w_plus_encoder, "faces": w.images[:, :32, :32]},
    "MixWPlus": lambda w: {"first": w.w_plus, "second": tiny_styles.w_plus(1), "rows": "2-3"},
    "AverageWPlus": lambda w: {"first": w.w_plus, "second": tiny_styles.w_plus(1)},
    "SaveWPlus": lambda w: {"w_plus": w.w_plus},
    "LoadWPlus": lambda w: {
        "file": w.saved("w_plus/cat.safetensors", lambda path: w_plus_rows.save_w_plus(w.w_plus, path)),
    },
    "TrainStyleAttention": lambda w: {
        **_training(w), "images": w.subject, "w_plus": tiny_styles.w_plus(images=2),
        "row_groups": tiny_styles.GROUPS,
    },
    "LoadStyleAttention": lambda w: {
        "file": w.saved(
            "style_attention/cat.safetensors",
            lambda path: style_attention_files.save_style_attention(w.style_attention, path),
        ),
    },
    "ApplyStyleCrossAttention": lambda w: {
        "model": w.model, "style_attention": w.style_attention, "w_plus": w.w_plus, "mask": w.mask,
    },
    "RegisterEdit": lambda w: {"original": w.images, "edited": 0.9 * w.images},
    "KeepTheRest": lambda w: {"original": w.images, "registered": 0.9 * w.images, "mask": w.mask},
    "SelectEdit": lambda w: {
        "original": w.images, "edits": 0.9 * w.images, "mask": w.mask, "before": 0.8 * w.images,
        "face_detector": Detector(),
    },
    "ReconstructionCheck": lambda w: {"image": w.images, "reconstruction": 0.5 * w.images},
    "ScoreEdit": lambda w: {
        "edited": 0.5 * w.images, "source": w.images, "mask": w.mask, "target_prompt": "a cat",
        "references": w.images, "models": {},
    },
    "ScoreModels": lambda w: {"clip": w.clip, "clip_vision": w.clip_vision, "face_detector": Detector()},
    "DrawDemoImage": lambda w: {"seed": 1},
    "DrawDemoPortraits": lambda w: {"count": 1},
    "LoadDemoClipVision": lambda w: {},
}  # fmt: skip


def good(world: World, name: str) -> dict[str, Any]:
    """All inputs of a node: its entry, and the defaults of what the entry does not name."""
    defaults = {
        item.id: item.default
        for item in CLASSES[name].define_schema().inputs
        if getattr(item, "default", None) is not None
    }
    return {**defaults, **GOOD[name](world)}
