"""Networks of transformers, timm and others, from folders and files in ComfyUI's models folder.

Nothing is downloaded and no code from a file is executed: local files only, safetensors, or pickles that torch reads
with weights_only. A network is loaded for one node's run and freed afterwards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..engine.host import device_with_room, give_memory_back
from ..shared.errors import IdentityEditError, first_line, for_console

CONFIG = "config.json"


def model_roots(name: str) -> list[str]:
    """ComfyUI's model folders of a kind: models/NAME, unless extra_model_paths.yaml defines others."""
    import folder_paths

    if name in folder_paths.folder_names_and_paths:
        return list(folder_paths.get_folder_paths(name))
    return [os.path.join(folder_paths.models_dir, name)]


def list_models(name: str, endings: tuple[str, ...] = ()) -> dict[str, str]:
    """Models in models/NAME, path by name: folders with a config.json, directly or one level deeper (author/model), and
    files with one of the endings."""
    models: dict[str, str] = {}
    for root in model_roots(name):
        if not os.path.isdir(root):
            continue
        for outer in sorted(os.listdir(root)):
            path = os.path.join(root, outer)
            if os.path.isfile(path) and endings and outer.lower().endswith(endings):
                models.setdefault(outer, path)
            if not os.path.isdir(path):
                continue
            inner = [f"{outer}/{entry}" for entry in sorted(os.listdir(path))]
            for candidate in (outer, *inner):
                folder = os.path.join(root, candidate)
                if os.path.isfile(os.path.join(folder, CONFIG)):
                    models.setdefault(candidate, folder)
    return models


def missing_model(name: str, model: str, needed: str) -> str:
    """The error message for a missing model, with its expected location and files."""
    return for_console(f"The model '{model}' is not in {model_roots(name)[0]}; put it there ({needed}), and press R.")


def model_path(name: str, model: str, needed: str, endings: tuple[str, ...] = ()) -> str:
    """The path of a model in models/NAME; see `list_models` and `missing_model`.

    Raises:
        IdentityEditError: when it is not there.
    """
    models = list_models(name, endings)
    if model not in models:
        raise IdentityEditError(missing_model(name, model, needed))
    return models[model]


