"""Nodes that evaluate reconstructions and edits."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..pipelines.faces.similarity import load_recognizer
from ..pipelines.inversion import reconstruction as reconstructions
from ..pipelines.networks.model_folders import list_models, missing_model, model_path
from ..pipelines.scores import clip as clip_scores
from ..pipelines.scores import edit_scores
from ..pipelines.scores import features as feature_scores
from ..pipelines.scores import files as score_files
from ..pipelines.scores import report as score_report
from ..pipelines.scores.aesthetic import NEEDED as AESTHETIC_NEEDED
from ..pipelines.scores.aesthetic import PURPOSE as AESTHETIC_PURPOSE
from ..pipelines.scores.frechet import FEATURES, FEWEST
from ..pipelines.scores.frechet import NEEDED as INCEPTION_NEEDED
from ..pipelines.scores.frechet import PURPOSE as INCEPTION_PURPOSE
from ..pipelines.scores.lpips import BACKBONES
from ..pipelines.shared.errors import IdentityEditError
from ..pipelines.shared.images import matched_images
from .sockets import FaceDetector, blocked, checked, mask_input, recognizer_exists, recognizer_input, schema, show_text

MODEL_FOLDERS = (score_files.FOLDER,)
ENCODER_FOLDER = "image_encoders"
Models = io.Custom("SCORE_MODELS")
"""Arguments of `pipelines.scores.edit_scores.open_networks`."""
NONE, INPUTS = "none", "CLIP and CLIP_VISION inputs"


class ReconstructionCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditReconstructionCheck",
            display_name="Reconstruction Check",
            category="evaluation",
            search_aliases=["PSNR", "compare images", "image difference"],
            advanced=["lowest_psnr"],
            description="Measures how well an inversion reconstructs its image, and warns when it is too poor for "
            "an edit.",
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The image that was inverted."),
                io.Image.Input(
                    "reconstruction", tooltip="The image sampled from its inversion with the source prompt."
                ),
                io.Float.Input(
                    "lowest_psnr",
                    default=reconstructions.LOWEST_PSNR,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Warning threshold in dB. 20: Stable Diffusion's autoencoder alone reaches 25 to 30 "
                    "dB, null-text inversion almost the same, DDIM with guidance scale 7.5 less than 20.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "psnr", tooltip="Peak signal-to-noise ratio in dB, of the worst image in a batch; higher is better."
                ),
                io.String.Output("report", tooltip="PSNR of every image, and warnings."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, image: torch.Tensor, reconstruction: torch.Tensor, lowest_psnr: float) -> io.NodeOutput:
        image, reconstruction, cut = matched_images(image, reconstruction, ("image", "reconstruction"))
        values = reconstructions.psnr(image, reconstruction)
        figures = ", ".join(f"{value:.1f} dB" for value in values.tolist())
        warning = reconstructions.reconstruction_warning(values, lowest_psnr)
        text = show_text(cls, "\n".join(filter(None, [f"Reconstruction PSNR: {figures}", cut])), warning)
        return io.NodeOutput(float(values.min()), text, ui=ui.PreviewText(text))


class ScoreModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        encoders = [*list_models(ENCODER_FOLDER)]
        weights = [*score_files.files()]
        return schema(
            node_id="IdentityEditScoreModels",
            display_name="Score Models",
            category="evaluation",
            search_aliases=["CLIP score", "LPIPS", "DINO", "DINOv2", "FID", "KID", "ArcFace", "aesthetic score"],
            advanced=["dinov2", "structure", "aesthetic", "inception"],
            description="Networks for Score Edit, from local files. Each adds its scores; 'none' leaves them out.",
            inputs=[
                io.Combo.Input(
                    "lpips",
                    options=[NONE, *BACKBONES],
                    default=NONE,
                    tooltip=f"LPIPS network, from two files in models/{score_files.FOLDER}: torchvision's "
                    "alexnet-owt-7be5be79.pth with lpips' alex.pth, vgg16-397923af.pth with vgg.pth, or "
                    "squeezenet1_1-b8a52dc0.pth with squeeze.pth. Nothing is downloaded. PIE-Bench uses SqueezeNet.",
                ),
                io.Combo.Input(
                    "clip_model",
                    options=[NONE, INPUTS, *encoders],
                    default=NONE,
                    tooltip="CLIP model for CLIP-T, CLIP-I, CLIP-D and the aesthetic score: a folder with both "
                    f"encoders in transformers format in models/{ENCODER_FOLDER}, or the inputs clip and clip_vision. "
                    "PIE-Bench uses ViT-L/14.",
                ),
                io.Combo.Input(
                    "dino",
                    options=[NONE, *encoders],
                    default=NONE,
                    tooltip=f"DINO model for DINO-I: a folder in models/{ENCODER_FOLDER}, transformers or timm, "
                    "safetensors. DreamBooth uses DINO ViT-S/16.",
                ),
                io.Combo.Input(
                    "dinov2",
                    options=[NONE, *encoders],
                    default=NONE,
                    tooltip=f"DINOv2 model for DINOv2-I: a folder in models/{ENCODER_FOLDER}, transformers or "
                    "timm, safetensors.",
                ),
                io.Combo.Input(
                    "structure",
                    options=[NONE, *encoders],
                    default=NONE,
                    tooltip="DINO model for the structure distance: a folder in transformers format in "
                    f"models/{ENCODER_FOLDER}. PIE-Bench uses DINO ViT-B/8.",
                ),
                recognizer_input(NONE),
                io.Combo.Input(
                    "aesthetic",
                    options=[NONE, *weights],
                    default=NONE,
                    tooltip="Aesthetic predictor: LAION's sa_0_4_vit_l_14_linear.pth or "
                    f"sac+logos+ava1-l14-linearMSE.pth in models/{score_files.FOLDER}. Both read CLIP ViT-L/14, so "
                    "select that as clip_model.",
                ),
                io.Combo.Input(
                    "inception",
                    options=[NONE, *weights],
                    default=NONE,
                    tooltip="Inception network for FID and KID: pt_inception-2015-12-05-6726825d.pth from "
                    "pytorch-fid, used for published FIDs, or torchvision's inception_v3_google-0cc3c7bd.pth, in "
                    f"models/{score_files.FOLDER}. They need at least {FEWEST} edited images and as many "
                    "references (or sources).",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Text encoder for the clip_model 'CLIP and CLIP_VISION inputs': from an SDXL or SD 2.x "
                    "checkpoint, whose text encoders have the projection needed for comparison.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Image encoder trained with clip, from Load CLIP Vision: ViT-bigG for SDXL, ViT-H for SD "
                    "2.x.",
                ),
                FaceDetector.Input(
                    "face_detector", optional=True, tooltip="Face detector for ArcFace ID, from Load Face Detector."
                ),
            ],
            outputs=[Models.Output("models", tooltip="The networks, for Score Edit.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        clip_model: str | None = NONE,
        dino: str | None = NONE,
        dinov2: str | None = NONE,
        structure: str | None = NONE,
        recognizer: str | None = NONE,
        aesthetic: str | None = NONE,
        inception: str | None = NONE,
    ) -> bool | str:
        folders = [
            (NONE if clip_model == INPUTS else clip_model, clip_scores.NEEDED),
            (dino, feature_scores.NEEDED_DINO),
            (dinov2, feature_scores.NEEDED_DINOV2),
            (structure, feature_scores.NEEDED_STRUCTURE),
        ]
        encoders = list_models(ENCODER_FOLDER)
        for name, needed in folders:
            if name is not None and name not in (NONE, *encoders):
                return missing_model(ENCODER_FOLDER, name, needed)
        weights = score_files.files()
        if aesthetic is not None and aesthetic not in (NONE, *weights):
            return score_files.missing_file(aesthetic, AESTHETIC_PURPOSE, AESTHETIC_NEEDED)
        if inception is not None and inception not in (NONE, *weights):
            return score_files.missing_file(inception, INCEPTION_PURPOSE, INCEPTION_NEEDED)
        return recognizer_exists(recognizer, NONE)

    @classmethod
    @checked
    def execute(
        cls,
        lpips: str,
        clip_model: str,
        dino: str,
        dinov2: str,
        structure: str,
        recognizer: str,
        aesthetic: str,
        inception: str,
        clip: Any = None,
        clip_vision: Any = None,
        face_detector: Any = None,
    ) -> io.NodeOutput:
        models = {
            "clip": _clip(clip_model, clip, clip_vision),
            "dino": _folder(dino, feature_scores.NEEDED_DINO),
            "dinov2": _folder(dinov2, feature_scores.NEEDED_DINOV2),
            "structure": _folder(structure, feature_scores.NEEDED_STRUCTURE),
            "lpips": None if lpips == NONE else lpips,
            "face_detector": None if recognizer == NONE else face_detector,
            "face_recognizer": None if recognizer == NONE else load_recognizer(recognizer),
            "aesthetic": None if aesthetic == NONE else aesthetic,
            "inception": None if inception == NONE else inception,
        }
        return io.NodeOutput(models)


class ScoreEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditScoreEdit",
            display_name="Score Edit",
            category="evaluation",
            search_aliases=[
                "CLIP score",
                "CLIP similarity",
                "LPIPS",
                "SSIM",
                "PSNR",
                "MSE",
                "DINO",
                "DINOv2",
                "FID",
                "KID",
                "ArcFace",
                "aesthetic score",
                "PIE-Bench",
                "metrics",
                "evaluate",
                "compare images",
            ],
            advanced=["rule"],
            description=(
                "Scores edited images: preservation of the source, prompt fidelity and subject identity. "
                "PSNR and SSIM need no files; every other score needs a network, from Score Models."
            ),
            is_output_node=True,
            inputs=[
                io.Image.Input("edited", tooltip="Edited images, one or more."),
                io.Image.Input(
                    "source", tooltip="Source image, one for all or one per edited image, of the same size."
                ),
                io.String.Input(
                    "target_prompt",
                    default="",
                    multiline=True,
                    tooltip="Prompt for the edited image, for CLIP-T and CLIP-D. Empty skips them.",
                ),
                io.String.Input(
                    "source_prompt",
                    default="",
                    multiline=True,
                    tooltip="Prompt for the source image, for CLIP-D. Empty skips it.",
                ),
                io.Combo.Input(
                    "rule",
                    options=list(edit_scores.RULES),
                    default=edit_scores.PLAIN,
                    tooltip="Comparison rule inside and outside the mask. Mean over the part: only the pixels of "
                    "the region count. PIE-Bench: both images are multiplied by the mask and compared as a whole, "
                    "and the structure distance follows its code; required for scores comparable with the "
                    "published tables.",
                ),
                mask_input(
                    "mask",
                    "Mask of the edit: 1 where it may change the image, of any size. Adds scores inside and "
                    "outside the mask.",
                    optional=True,
                ),
                io.Image.Input(
                    "references",
                    optional=True,
                    tooltip="Other images of the subject: CLIP-I, DINO-I and DINOv2-I are the mean over them, "
                    "ArcFace ID the maximum. For FID and KID, the comparison set instead of the sources.",
                ),
                Models.Input(
                    "models",
                    optional=True,
                    tooltip="Networks for all scores but MSE, PSNR and SSIM, from Score Models.",
                ),
            ],
            outputs=[
                io.String.Output("report", tooltip="Table of all scores with their definitions, and warnings."),
                io.String.Output(
                    "scores",
                    tooltip="JSON with the mean and all values of every score, its direction, definition and source.",
                ),
                io.Float.Output("psnr", tooltip="Mean PSNR of the whole images in dB; higher is better."),
                io.Float.Output("ssim", tooltip="Mean SSIM of the whole images, up to 1; higher is better."),
                io.Float.Output(
                    "lpips_distance",
                    display_name="lpips",
                    tooltip="Mean LPIPS of the whole images; lower is better. Without the network, nodes connected "
                    "here do not run.",
                ),
                io.Float.Output(
                    "clip_t",
                    display_name="CLIP-T",
                    tooltip="Mean CLIP-T; higher means closer to the prompt. Without the network or the prompt, "
                    "nodes connected here do not run.",
                ),
                io.Float.Output(
                    "clip_d",
                    display_name="CLIP-D",
                    tooltip="Mean CLIP-D; higher means closer to the change between the prompts. Without the network "
                    "or a prompt, nodes connected here do not run.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        edited: torch.Tensor,
        source: torch.Tensor,
        target_prompt: str,
        source_prompt: str,
        rule: str,
        mask: torch.Tensor | None = None,
        references: torch.Tensor | None = None,
        models: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        from comfy.utils import ProgressBar

        _, _, cut = matched_images(edited, source, ("edited", "source"))
        bar = ProgressBar(len(edited))
        models = models or {}
        with edit_scores.open_networks(**models) as networks:
            scores = edit_scores.score_edit(
                edited,
                source,
                mask=mask,
                source_prompt=source_prompt,
                target_prompt=target_prompt,
                references=None if references is None else list(references),
                networks=networks,
                rule=rule,
                progress=bar.update_absolute,
            )
        others = source if references is None else references
        warning = _few_images(len(edited), len(others)) if models.get("inception") else None
        table = score_report.score_table(scores, rule)
        text = show_text(cls, table if cut is None else f"{table}\n{cut}", warning)
        means = {score.name: score.mean for score in scores}
        return io.NodeOutput(
            text,
            score_report.scores_as_json(scores, rule),
            means["PSNR"],
            means["SSIM"],
            *(means[name] if name in means else blocked() for name in ("LPIPS", "CLIP-T", "CLIP-D")),
            ui=ui.PreviewText(text),
        )


def _folder(name: str, needed: str) -> str | None:
    """Path of a model in models/image_encoders."""
    return None if name == NONE else model_path(ENCODER_FOLDER, name, needed)


def _clip(name: str, clip: Any, clip_vision: Any) -> str | clip_scores.SocketClip | None:
    if name != INPUTS:
        return _folder(name, clip_scores.NEEDED)
    if clip is None or clip_vision is None:
        raise IdentityEditError(
            f"The clip_model '{INPUTS}' needs both clip and clip_vision; connect them, or choose a folder."
        )
    return clip_scores.SocketClip(clip, clip_vision)


def _few_images(edited: int, others: int) -> str | None:
    """A warning about the number of images for FID."""
    fewest = min(edited, others)
    if fewest < FEWEST:
        return (
            f"FID and KID are skipped: they need {FEWEST} edited images and as many references or sources, but "
            f"there are {edited} and {others}; connect more, or set inception to 'none'."
        )
    if fewest < FEATURES:
        return (
            f"FID of {edited} and {others} images is biased upward (fewer images than its {FEATURES} features); "
            f"compare it only with FIDs of equally many images, or use KID."
        )
    return None


NODES: list[type[io.ComfyNode]] = [ReconstructionCheck, ScoreModels, ScoreEdit]
