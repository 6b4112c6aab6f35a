"""Nodes that learn a subject from a few images, and apply what was learned."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ...pipelines.lipe import identity_prior as priors
from ...pipelines.lipe.train_identity_prior import PriorSettings, train_identity_prior
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.subjects.images import SubjectImages as Images
from ...pipelines.subjects.images import check_captions
from ...pipelines.training.images import TrainingImages, check_masks, encode_images
from ...pipelines.training.loop import TrainingRun
from ..idle import first_said, joined
from ..saved_files import changed_at, check_file, file_input, new_path, next_path, saved_path
from ..sockets import SubjectImages, checked, schema, seed_input, show_text, steps_input
from ..training import (
    CHECKPOINT_FOLDER,
    SEED_TOOLTIP,
    Checkpoints,
    batch_size_input,
    checkpoint_every_input,
    checkpoint_inputs,
    checkpointing_input,
    filename_prefix_input,
    first_and_last,
    gradient_accumulation_input,
    learning_rate_input,
    precision_input,
    sample_every_input,
    steps_of,
    training_outputs,
    training_progress,
)

FILE_FOLDER = "identity_priors"
LORA_FOLDER = "loras"


class TrainIdentityPrior(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditTrainIdentityPrior",
            display_name="Train Identity Prior",
            category="subject",
            search_aliases=["dreambooth", "LIPE", "fine-tune", "personalization", "train subject"],
            description=(
                "Learns a subject from three to five images by fine-tuning the attention layers of the UNet and of "
                "the text encoders, with images of its class beside them (Liu et al. 2024, section 2.1)."
            ),
            is_output_node=True,
            inputs=[
                *checkpoint_inputs(),
                SubjectImages.Input(
                    "subject",
                    tooltip="The identity set: three to five images whose captions call the subject by its token and "
                    "class word and say what it does.",
                ),
                SubjectImages.Input(
                    "regularization",
                    optional=True,
                    tooltip="The regularization set: images of the class in general with their captions, made by the "
                    "same model. They keep the model's knowledge of the class; without them it forgets other subjects. "
                    "The token is taken out of their captions where it stands in them.",
                ),
                steps_input(PriorSettings.steps, 100000, "Training steps. 1000 in Liu et al. 2024 (appendix E.2.5)."),
                learning_rate_input(
                    PriorSettings.learning_rate,
                    "AdamW's learning rate, for the UNet and the text encoders. 0.0005 in Liu et al. 2024 (appendix "
                    "E.2.5). Lower it when samples show odd colors or the images themselves.",
                ),
                batch_size_input(
                    1,
                    64,
                    "Images of each of both sets in a batch. 1 in the examples of diffusers' DreamBooth script.",
                ),
                gradient_accumulation_input(),
                io.Float.Input(
                    "regularization_weight",
                    default=PriorSettings.regularization_weight,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Weight of the regularization set's loss beside the identity set's. 1 in Ruiz et al. 2023.",
                ),
                io.Boolean.Input(
                    "train_text_encoder",
                    default=True,
                    tooltip="Train the attention layers of the text encoders too, as in Liu et al. 2024 (appendix "
                    "E.2.5).",
                ),
                precision_input("the trained weights"),
                checkpointing_input(),
                io.Boolean.Input(
                    "masked_loss",
                    default=False,
                    tooltip="Count the loss of the subject's images inside their masks only, so that backgrounds are "
                    "not learned. Off in Liu et al. 2024. Images without a mask count as a whole.",
                ),
                io.Float.Input(
                    "min_snr_gamma",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="Weights the timesteps as Hang et al. 2023 do, who use 5. 0 weights all alike, as Liu et "
                    "al. 2024.",
                ),
                seed_input(SEED_TOOLTIP),
                sample_every_input("the end"),
                io.String.Input(
                    "sample_prompt",
                    default="",
                    tooltip="What the samples show, with the token and the class word in it. Empty: those two words.",
                ),
                checkpoint_every_input(),
                filename_prefix_input(f"{FILE_FOLDER}/prior", "Load Identity Prior", FILE_FOLDER),
            ],
            outputs=[
                io.Model.Output("model_with_prior", display_name="model", tooltip="The model that knows the subject."),
                io.Clip.Output("clip_with_prior", display_name="clip", tooltip="Its text encoders, for all prompts."),
                io.String.Output(
                    "identity_prompt",
                    display_name="identity prompt",
                    tooltip="The token and the class word, by which prompts call the subject.",
                ),
                *training_outputs("the prior"),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        subject: Images,
        steps: int,
        learning_rate: float,
        batch_size: int,
        gradient_accumulation: int,
        regularization_weight: float,
        train_text_encoder: bool,
        precision: str,
        checkpointing: bool,
        masked_loss: bool,
        min_snr_gamma: float,
        seed: int,
        sample_every: int,
        sample_prompt: str,
        checkpoint_every: int,
        filename_prefix: str,
        regularization: Images | None = None,
    ) -> io.NodeOutput:
        check_captions(subject)
        check_masks(subject.masks, masked_loss)
        next_path(filename_prefix, f"{FILE_FOLDER}/prior")  # better before a long training than after it
        checkpoints = Checkpoints(FILE_FOLDER)
        prior, run = train_identity_prior(
            model,
            clip,
            encode_images(vae, subject.images, subject.captions, subject.masks),
            None if regularization is None else _encode_class(vae, regularization, subject.token),
            PriorSettings(
                token=subject.token,
                class_word=subject.class_word,
                steps=steps,
                learning_rate=learning_rate,
                batch_size=batch_size,
                accumulation=gradient_accumulation,
                regularization_weight=regularization_weight,
                text_encoder=train_text_encoder,
                masked=masked_loss,
                min_snr_gamma=min_snr_gamma,
                precision=precision,
                checkpointing=checkpointing,
                seed=seed,
                sample_every=sample_every,
                sample_prompt=sample_prompt.strip(),
                checkpoint_every=checkpoint_every,
            ),
            checkpoint=checkpoints.path,
            progress=training_progress(model, steps),
        )
        with new_path(filename_prefix, f"{FILE_FOLDER}/prior") as path:
            priors.save_identity_prior(prior, path)
        checkpoints.remove()
        patched_model, patched_clip = priors.apply_identity_prior(model, clip, prior)
        samples = torch.cat([vae.decode(latent) for _, latent in run.samples])
        warning = None
        if regularization is None:
            warning = "There is no regularization set; the model may forget other subjects of the class."
        text = show_text(cls, _report(prior, run, path), warning)
        losses = {"loss": run.losses}
        return io.NodeOutput(
            patched_model,
            patched_clip,
            prior.identity_prompt,
            samples,
            losses,
            path,
            text,
            ui=ui.PreviewImage(samples, cls=cls),
        )


def _encode_class(vae: Any, images: Images, token: str) -> TrainingImages:
    captions = []
    for caption, name in zip(images.captions, images.names, strict=True):
        if not caption.strip():
            raise IdentityEditError(
                f"{name} of the regularization set has no caption; give each image the prompt it was made with."
            )
        # An image of the class is no image of the subject.
        captions.append(" ".join(word for word in caption.split() if word.strip(".,;:!?") != token))
    return encode_images(vae, images.images, captions)


def _report(prior: priors.IdentityPrior, run: TrainingRun, path: str) -> str:
    count = sum(tensor.numel() for change in (prior.model_change, prior.clip_change) for tensor in change.values())
    return (
        f"Identity prior '{prior.identity_prompt}': {steps_of(run)}, {count / 1e6:.1f} million weights.\n"
        f"Loss: {first_and_last(run.losses)}.\n"
        f"Saved as {path}"
    )


class LoadIdentityPrior(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditLoadIdentityPrior",
            display_name="Load Identity Prior",
            category="subject",
            search_aliases=["load dreambooth", "apply identity prior", "LIPE"],
            description="Applies a trained identity prior to the model and its text encoders, and refuses it for "
            "another model family.",
            inputs=[
                io.Model.Input("model", tooltip="The model on which the prior was trained, or one of its family."),
                io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint."),
                file_input("Train Identity Prior", FILE_FOLDER, CHECKPOINT_FOLDER),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much of the change the UNet gets. 1 is what was trained.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much of the change the text encoders get. 1 is what was trained.",
                ),
            ],
            outputs=[
                io.Model.Output("model_with_prior", display_name="model", tooltip="The model that knows the subject."),
                io.Clip.Output("clip_with_prior", display_name="clip", tooltip="Its text encoders, for all prompts."),
                io.String.Output(
                    "identity_prompt",
                    display_name="identity prompt",
                    tooltip="The token and the class word, by which prompts call the subject.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="How the prior was trained, and whether it fits the model."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return check_file(file, "train the prior again")

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> float:
        return _modified(file)

    @classmethod
    @checked
    def execute(cls, model: Any, clip: Any, file: str, strength_model: float, strength_clip: float) -> io.NodeOutput:
        prior = priors.load_identity_prior(saved_path(file))
        warning = priors.check_identity_prior(model, clip, prior)
        patched_model, patched_clip = priors.apply_identity_prior(model, clip, prior, strength_model, strength_clip)
        facts = prior.training
        text = f"Identity prior '{prior.identity_prompt}'."
        if facts.keys() >= {"steps", "learning_rate", "identity_images", "regularization_images"}:
            text = (
                f"{text[:-1]}: {facts['steps']} steps, learning rate {facts['learning_rate']:g}, "
                f"{facts['identity_images']} images of the subject, {facts['regularization_images']} of its "
                f"class."
            )
        unused = first_said(
            (
                strength_model == 0.0 and strength_clip == 0.0,
                "strength_model and strength_clip are 0, so that model and clip stay as they are; raise one of them.",
            ),
        )
        text = show_text(cls, text, joined(unused, warning))
        return io.NodeOutput(patched_model, patched_clip, prior.identity_prompt, text)


class SaveIdentityPriorAsLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSaveIdentityPriorAsLoRA",
            display_name="Save Identity Prior as LoRA",
            category="subject",
            search_aliases=["extract lora", "export lora", "prior to lora"],
            description="Writes a trained identity prior as a LoRA of a chosen rank, which the stock Load LoRA and "
            "other programs read, and says how much of it that rank keeps.",
            is_output_node=True,
            inputs=[
                file_input("Train Identity Prior", FILE_FOLDER, CHECKPOINT_FOLDER),
                io.Int.Input(
                    "rank",
                    default=64,
                    min=1,
                    max=4096,
                    tooltip="Rank of each weight's change. The report says the error; a rank as large as the layers is "
                    "exact.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default=f"{LORA_FOLDER}/prior",
                    tooltip=f"Folder and beginning of the file name, below the output folder. Load LoRA lists what is "
                    f"in '{LORA_FOLDER}' there.",
                ),
            ],
            outputs=[
                io.String.Output("saved_file", display_name="file", tooltip="Where the LoRA was saved."),
                io.Float.Output(
                    "relative_error",
                    display_name="relative error",
                    tooltip="Size of what the rank leaves out, relative to the whole change (Frobenius norm).",
                ),
                io.String.Output("report", display_name="report", tooltip="The rank, the error and the size."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return check_file(file, "train the prior again")

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> float:
        return _modified(file)

    @classmethod
    @checked
    def execute(cls, file: str, rank: int, filename_prefix: str) -> io.NodeOutput:
        from comfy.utils import ProgressBar

        next_path(filename_prefix, f"{FILE_FOLDER}/prior")  # better before long work than after it
        prior = priors.load_identity_prior(saved_path(file))
        bars: list[Any] = []

        def progress(done: int, total: int) -> None:
            if not bars:
                bars.append(ProgressBar(total))
            bars[0].update_absolute(done, total)

        tensors, error = priors.as_lora(prior, rank, progress)
        with new_path(filename_prefix, f"{FILE_FOLDER}/prior") as path:
            priors.save_lora(prior, tensors, rank, error, path)
        mebibytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**20
        text = f"LoRA of rank {rank}: relative error {error:.3f}, {mebibytes:.1f} MiB.\nSaved as {path}"
        return io.NodeOutput(path, error, show_text(cls, text), ui=ui.PreviewText(text))


def _modified(file: str) -> float:
    return changed_at(saved_path(file))


NODES: list[type[io.ComfyNode]] = [TrainIdentityPrior, LoadIdentityPrior, SaveIdentityPriorAsLoRA]