def read_config(path: str, needed: str) -> dict[str, Any]:
    """The config.json of a model's folder, after checking that it has weights as safetensors.

    Raises:
        IdentityEditError: when files are missing or unreadable.
    """
    if not os.path.isdir(path):
        raise IdentityEditError(f"The model folder {path} does not exist; create it with {needed}.")
    names = os.listdir(path)
    if CONFIG not in names:
        raise IdentityEditError(f"The model folder {path} has no {CONFIG}; put into it {needed}.")
    if not any(name.endswith(".safetensors") for name in names):
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in names)
        why = "only pickled weights, which could run code" if pickled else "no weights"
        raise IdentityEditError(f"The model folder {path} has {why}; put the model's *.safetensors file into it.")
    try:
        with open(os.path.join(path, CONFIG), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise IdentityEditError(f"{CONFIG} in {path} cannot be read ({first_line(error)}); copy it again.") from error
    if not isinstance(config, dict):
        raise IdentityEditError(f"{CONFIG} in {path} does not describe a model; copy it again.")
    return config


def check_preprocessor(path: str) -> None:
    """Raise `IdentityEditError` if a folder has no image preprocessing config; transformers would silently use another
    model's sizes and colors."""
    if os.path.isfile(os.path.join(path, "preprocessor_config.json")):
        return
    try:  # newer folders have a combined file
        with open(os.path.join(path, "processor_config.json"), encoding="utf-8") as file:
            is_described = "image_processor" in json.load(file)
    except (OSError, ValueError):
        is_described = False
    if not is_described:
        raise IdentityEditError(
            f"The model folder {path} has no preprocessor_config.json for image preprocessing; add it, or choose a "
            f"model that reads images."
        )


@contextmanager
def loaded(
    path: str,
    load: Callable[[], tuple[Any, Any]],
    purpose: str = "",
    memory: float = 2.0,
    dtype: Callable[[torch.dtype, torch.device], torch.dtype] | None = None,
) -> Iterator[tuple[Any, Any, torch.device]]:
    """Context manager: a network on ComfyUI's device, freed at the end.

    Args:
        path: its location, for messages.
        load: returns (network, processor).
        purpose: its purpose, for messages, such as " for text-generation".
        memory: requested from ComfyUI, as a multiple of the weights' size, including room for activations.
        dtype: returns the compute dtype from that of the weights and the device; None for float32.

    Yields:
        the network in evaluation mode, its processor, and the device.

    Raises:
        IdentityEditError: when it cannot be loaded or does not fit into memory.
    """
    network = None
    try:
        try:
            with torch.random.fork_rng(devices=[]):  # libraries initialize weights randomly before loading
                network, processor = load()
            size = sum(parameter.nbytes for parameter in network.parameters())
            device = device_with_room(memory * size)
            chosen = torch.float32 if dtype is None else dtype(network.dtype, device)
            network = network.eval().to(device=device, dtype=chosen)
        except IdentityEditError:
            raise
        except torch.cuda.OutOfMemoryError as error:
            raise IdentityEditError(f"The model in {path} does not fit into memory; choose a smaller one.") from error
        except Exception as error:  # architectures fail in many different ways
            raise IdentityEditError(
                f"The model in {path} cannot be loaded{purpose} ({first_line(error)}); copy its files again, or choose "
                f"another."
            ) from error
        with torch.no_grad():
            yield network, processor, device
    finally:
        del network
        give_memory_back()


def from_transformers(path: str, network_class: Any, processor_class: Any) -> tuple[Any, Any]:
    """(network, processor) of transformers from a local folder, safetensors only, without executing its code."""
    processor = processor_class.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    network, info = network_class.from_pretrained(
        path, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    missing = [key for key in info["missing_keys"] if "pooler" not in key]  # missing in DINO's folders, and unused
    if missing:  # transformers would use random weights
        raise IdentityEditError(
            f"The weights in {path} lack {len(missing)} tensors ({missing[0]}, ...); copy the model's files again."
        )
    return network, processor


@contextmanager
def opened_folder(
    path: str, needed: str, kinds: Collection[str], otherwise: str, network_class: str, processor_class: str
) -> Iterator[tuple[Any, Any, torch.device]]:
    """Context manager: a network of transformers from a folder with an image preprocessor, as `loaded` yields it.

    Args:
        path: the folder.
        needed: its files, for messages.
        kinds: the supported values of "model_type" in its config.json.
        otherwise: end of the message for another kind.
        network_class, processor_class: names of classes of transformers.

    Raises:
        IdentityEditError: when files are missing, or for another kind of network.
    """
    kind = read_config(path, needed).get("model_type")
    if kind not in kinds:
        raise IdentityEditError(f"The model in {path} is '{kind}'{otherwise}.")
    check_preprocessor(path)

    def load() -> tuple[Any, Any]:
        import transformers

        return from_transformers(path, getattr(transformers, network_class), getattr(transformers, processor_class))

    with loaded(path, load) as opened:
        yield opened


def read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a pickle (.pth, .pt) that contains only tensors.

    Raises:
        IdentityEditError: when the file cannot be read.
    """
    try:
        if path.lower().endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds
        raise IdentityEditError(
            f"The checkpoint {path} cannot be read as plain weights ({first_line(error)}); download it again, as "
            f".safetensors where there is one."
        ) from error
    while isinstance(state, dict) and len(state) == 1 and isinstance(next(iter(state.values())), dict):
        state = next(iter(state.values()))  # {"model": {...}} and the like
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise IdentityEditError(f"The checkpoint {path} contains no plain weights; choose the model's original file.")
    return state
