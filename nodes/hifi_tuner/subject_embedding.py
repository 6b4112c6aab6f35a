"""Nodes that learn a subject as text embeddings, load such a subject, and put it into prompts."""

from __future__ import annotations

import os
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ...pipelines.engine.families.schedule import fewer_steps
from ...pipelines.hifi_tuner import subject_files
from ...pipelines.hifi_tuner import train_subject_embedding as learning
from ...pipelines.hifi_tuner.subject_embedding import OUTPUT, WORD, SubjectEmbedding, apply_subject
from ...pipelines.hifi_tuner.train_subject_embedding import MOST_TOKENS, SubjectSettings
from ...pipelines.shared.errors import IdentityEditError
from ...pipelines.subjects.images import SubjectImages as Images
from ...pipelines.subjects.images import check_captions
from ...pipelines.training.images import check_masks, encode_images
from ...pipelines.training.loop import TrainingRun
from ..saved_files import (
    FILE_ENDING,
    changed_at,
    check_file,
    check_name,
    loadable_files,
    model_folder_files,
    new_path,
    next_path,
    path_of,
)
from ..sockets import Subject, SubjectImages, checked, schema, seed_input, show_text, steps_input
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
    how_trained,
    learning_rate_input,
    precision_input,
    sample_every_input,
    steps_of,
    training_outputs,
    training_progress,
)

FILE_FOLDER = "subject_embeddings"
EMBEDDING_FOLDER = "embeddings"
MODEL_FOLDERS = (FILE_FOLDER, EMBEDDING_FOLDER)


class TrainSubjectEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditTrainSubjectEmbedding",
            display_name="Train Subject Embedding",
            category="subject",
            search_aliases=["textual inversion", "HiFi Tuner", "train embedding", "personalization", "train subject"],
            description=(
                "Learns a subject from three to five images as a few text embeddings, first ones for all steps and "
                "then ones for each sampling step; no weight of the model changes (Wang et al. 2023, section 3.2)."
            ),
            is_output_node=True,
            inputs=[
                *checkpoint_inputs(),
                SubjectImages.Input(
                    "images",
                    tooltip="Three to five images of the subject with masks, and with captions that call it by its "
                    "token and class word and say what it does.",
                ),
                io.Combo.Input(
                    "kind",
                    options=[OUTPUT, WORD],
                    default=OUTPUT,
                    tooltip="What is learned. 'output' is HiFi Tuner: the last rows of the text encoder's output. "
                    "'word' is textual inversion: word vectors at the place of the subject's name, which can be saved "
                    "as a stock embedding.",
                ),
                io.Int.Input(
                    "tokens",
                    default=SubjectSettings.tokens,
                    min=1,
                    max=MOST_TOKENS,
                    tooltip="How many rows or word vectors the subject gets. 5 in Wang et al. 2023. Prompts must leave "
                    "the rows free.",
                ),
                steps_input(
                    SubjectSettings.steps,
                    100000,
                    "Training steps of the embeddings that all sampling steps share. 1000 in Wang et al. 2023.",
                ),
                io.Int.Input(
                    "updates_per_step",
                    default=SubjectSettings.updates_per_step,
                    min=0,
                    max=1000,
                    tooltip="Training steps of each sampling step's own embeddings after that. 10 in Wang et al. 2023; "
                    "0 leaves them out.",
                ),
                io.Int.Input(
                    "sampling_steps",
                    default=SubjectSettings.sampling_steps,
                    min=1,
                    max=1000,
                    tooltip="DDIM steps that get embeddings of their own. 50 in Wang et al. 2023. Other numbers of "
                    "steps can be sampled later; they take the nearest ones.",
                ),
                learning_rate_input(
                    SubjectSettings.learning_rate, "Adam's learning rate. 0.005 in Wang et al. 2023.", 1.0, 1e-4
                ),
                io.Float.Input(
                    "regularization_weight",
                    default=SubjectSettings.regularization_weight,
                    min=0.0,
                    max=100.0,
                    step=0.0001,
                    round=0.000001,
                    tooltip="Ties the embeddings to what they begin as: those of the empty prompt, or the class word. "
                    "Weight of the mean squared distance beside the loss, w_s in Wang et al. 2023, who give no value. "
                    "0 does not tie.",
                ),
                io.Boolean.Input(
                    "masked_loss",
                    default=True,
                    tooltip="Count the loss inside the masks only, so that backgrounds are not learned, as in Wang et "
                    "al. 2023. Images without a mask count as a whole.",
                ),
                io.Boolean.Input(
                    "keep_token",
                    default=False,
                    tooltip="Leave the rare token in captions and prompts. Switch it on for a model with an identity "
                    "prior, which knows the token. Off, the embeddings stand for it.",
                ),
                batch_size_input(1, 64, "Images in a batch. All of them have one size."),
                gradient_accumulation_input(),
                precision_input("the embeddings"),
                checkpointing_input(),
                seed_input(SEED_TOOLTIP),
                sample_every_input("the end of both phases"),
                io.String.Input(
                    "sample_prompt",
                    default="",
                    tooltip="What the samples show, with the subject's name in it. Empty: the name alone.",
                ),
                checkpoint_every_input(),
                filename_prefix_input(f"{FILE_FOLDER}/subject", "Step-Wise Embedding Loader", FILE_FOLDER),
            ],
            outputs=[
                Subject.Output("subject", display_name="subject", tooltip="The subject, for Apply Subject."),
                *training_outputs("the subject"),
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
        kind: str,
        tokens: int,
        steps: int,
        updates_per_step: int,
        sampling_steps: int,
        learning_rate: float,
        regularization_weight: float,
        masked_loss: bool,
        keep_token: bool,
        batch_size: int,
        gradient_accumulation: int,
        precision: str,
        checkpointing: bool,
        seed: int,
        sample_every: int,
        sample_prompt: str,
        checkpoint_every: int,
        filename_prefix: str,
    ) -> io.NodeOutput:
        check_captions(images)
        check_masks(images.masks, masked_loss)
        settings = SubjectSettings(
            class_word=images.class_word,
            token="" if keep_token else images.token,
            kind=kind,
            tokens=tokens,
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            accumulation=gradient_accumulation,
            regularization_weight=regularization_weight,
            masked=masked_loss,
            sampling_steps=sampling_steps,
            updates_per_step=updates_per_step,
            precision=precision,
            checkpointing=checkpointing,
            seed=seed,
            sample_every=sample_every,
            sample_prompt=sample_prompt.strip() or images.identity_prompt,
            checkpoint_every=checkpoint_every,
        )
        learning.check_training_captions(clip, images.captions, settings)
        next_path(filename_prefix, f"{FILE_FOLDER}/subject")  # better before a long training than after it
        encoded = encode_images(vae, images.images, images.captions, images.masks)
        checkpoints = Checkpoints(FILE_FOLDER)
        subject, run = learning.train_subject_embedding(
            model,
            clip,
            encoded,
            settings,
            checkpoint=checkpoints.path,
            progress=training_progress(model, steps + sampling_steps * updates_per_step),
        )
        with new_path(filename_prefix, f"{FILE_FOLDER}/subject") as path:
            subject_files.save_subject(subject, path)
        checkpoints.remove()
        samples = torch.cat([vae.decode(latent) for _, latent in run.samples])
        fewer = fewer_steps(sampling_steps, len(subject.timesteps)) if updates_per_step else None
        text = show_text(cls, _report(subject, run, steps, path), fewer)
        return io.NodeOutput(subject, samples, {"loss": run.losses}, path, text, ui=ui.PreviewImage(samples, cls=cls))


