"""Nodes that train and load an identity word encoder, and insert identity words into prompts."""

from __future__ import annotations

import os
from typing import Any

from comfy_api.latest import io, ui

from ...pipelines.mcdm import identity_words as words_of
from ...pipelines.mcdm import train_identity_words as learning
from ...pipelines.mcdm.identity_words import IdentityWords as Words
from ...pipelines.mcdm.train_identity_words import IdentitySettings
from ...pipelines.subjects.images import SubjectImages as Images
from ...pipelines.training.images import encode_images
from ..saved_files import (
    check_file,
    file_input,
    filename_prefix_input,
    fingerprint_of,
    next_path,
    saved_path,
)
from ..sockets import IdentityWords, SubjectImages, checked, schema, seed_input, show_text, steps_input
from ..training import (
    CHECKPOINT_FOLDER,
    Checkpoints,
    checkpoint_inputs,
    first_and_last,
    how_trained,
    learning_rate_input,
    settings_input,
    settings_of,
    steps_of,
    training_outputs,
)

FILE_FOLDER = "identity_words"


class TrainIdentityWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditTrainIdentityWords",
            display_name="Train Identity Words",
            category="portrait",
            search_aliases=["identity encoder", "ELITE", "MCDM", "face words", "textual inversion encoder"],
            advanced=["words", "regularization_weight", "masked_loss"],
            description=(
                "Trains an encoder on portraits of many people that turns the person in an image into two "
                "word embeddings of the text encoder (Chen et al. 2024, supplement 1.1). The weights of the "
                "model, the text encoder and the image encoder do not change."
            ),
            is_output_node=True,
            inputs=[
                *checkpoint_inputs(),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="CLIP image encoder whose features are used. Applying the words later needs the same one.",
                ),
                SubjectImages.Input(
                    "images",
                    tooltip="Portraits of many people, with captions that contain the class word: Load Subject "
                    "Images or Subject from Images, with an empty token. FFHQ in Chen et al. 2024.",
                ),
                io.Int.Input(
                    "words",
                    default=words_of.WORDS,
                    min=1,
                    max=words_of.MOST_WORDS,
                    tooltip="Number of word embeddings per person. 2 in Chen et al. 2024.",
                ),
                steps_input(
                    IdentitySettings.steps,
                    10000000,
                    "Training steps. Our default, for a few thousand images; Chen et al. 2024 do not report "
                    "theirs, ELITE uses 300000.",
                ),
                learning_rate_input(
                    IdentitySettings.learning_rate,
                    "AdamW's learning rate. Our default, for a few thousand steps; Chen et al. 2024 do not "
                    "report theirs, ELITE uses 0.000001 for 300000 steps.",
                ),
                io.Float.Input(
                    "regularization_weight",
                    default=IdentitySettings.regularization_weight,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    tooltip="L1 regularization weight on the predicted embeddings. 0.01 in ELITE (Wei et al. "
                    "2023); Chen et al. 2024 do not report theirs.",
                ),
                io.Boolean.Input(
                    "masked_loss",
                    default=False,
                    tooltip="Masked loss: computed only inside the masks of the images. Off, since Chen et al. 2024 do "
                    "not mention masks.",
                ),
                seed_input("Seed for all randomness: initial weights, image order, timesteps and noise."),
                filename_prefix_input(FILE_FOLDER, "identity", "Load Identity Words"),
                settings_input(),
            ],
            outputs=[
                IdentityWords.Output(
                    "identity_words", tooltip="The encoder, for Apply Identity Words and Generate Pairs."
                ),
                *training_outputs("it", None),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        clip_vision: Any,
        images: Images,
        words: int,
        steps: int,
        learning_rate: float,
        regularization_weight: float,
        masked_loss: bool,
        seed: int,
        filename_prefix: str,
        training_settings: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        from comfy.utils import ProgressBar

        settings = IdentitySettings(
            class_word=images.class_word,
            words=words,
            steps=steps,
            learning_rate=learning_rate,
            regularization_weight=regularization_weight,
            masked=masked_loss,
            seed=seed,
            **settings_of(training_settings, 200),
        )
        next_path(filename_prefix, f"{FILE_FOLDER}/identity")  # fail before a long training rather than after it
        captions = [caption or f"a {images.class_word}" for caption in images.captions]
        encoded = encode_images(vae, images.images, captions, images.masks)
        features = learning.features_of(clip_vision, images.images)
        checkpoints = Checkpoints(FILE_FOLDER)
        bar = ProgressBar(steps)
        learned, run = learning.train_identity_words(
            model,
            clip,
            encoded,
            features,
            settings,
            checkpoint=checkpoints.path,
            progress=lambda done, total, loss, sample: bar.update_absolute(done, total),
        )
        path = checkpoints.save(
            run, filename_prefix, f"{FILE_FOLDER}/identity", lambda path: words_of.save_identity_words(learned, path)
        )
        text = show_text(
            cls,
            f"{_describe(learned)}: {steps_of(run)} on {len(encoded)} images.\n"
            f"Loss: {first_and_last(run.losses)}.\n"
            f"Saved as {path}, {os.path.getsize(path) / 1e6:.1f} MB",
        )
        return io.NodeOutput(learned, {"loss": run.losses}, path, text, ui=ui.PreviewText(text))


def _describe(words: Words) -> str:
    return f"Identity words: {words.words} before '{words.class_word}'"


class LoadIdentityWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditLoadIdentityWords",
            display_name="Load Identity Words",
            category="portrait",
            search_aliases=["identity encoder", "MCDM", "face words"],
            description="Loads an identity word encoder saved by Train Identity Words.",
            inputs=[file_input("Train Identity Words", FILE_FOLDER, CHECKPOINT_FOLDER)],
            outputs=[
                IdentityWords.Output(
                    "identity_words", tooltip="The encoder, for Apply Identity Words and Generate Pairs."
                ),
                io.String.Output("report", tooltip="Contents of the file and training settings."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        return check_file(file, "train the identity words again")

    @classmethod
    def fingerprint_inputs(cls, file: str | None, **_: Any) -> float:
        return fingerprint_of(file)

    @classmethod
    @checked
    def execute(cls, file: str) -> io.NodeOutput:
        words = words_of.load_identity_words(saved_path(file))
        return io.NodeOutput(words, show_text(cls, f"{_describe(words)}{how_trained(words.training)}."))


class ApplyIdentityWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IdentityEditApplyIdentityWords",
            display_name="Apply Identity Words",
            category="portrait",
            search_aliases=["identity prompt", "MCDM", "face words"],
            advanced=["class_word"],
            description="Encodes a prompt with identity words for the person in an image, inserted in front of "
            "the class word (Chen et al. 2024, supplement 1.1).",
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="The text encoders of the checkpoint that the identity words were trained with."
                ),
                IdentityWords.Input(
                    "identity_words", tooltip="Identity word encoder, from Load Identity Words or Train Identity Words."
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    tooltip="Image of the person, from CLIP Vision Encode with crop 'none' and the image encoder "
                    "used in training.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Prompt that contains the class word: 'a woman, Santa Claus costume'.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    tooltip="Word in front of which the identity words are inserted, such as 'woman'. Empty: the "
                    "class word used in training.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning",
                    tooltip="The prompt with identity words; with several images, one entry per image of the batch.",
                )
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, clip: Any, identity_words: Words, clip_vision_output: Any, prompt: str, class_word: str
    ) -> io.NodeOutput:
        features = words_of.image_features(clip_vision_output)
        vectors = words_of.identity_vectors(identity_words, features)
        word = class_word.strip() or identity_words.class_word
        return io.NodeOutput(words_of.identity_conditioning(clip, vectors, prompt, word))


NODES: list[type[io.ComfyNode]] = [TrainIdentityWords, LoadIdentityWords, ApplyIdentityWords]
