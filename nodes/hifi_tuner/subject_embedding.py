"""Nodes that train a subject as text embeddings, load one, and use it in prompts."""

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
    check_file,
    check_name,
    filename_prefix_input,
    fingerprint_of,
    loadable_files,
    model_folder_files,
    next_path,
    path_of,
)
from ..sockets import Subject, SubjectImages, checked, schema, seed_input, show_text, steps_input
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
            advanced=["updates_per_step", "sampling_steps", "learning_rate", "regularization_weight"],
            description=(
                "Learns a subject from three to five images as text embeddings, first shared by all "
                "steps and then separate for each sampling step; no weight of the model changes (Wang et al. "
                "2023, section 3.2)."
            ),
            is_output_node=True,
            inputs=[
                *checkpoint_inputs(),
                SubjectImages.Input(
                    "images",
                    tooltip="Three to five images of the subject with masks, and with captions that name it by its "
                    "token and class word and describe what it does.",
                ),
                io.Combo.Input(
                    "kind",
                    options=[OUTPUT, WORD],
                    default=OUTPUT,
                    tooltip="Kind of embedding. 'output' is HiFi Tuner: the last token positions of the text "
                    "encoder's output. 'word' is textual inversion: word vectors in place of the subject's name, "
                    "which can be saved as a stock embedding.",
                ),
                io.Int.Input(
                    "tokens",
                    default=SubjectSettings.tokens,
                    min=1,
                    max=MOST_TOKENS,
                    tooltip="Number of token positions or word vectors for the subject. 5 in Wang et al. 2023. "
                    "Prompts must leave these positions free.",
                ),
                steps_input(
                    SubjectSettings.steps,
                    100000,
                    "Training steps for the embeddings shared by all sampling steps. 1000 in Wang et al. 2023.",
                ),
                io.Int.Input(
                    "updates_per_step",
                    default=SubjectSettings.updates_per_step,
                    min=0,
                    max=1000,
                    tooltip="Training steps for each sampling step's own embeddings after that. 10 in Wang et al. "
                    "2023; 0 skips them.",
                ),
                io.Int.Input(
                    "sampling_steps",
                    default=SubjectSettings.sampling_steps,
                    min=1,
                    max=1000,
                    tooltip="Number of DDIM steps with their own embeddings. 50 in Wang et al. 2023. You can "
                    "sample with other numbers of steps later; they use the nearest embeddings.",
                ),
                learning_rate_input(
                    SubjectSettings.learning_rate, "Adam's learning rate. 0.005 in Wang et al. 2023.", 1.0, 1e-4
                ),
                io.Float.Input(
                    "regularization_weight",
                    default=SubjectSettings.regularization_weight,
                    min=0.0,
                    max=100.0,
                    step=1e-7,
                    round=1e-10,
                    tooltip="Loss weight of the squared distance from the initial embeddings, those of the empty "
                    "prompt or the class word: w_s in Wang et al. 2023, eq. 6, who do not report its value. 1e-6 is "
                    "the default and acts mildly; at 1e-4 nothing was learned in the demo world "
                    "(benchmarks/results/embedding_tie.md). 0 disables it.",
                ),
                io.Boolean.Input(
                    "masked_loss",
                    default=True,
                    tooltip="Masked loss. On: computes the loss inside the masks only, so that backgrounds are not "
                    "learned, as in Wang et al. 2023. Images without a mask count as a whole.",
                ),
                io.Boolean.Input(
                    "keep_token",
                    default=False,
                    tooltip="Handling of the rare token. On: keeps it in captions and prompts, for a model with an "
                    "identity prior, which knows the token. Off: the embeddings replace it.",
                ),
                seed_input(SEED_TOOLTIP),
                filename_prefix_input(FILE_FOLDER, "subject", "Step-Wise Embedding Loader"),
                settings_input(),
            ],
            outputs=[
                Subject.Output("subject", tooltip="Trained subject, for Apply Subject."),
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
        seed: int,
        filename_prefix: str,
        training_settings: dict[str, Any] | None = None,
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
            regularization_weight=regularization_weight,
            masked=masked_loss,
            sampling_steps=sampling_steps,
            updates_per_step=updates_per_step,
            seed=seed,
            **settings_of(training_settings, sample_prompt=images.identity_prompt),
        )
        learning.check_training_captions(clip, images.captions, settings)
        next_path(filename_prefix, f"{FILE_FOLDER}/subject")  # fail before a long training, not after it
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
        path = checkpoints.save(
            run, filename_prefix, f"{FILE_FOLDER}/subject", lambda path: subject_files.save_subject(subject, path)
        )
        samples = torch.cat([vae.decode(latent) for _, latent in run.samples])
        fewer = fewer_steps(sampling_steps, len(subject.timesteps)) if updates_per_step else None
        text = show_text(cls, _report(subject, run, steps, path), fewer)
        return io.NodeOutput(subject, samples, {"loss": run.losses}, path, text, ui=ui.PreviewImage(samples, cls=cls))


