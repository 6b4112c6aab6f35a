"""Nodes that train, load and apply a style attention, which draws a person from W+ codes."""

from __future__ import annotations

import os
from typing import Any

import torch
from comfy_api.latest import io, ui

from ...attention.capture import IdentityAttention as RecordedAttention
from ...attention.style_cross_attention import KINDS, SEQUENTIAL
from ...pipelines.pidiff import style_attention as styles
from ...pipelines.pidiff import style_attention_files as files
from ...pipelines.pidiff import train as learning
from ...pipelines.pidiff.style_attention import StyleAttention as Style
from ...pipelines.pidiff.train import TEMPLATES, StyleSettings
from ...pipelines.pidiff.w_plus import WPlus as WPlusStyles
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.subjects.images import SubjectImages as Images
from ...pipelines.training.images import encode_images
from ...pipelines.training.loop import TrainingRun
from ..idle import first_said, is_empty, joined
from ..saved_files import (
    check_file,
    filename_prefix_input,
    fingerprint_of,
    loadable_files,
    model_folder_files,
    next_path,
    path_of,
)
from ..sockets import (
    IdentityAttention,
    StyleAttention,
    SubjectImages,
    WPlus,
    blocked,
    checked,
    fraction_input,
    mask_input,
    schema,
    seed_input,
    show_text,
    steps_input,
)
from ..training import (
    CHECKPOINT_FOLDER,
    SEED_TOOLTIP,
    Checkpoints,
    checkpoint_inputs,
    first_and_last,
    how_trained,
    learning_rate_input,
    settings_input,
    settings_of,
    steps_of,
    training_outputs,
    training_progress,
)

FILE_FOLDER = "style_attention"


class TrainStyleAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditTrainStyleAttention",
            display_name="Train Style Attention",
            category="face",
            search_aliases=["PIDiff", "style cross-attention", "face", "identity", "W+ adapter", "personalization"],
            advanced=["kind", "row_groups", "text_drop", "style_drop", "style_noise", "masked_loss"],
            description=(
                "Teaches a model one person from W+ codes, with about six images: a mapping network and a "
                "style cross-attention after every text cross-attention (PIDiff, Gu et al. 2025). The model's own "
                "weights do not change."
            ),
            is_output_node=True,
            inputs=[
                *checkpoint_inputs(),
                SubjectImages.Input(
                    "images",
                    tooltip="Images of one person; of 4, 6, 8 and 10 images 6 worked best in Gu et al. 2025 (table 2), "
                    "8 in the demo world. Their token is the placeholder token of the person.",
                ),
                WPlus.Input("w_plus", tooltip="W+ codes of the same images, in the same order."),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default=SEQUENTIAL,
                    tooltip="Query that attends to the style tokens. 'sequential' is style cross-attention: the "
                    "output of the text cross-attention. 'parallel' is the paper's baseline: the hidden state "
                    "before it, as in IP-Adapter.",
                ),
                io.String.Input(
                    "row_groups",
                    default=styles.ROW_GROUPS,
                    tooltip="Groups of W+ codes from coarse to fine, one token per group. The default is from Gu "
                    "et al. 2025 for 18 codes; an encoder with another number of codes needs other groups.",
                ),
                io.String.Input(
                    "templates",
                    default="\n".join(TEMPLATES),
                    multiline=True,
                    tooltip="Caption templates, one per line; one is picked at random for each image. {} is the "
                    "placeholder token. Write '{} person' to add the class word. Empty: the captions of the images. "
                    "The first two are from Gu et al. 2025.",
                ),
                steps_input(StyleSettings.steps, 1000000, "Training steps. 600 in Gu et al. 2025."),
                learning_rate_input(
                    StyleSettings.learning_rate,
                    "AdamW's learning rate. Our default; Gu et al. 2025 do not report theirs.",
                    1.0,
                ),
                fraction_input(
                    "text_drop",
                    StyleSettings.text_drop,
                    "Probability that an image is trained without its caption. 0.5 in Gu et al. 2025.",
                ),
                fraction_input(
                    "style_drop",
                    StyleSettings.style_drop,
                    "Probability that an image is trained with the encoder's latent average instead of its "
                    "W+ codes. 0.5 in Gu et al. 2025.",
                ),
                io.Float.Input(
                    "style_noise",
                    default=StyleSettings.style_noise,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Standard deviation of the noise added to the W+ codes, in their units. Our default: "
                    "Gu et al. 2025 add noise and do not report how much.",
                ),
                io.Boolean.Input(
                    "masked_loss",
                    default=False,
                    tooltip="Masked loss: computed only inside the masks of the images, so that backgrounds are not "
                    "learned. Off, since Gu et al. 2025 do not mention masks.",
                ),
                seed_input(SEED_TOOLTIP),
                filename_prefix_input(FILE_FOLDER, "person", "Load Style Attention"),
                settings_input(),
            ],
            outputs=[
                StyleAttention.Output(
                    "style_attention", tooltip="The trained style attention, for Apply Style Cross-Attention."
                ),
                *training_outputs("it"),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        images: Images,
        w_plus: WPlusStyles,
        kind: str,
        row_groups: str,
        templates: str,
        steps: int,
        learning_rate: float,
        text_drop: float,
        style_drop: float,
        style_noise: float,
        masked_loss: bool,
        seed: int,
        filename_prefix: str,
        training_settings: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        settings = StyleSettings(
            pseudo_word=images.token,
            templates=tuple(line.strip() for line in templates.splitlines() if line.strip()),
            kind=kind,
            row_groups=row_groups,
            steps=steps,
            learning_rate=learning_rate,
            text_drop=text_drop,
            style_drop=style_drop,
            style_noise=style_noise,
            masked=masked_loss,
            seed=seed,
            **settings_of(training_settings),
        )
        learning.check_training_input(images.captions, images.masks, w_plus, settings)
        next_path(filename_prefix, f"{FILE_FOLDER}/person")  # fail before a long training rather than after it
        encoded = encode_images(vae, images.images, images.captions, images.masks)
        checkpoints = Checkpoints(FILE_FOLDER)
        style, run = learning.train_style_attention(
            model,
            clip,
            encoded,
            w_plus,
            settings,
            checkpoint=checkpoints.path,
            progress=training_progress(model, steps),
        )
        path = checkpoints.save(
            run, filename_prefix, f"{FILE_FOLDER}/person", lambda path: files.save_style_attention(style, path)
        )
        samples = torch.cat([vae.decode(latent) for _, latent in run.samples])
        text = show_text(cls, _report(style, run, len(encoded), path))
        return io.NodeOutput(style, samples, {"loss": run.losses}, path, text, ui=ui.PreviewImage(samples, cls=cls))


def _report(style: Style, run: TrainingRun, images: int, path: str) -> str:
    return (
        f"{styles.described(style)}: {steps_of(run)} on {images} images.\n"
        f"Loss: {first_and_last(run.losses)}.\n"
        f"Saved as {path}, {os.path.getsize(path) / 1e6:.1f} MB"
    )


class LoadStyleAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditLoadStyleAttention",
            display_name="Load Style Attention",
            category="face",
            search_aliases=["PIDiff", "style cross-attention", "load face", "W+ adapter"],
            description="Loads a style attention saved by Train Style Attention.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_files(),
                    tooltip=f"Files saved by Train Style Attention: in the input folder itself and in '{FILE_FOLDER}' "
                    "below the output, input or models folder. Press R to refresh the list.",
                )
            ],
            outputs=[
                StyleAttention.Output(
                    "style_attention", tooltip="The style attention, for Apply Style Cross-Attention."
                ),
                io.String.Output(
                    "pseudo_word",
                    display_name="placeholder token",
                    tooltip="Placeholder token of the person; write it in prompts.",
                ),
                io.String.Output("report", tooltip="Contents of the file and training settings."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        return check_file(file, "train the style attention again", (FILE_FOLDER,))

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **_: Any) -> float:
        return fingerprint_of(file, (FILE_FOLDER,))

    @classmethod
    @checked
    def execute(cls, file: str) -> io.NodeOutput:
        path = path_of(file, (FILE_FOLDER,))
        if path is None:
            raise IdentityEditError(f"file '{file}' does not exist; choose another one.")
        style = files.load_style_attention(path)
        report = show_text(cls, f"{styles.described(style)}{how_trained(style.training)}.")
        return io.NodeOutput(style, style.pseudo_word, report)


def _files() -> list[str]:
    saved = loadable_files(FILE_FOLDER, without=CHECKPOINT_FOLDER)
    return saved + model_folder_files((FILE_FOLDER,), files.ENDINGS)


class ApplyStyleCrossAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditApplyStyleCrossAttention",
            display_name="Apply Style Cross-Attention",
            category="face",
            search_aliases=["PIDiff", "SCA", "face", "identity", "IPAdapter", "W+ adapter"],
            advanced=["start_percent", "end_percent", "schedule", "recorded_token"],
            description=(
                "Conditions the model on a person's W+ codes, with any sampler and guider (PIDiff, Gu et "
                "al. 2025). Use one node per person, with masks for several people in one image."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model of the family that the style attention was trained with; LoRAs can be applied.",
                ),
                StyleAttention.Input("style_attention", tooltip="Style attention, from Load or Train Style Attention."),
                WPlus.Input(
                    "w_plus",
                    tooltip="W+ codes of the person: of one image, or one per image of the batch. Mixed codes draw a "
                    "mix of two people.",
                ),
                io.Float.Input(
                    "strength",
                    default=styles.STRENGTH,
                    min=-2.0,
                    max=4.0,
                    step=0.01,
                    tooltip="Style strength, the paper's lambda. Higher preserves more of the person. 0.4 in Gu et "
                    "al. 2025 (figure 10); the demo checkpoint needs 1. 1 = strength "
                    "used in training, 0 = disabled.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Fraction of sampling at which the style attention starts, so that the text can set "
                    "the layout first. 0 in Gu et al. 2025.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Fraction of sampling at which the style attention ends. 1 in Gu et al. 2025.",
                ),
                io.String.Input(
                    "schedule",
                    default="",
                    tooltip="Strength multipliers, separated by commas, spread evenly from start_percent to "
                    "end_percent and interpolated linearly: '0, 1' rises, '1, 0.5' falls to half. Empty: constant, "
                    "as in Gu et al. 2025.",
                ),
                mask_input(
                    "mask",
                    "Mask of the person: 1 on the person; of any size, stretched over the image. Without a "
                    "mask the whole image is used.",
                    optional=True,
                ),
                io.Int.Input(
                    "recorded_token",
                    default=0,
                    min=0,
                    max=512,
                    optional=True,
                    tooltip="Style token whose attention is recorded, from 1 (coarse) to 4 (fine) in Gu et al. 2025 "
                    "(figure 3). 0 records none.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model_with_style", display_name="model", tooltip="The model conditioned on the person."
                ),
                io.String.Output("report", tooltip="The style attention and strength in use, and mismatches."),
                IdentityAttention.Output(
                    "token_attention",
                    display_name="identity attention",
                    tooltip="Attention of that model's last run to recorded_token, for Attention Heatmap.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        style_attention: Style,
        w_plus: WPlusStyles,
        strength: float,
        start_percent: float,
        end_percent: float,
        schedule: str,
        mask: torch.Tensor | None = None,
        recorded_token: int = 0,
    ) -> io.NodeOutput:
        attention = RecordedAttention((recorded_token - 1,), self_attention=False) if recorded_token else None
        styled = styles.apply_style_attention(
            model,
            style_attention,
            w_plus,
            strength=strength,
            start_percent=start_percent,
            end_percent=end_percent,
            schedule=styles.parse_schedule(schedule),
            mask=mask,
            attention=attention,
        )
        unused = first_said(
            (strength == 0.0, "strength is 0, so the person is not drawn; choose another value."),
            (
                start_percent >= end_percent,
                f"start_percent is {start_percent:g} and end_percent {end_percent:g}, so the person is not drawn; "
                f"choose a start_percent below end_percent.",
            ),
            (
                bool(schedule.strip()) and not any(styles.parse_schedule(schedule)),
                "All factors of schedule are 0, so the person is not drawn; write others.",
            ),
            (is_empty(mask), "The mask is empty, so the person is not drawn; connect another, or none."),
        )
        warning = joined(
            unused, styles.check_model(style_attention, model), styles.check_styles(style_attention, w_plus)
        )
        text = f"{styles.described(style_attention)}; strength {strength:g}"
        recorded = attention or blocked("No style token is recorded; set recorded_token from 1 on.")
        return io.NodeOutput(styled, show_text(cls, f"{text}.", warning), recorded)


NODES: list[type[io.ComfyNode]] = [TrainStyleAttention, LoadStyleAttention, ApplyStyleCrossAttention]
