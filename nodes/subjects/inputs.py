"""Shared parts of the subject nodes: the input `class_word`, local language models and a progress bar."""

from __future__ import annotations

from collections.abc import Callable

from comfy_api.latest import io

from ...pipelines.networks import model_folders

MODEL_FOLDER = "LLM"
MODEL_FILES = "config.json, the *.safetensors weights and the tokenizer's or processor's files"


def class_word_input(tooltip: str) -> io.String.Input:
    return io.String.Input("class_word", default="", tooltip=tooltip)


def list_models() -> dict[str, str]:
    """Folders in models/LLM that contain a model, by name."""
    return model_folders.list_models(MODEL_FOLDER)


def check_model(name: str | None) -> bool | str:
    """For `validate_inputs`: True for one of `list_models` or None (linked), else the sentence that it is missing."""
    return name is None or name in list_models() or model_folders.missing_model(MODEL_FOLDER, name, MODEL_FILES)


def model_path(name: str) -> str:
    return model_folders.model_path(MODEL_FOLDER, name, MODEL_FILES)


def progress_bar() -> Callable[[int, int], None]:
    from comfy.utils import ProgressBar

    bar = ProgressBar(1)
    return lambda done, total: bar.update_absolute(done, total)