def _report(subject: SubjectEmbedding, run: TrainingRun, steps: int, path: str) -> str:
    moved = ", ".join(f"{distance:.3f}" for distance in subject.training["distance_from_start"].values())
    return (
        f"{describe(subject)}: {steps_of(run)}.\n"
        f"Loss of the shared embeddings: {first_and_last(run.losses[:steps])}; they are {moved} (root mean square) "
        f"from where they began.\n"
        f"Saved as {path}, {os.path.getsize(path) / 1000:.0f} kB"
    )


def describe(subject: SubjectEmbedding) -> str:
    """What a subject is, in a line for reports."""
    what = "rows of the text encoder's output" if subject.kind == OUTPUT else "word vectors"
    steps = f", each with its own for {len(subject.timesteps)} sampling steps" if subject.timesteps else ""
    return f"Subject '{subject.name}': {subject.tokens} {what}{steps}"


class StepWiseEmbeddingLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditStepWiseEmbeddingLoader",
            display_name="Step-Wise Embedding Loader",
            category="subject",
            search_aliases=["load subject", "load embedding", "textual inversion", "HiFi Tuner"],
            description="Loads a subject that Train Subject Embedding has learned, or a textual inversion of A1111, "
            "diffusers or ComfyUI.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_files(),
                    tooltip=f"Files of Train Subject Embedding in the input folder itself and in '{FILE_FOLDER}' below "
                    f"the output, the input or the models folder, and the embeddings that ComfyUI lists. Press R to "
                    f"list new ones.",
                ),
            ],
            outputs=[
                Subject.Output("subject", display_name="subject", tooltip="The subject, for Apply Subject."),
                io.String.Output(
                    "name",
                    display_name="name",
                    tooltip="How prompts call the subject: its token and class word, or the embedding's name.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="What the file holds and how it was trained."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return check_file(file, "train the subject again", MODEL_FOLDERS)

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> float:
        return changed_at(path_of(file, MODEL_FOLDERS))

    @classmethod
    @checked
    def execute(cls, file: str) -> io.NodeOutput:
        path = path_of(file, MODEL_FOLDERS)
        if path is None:
            raise IdentityEditError(f"The file {file} does not exist; choose another one.")
        subject = subject_files.load_subject(path)
        report = show_text(cls, f"{describe(subject)}{how_trained(subject.training)}.")
        return io.NodeOutput(subject, subject.name, report)


def _files() -> list[str]:
    own = loadable_files(FILE_FOLDER, without=CHECKPOINT_FOLDER)
    return own + model_folder_files(MODEL_FOLDERS, subject_files.EMBEDDING_ENDINGS)


class ApplySubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditApplySubject",
            display_name="Apply Subject",
            category="subject",
            search_aliases=["subject prompt", "textual inversion", "HiFi Tuner", "step-wise embedding"],
            description="Encodes a prompt with a learned subject in it, and lets the model take each sampling step's "
            "own embeddings, with any sampler (Wang et al. 2023, eq. 7).",
            inputs=[
                io.Model.Input("model", tooltip="The model on which the subject was trained, or one of its family."),
                io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint."),
                Subject.Input("subject", tooltip="From Train Subject Embedding or Step-Wise Embedding Loader."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to draw, with the subject called by its token and class word ('a sks dog on the "
                    "beach') or by one of them.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model_with_subject",
                    display_name="model",
                    tooltip="A copy of the model that takes each sampling step's own embeddings in the place of its "
                    "positive conditioning.",
                ),
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="The prompt with the embeddings that all steps share."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="What was applied, and warnings about the prompt."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: Any, clip: Any, subject: SubjectEmbedding, prompt: str) -> io.NodeOutput:
        patched, positive, warning = apply_subject(model, clip, subject, prompt)
        return io.NodeOutput(patched, positive, show_text(cls, f"{describe(subject)}.", warning))


class SaveSubjectAsEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditSaveSubjectAsEmbedding",
            display_name="Save Subject as Embedding",
            category="subject",
            search_aliases=["export embedding", "textual inversion", "save embedding"],
            description="Writes the word vectors of a subject into ComfyUI's embeddings folder, so that any prompt can "
            "call it as embedding:name, and other programs can read it.",
            is_output_node=True,
            inputs=[
                Subject.Input("subject", tooltip="A subject of the kind 'word'."),
                io.String.Input(
                    "name",
                    default="subject",
                    tooltip="File name without ending, and what stands behind 'embedding:' in prompts.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace a file of this name. Off, an existing file is kept."
                ),
            ],
            outputs=[
                io.String.Output("saved_file", display_name="file", tooltip="Where the embedding was saved."),
                io.String.Output(
                    "embedding_prompt",
                    display_name="embedding prompt",
                    tooltip="What to write into a prompt to call the subject.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, subject: SubjectEmbedding, name: str, overwrite: bool) -> io.NodeOutput:
        path = _embedding_path(name)
        if os.path.exists(path) and not overwrite:
            raise IdentityEditError(f"The embedding {path} exists; choose another name, or switch overwrite on.")
        subject_files.save_textual_inversion(subject, path)
        call = f"embedding:{name.strip()}"
        left_out = "Embeddings of single sampling steps have no place in such a file." if subject.timesteps else None
        text = show_text(cls, f"Saved as {path}; write '{call}' in prompts.", left_out)
        return io.NodeOutput(path, call, ui=ui.PreviewText(text))


def _embedding_path(name: str) -> str:
    check_name(name, "name")
    name = name.strip()
    if not name or any(part in name for part in (" ", ",", ":", "(", ")", "\\")) or name.startswith("."):
        raise IdentityEditError(
            f"The name '{name}' cannot stand behind 'embedding:' in a prompt; write one word without brackets, commas "
            f"and colons."
        )
    folder = os.path.abspath(folder_paths.get_folder_paths(EMBEDDING_FOLDER)[0])
    path = os.path.abspath(os.path.join(folder, name + FILE_ENDING))
    if not path.startswith(folder + os.sep):
        raise IdentityEditError(f"The name '{name}' leads out of the embeddings folder; write a name without '..'.")
    return path


NODES: list[type[io.ComfyNode]] = [TrainSubjectEmbedding, StepWiseEmbeddingLoader, ApplySubject, SaveSubjectAsEmbedding]