def _report(subject: SubjectEmbedding, run: TrainingRun, steps: int, path: str) -> str:
    moved = ", ".join(f"{distance:.3f}" for distance in subject.training["distance_from_start"].values())
    return (
        f"{describe(subject)}: {steps_of(run)}.\n"
        f"Loss of the shared embeddings: {first_and_last(run.losses[:steps])}; distance from the initial embeddings: "
        f"{moved} (root mean square).\n"
        f"Saved as {path}, {os.path.getsize(path) / 1000:.0f} kB"
    )


def describe(subject: SubjectEmbedding) -> str:
    """One-line description of a subject, for reports."""
    what = "token positions of the text encoder's output" if subject.kind == OUTPUT else "word vectors"
    steps = f", with separate embeddings for {len(subject.timesteps)} sampling steps" if subject.timesteps else ""
    return f"Subject '{subject.name}': {subject.tokens} {what}{steps}"


class StepWiseEmbeddingLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditStepWiseEmbeddingLoader",
            display_name="Step-Wise Embedding Loader",
            category="subject",
            search_aliases=["load subject", "load embedding", "textual inversion", "HiFi Tuner"],
            description="Loads a subject from Train Subject Embedding, or a textual inversion embedding of "
            "A1111, diffusers or ComfyUI.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_files(),
                    tooltip=f"Files of Train Subject Embedding in the input folder itself and in '{FILE_FOLDER}' "
                    "below the output, the input or the models folder, and ComfyUI's embeddings. Press R to "
                    "refresh the list.",
                )
            ],
            outputs=[
                Subject.Output("subject", tooltip="Loaded subject, for Apply Subject."),
                io.String.Output(
                    "name", tooltip="Name of the subject in prompts: its token and class word, or the embedding's name."
                ),
                io.String.Output("report", tooltip="Contents of the file and its training settings."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        return check_file(file, "train the subject again", MODEL_FOLDERS)

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **_: Any) -> float:
        return fingerprint_of(file, MODEL_FOLDERS)

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
            description="Encodes a prompt with a learned subject, and applies each sampling step's own "
            "embeddings in the model, with any sampler (Wang et al. 2023, eq. 7).",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that the subject was trained on, or another of the same family."
                ),
                io.Clip.Input("clip", tooltip="The text encoders of the same checkpoint."),
                Subject.Input("subject", tooltip="Subject from Train Subject Embedding or Step-Wise Embedding Loader."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Prompt, with the subject named by its token and class word ('a sks dog on the beach') "
                    "or by one of them.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model_with_subject",
                    display_name="model",
                    tooltip="Copy of the model that replaces its positive conditioning with each sampling step's "
                    "own embeddings.",
                ),
                io.Conditioning.Output("positive", tooltip="The prompt with the embeddings shared by all steps."),
                io.String.Output("report", tooltip="Applied subject, and warnings about the prompt."),
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
            description="Saves the word vectors of a subject in ComfyUI's embeddings folder, so that any "
            "prompt can use them as embedding:name, and other programs can read them.",
            is_output_node=True,
            inputs=[
                Subject.Input("subject", tooltip="A subject of the kind 'word'."),
                io.String.Input(
                    "name",
                    default="subject",
                    tooltip="File name without extension, used after 'embedding:' in prompts.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Overwriting. On: replaces a file of this name. Off: an existing file is kept, with an "
                    "error.",
                ),
            ],
            outputs=[
                io.String.Output("saved_file", display_name="file", tooltip="Path of the saved embedding."),
                io.String.Output("embedding_prompt", tooltip="Text that uses the subject in a prompt."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, subject: SubjectEmbedding, name: str, overwrite: bool) -> io.NodeOutput:
        path = _embedding_path(name)
        if os.path.exists(path) and not overwrite:
            raise IdentityEditError(f"The embedding {path} exists; choose another name, or turn on overwrite.")
        subject_files.save_textual_inversion(subject, path)
        call = f"embedding:{name.strip()}"
        left_out = (
            "The embeddings of single sampling steps are not saved in this format." if subject.timesteps else None
        )
        text = show_text(cls, f"Saved as {path}; write '{call}' in prompts.", left_out)
        return io.NodeOutput(path, call, ui=ui.PreviewText(text))


def _embedding_path(name: str) -> str:
    check_name(name, "name")
    name = name.strip()
    if not name or any(part in name for part in (" ", ",", ":", "(", ")", "\\")) or name.startswith("."):
        raise IdentityEditError(
            f"The name '{name}' cannot follow 'embedding:' in a prompt; write one word without brackets, commas and "
            f"colons."
        )
    folder = os.path.abspath(folder_paths.get_folder_paths(EMBEDDING_FOLDER)[0])
    path = os.path.abspath(os.path.join(folder, name + FILE_ENDING))
    if not path.startswith(folder + os.sep):
        raise IdentityEditError(f"The name '{name}' points outside the embeddings folder; write a name without '..'.")
    return path


NODES: list[type[io.ComfyNode]] = [TrainSubjectEmbedding, StepWiseEmbeddingLoader, ApplySubject, SaveSubjectAsEmbedding]
