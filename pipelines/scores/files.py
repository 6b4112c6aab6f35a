"""Weight files for scores: their folder, and torchvision networks loaded from them.

All are the user's own below models/image_scores; nothing is downloaded. Files keep the names under which their authors
publish them, so that no choice has to be made among them, and may be converted to .safetensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ..networks.model_folders import model_roots, read_checkpoint
from ..shared.errors import IdentityEditError, first_line, for_console, shortened

FOLDER = "image_scores"
ENDINGS = (".safetensors", ".pth", ".pt")


def files() -> dict[str, str]:
    """Path by name, relative to the folder with "/", of all files of weights below models/image_scores."""
    found: dict[str, str] = {}
    for root in model_roots(FOLDER):
        for folder, _, names in os.walk(root):
            for name in sorted(names):
                path = os.path.join(folder, name)
                if name.lower().endswith(ENDINGS):
                    found.setdefault(os.path.relpath(path, root).replace(os.sep, "/"), path)
    return found


def find_file(beginning: str, example: str, purpose: str, what: str, *, whole_name: bool = False) -> str:
    """Path of the file whose name starts with `beginning`; with `whole_name`, the rest is only an extension.

    Args:
        beginning: of the file's name; capitals do not matter.
        example: a published name, for the message.
        purpose: what it is needed for, for the message.
        what: what it is, for the message.
        whole_name: whether nothing but the ending may follow.

    Raises:
        IdentityEditError: when there is no such file.
    """
    for name, path in sorted(files().items()):
        stem = os.path.splitext(os.path.basename(name))[0].lower()
        if stem == beginning or (stem.startswith(beginning) and not whole_name):
            return path
    raise IdentityEditError(missing_file(example, purpose, what))


def missing_file(name: str, purpose: str, what: str) -> str:
    """Error message for a missing file, with its expected location."""
    return for_console(f"{purpose} needs {name} ({what}); put it into {model_roots(FOLDER)[0]}, and press R.")


def backbone_of_torchvision(path: str, architecture: str) -> Any:
    """The `features` of a network of torchvision with the weights of a file.

    Raises:
        IdentityEditError: when torchvision cannot be imported, or the file holds another network.
    """
    state = read_checkpoint(path)
    features = torchvision_network(lambda models: getattr(models, architecture)(weights=None)).features
    own = {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}
    return with_weights(features, own, path, architecture)


def torchvision_network(make: Callable[[Any], Any]) -> Any:
    """A torchvision network on the meta device; `with_weights` fills it.

    Args:
        make: makes it from the module torchvision.models.

    Raises:
        IdentityEditError: when torchvision cannot be imported, as where it was built for another torch.
    """
    try:
        from torchvision import models
    except Exception as error:  # a build for another torch raises RuntimeError, a missing one ImportError
        raise IdentityEditError(
            f"The package torchvision cannot be imported ({first_line(error)}); install the one for your torch, or "
            f"leave this score out."
        ) from error
    with torch.device("meta"):  # random weights of a VGG-16 would take half a gigabyte and seconds
        return make(models)


def with_weights(network: Any, state: dict[str, torch.Tensor], path: str, name: str) -> Any:
    """The network with the tensors of a file in float32.

    Raises:
        IdentityEditError: when one is missing, left over or of another shape.
    """
    values = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    try:
        network.load_state_dict(values, assign=True)
    except RuntimeError as error:
        raise IdentityEditError(
            f"{os.path.basename(path)} is not the file of {name} that torchvision publishes ({_second_line(error)}); "
            f"copy it again."
        ) from error
    return network.requires_grad_(False)


def _second_line(error: RuntimeError) -> str:
    """torch names the module first and the tensors after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[min(1, len(lines) - 1)].rstrip(". "), 160)
