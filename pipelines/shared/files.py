"""Files that are written whole or not at all: tensors as safetensors, with their description in the header.

safetensors is used for both because it holds no code: nothing in such a file is ever executed.

A process that is killed while it writes leaves a folder of a temporary name, which no list of files shows. The next
one that writes into the folder removes it, once it is so old that no living process can be writing it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from typing import Any

import torch

from .errors import IdentityEditError, first_line

CLAIMED = ".claimed.tmp"
"""Behind the name of a file that a process is about to write."""
ABANDONED_AFTER = 3600.0
"""Seconds without a change after which something half written belongs to no living process."""
FILE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""In which a file may keep trained weights."""
DESCRIPTION = "identity_edit"
"""The header's entry in which this pack's files describe themselves."""
_TEMPORARY = re.compile(r"\.(claimed|[0-9a-f]{8})\.tmp$")
_FORMER_SPELLINGS = (("picture", "image"), ("regularisation", "regularization"), ("normalise", "normalize"))
"""In the names of tensors and the keys of descriptions."""
_NOT_UNDERSTOOD = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, MemoryError
)  # fmt: skip
"""What Python and torch raise for values of wrong types and sizes; RecursionError is a RuntimeError."""


@contextlib.contextmanager
def written_whole(path: str) -> Iterator[str]:
    """A name to write to, which takes the place of `path` when the block ends well and is removed when it does not.

    It is in a folder of its own beside `path`, because safetensors (from 0.8) writes to a temporary file beside the one
    it is asked for, under a name that nobody could tell from those of others. What killed processes left here is
    removed. Raises OSError as the system does.
    """
    path = os.path.abspath(path)
    parent = os.path.dirname(path)
    folder = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    os.makedirs(parent, exist_ok=True)
    remove_abandoned(parent)
    os.mkdir(folder)
    try:
        temporary = os.path.join(folder, "unfinished")  # no ending: lists of files look into folders too
        yield temporary
        os.chmod(temporary, _mode_of_new_files(folder))
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _mode_of_new_files(folder: str) -> int:
    """The permissions that the user's umask gives to new files: safetensors (from 0.8) gives its owner's alone, with
    which a server of another user could not read a shared models folder."""
    probe = os.path.join(folder, "permissions")
    with open(probe, "x"):
        return os.stat(probe).st_mode & 0o777


def remove_abandoned(parent: str) -> None:
    """Remove the temporary folders of `written_whole` and the claims that have not changed for ABANDONED_AFTER."""
    with contextlib.suppress(OSError):  # another process may be tidying up too, and nothing depends on it
        for name in os.listdir(parent):
            path = os.path.join(parent, name)
            if not _TEMPORARY.search(name) or os.path.islink(path):
                continue
            within = [os.path.join(path, each) for each in os.listdir(path)] if os.path.isdir(path) else []
            if time.time() - max(os.path.getmtime(each) for each in (path, *within)) < ABANDONED_AFTER:
                continue
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.remove(path)


def write_tensors(path: str, tensors: dict[str, torch.Tensor], description: dict[str, Any]) -> None:
    """Write tensors and a JSON description to `path`, replacing a file that is there, or leave everything as it was.

    Args:
        path: where to write; the folder is made when it is missing.
        tensors: the tensors by name.
        description: what JSON can hold; it goes into the file's header.

    Raises:
        IdentityEditError: when the folder or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with written_whole(path) as temporary:
            save_file(_with_memory_of_their_own(tensors), temporary, metadata={DESCRIPTION: json.dumps(description)})
    except (OSError, SafetensorError) as error:
        raise IdentityEditError(
            f"The file {path} cannot be written ({getattr(error, 'strerror', None) or error}); choose another folder, "
            f"or make room."
        ) from error


def _with_memory_of_their_own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU; copied only where they share their memory, which safetensors refuses."""
    own: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        own[name] = plain
    return own


def read_tensors(path: str, kind: str, prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file of `write_tensors`.

    Args:
        path: the file.
        kind: the value that the description's "kind" must have, such as "inversion".
        prefix: reads only tensors whose names begin with it.

    Returns:
        the tensors by name (CPU) and the description.

    Raises:
        IdentityEditError: when the file is missing, damaged, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            description = json.loads((file.metadata() or {}).get(DESCRIPTION, "null"))
            if not isinstance(description, dict) or description.get("kind") != kind:
                raise IdentityEditError(f"The file {path} holds no {kind}; choose one saved by this pack.")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
    except FileNotFoundError as error:
        raise IdentityEditError(f"The file {path} does not exist; choose another, or save one first.") from error
    except IdentityEditError:
        raise
    except (OSError, SafetensorError, *_NOT_UNDERSTOOD) as error:  # JSON nested too deeply, numbers of too many digits
        raise IdentityEditError(f"The file {path} cannot be read ({error}); save it again.") from error
    return _with_current_names(tensors), _with_current_names(description)


def _with_current_names(value: Any) -> Any:
    """Tensors by name, or a description, with the former spellings of some names replaced by today's."""
    if isinstance(value, list):
        return [_with_current_names(each) for each in value]
    if not isinstance(value, dict):
        return value
    renamed = {}
    for key, each in value.items():
        for old, new in _FORMER_SPELLINGS:
            key = key.replace(old, new)
        renamed[key] = _with_current_names(each)
    return renamed


def header_of(path: str, remedy: str = "save it again") -> tuple[set[str], dict[str, str]]:
    """The names of a safetensors file's tensors, and its metadata; of another kind of file, nothing.

    Raises:
        IdentityEditError: when it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not path.lower().endswith(".safetensors"):
        return set(), {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return set(file.keys()), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise IdentityEditError(f"The file {path} cannot be read ({first_line(error)}); {remedy}.") from error


def read_foreign(
    path: str, remedy: str, instead: str, classes: tuple[type, ...] = (), device: str = "cpu", mmap: bool = False
) -> Any:
    """The content of another program's file, safetensors or a pickle, without executing anything in it.

    Args:
        path: the file.
        remedy: what to do when it cannot be read.
        instead: what to do when it is a pickle of more than tensors.
        classes: further classes that a pickle may hold.
        device, mmap: as for `torch.load`.

    Raises:
        IdentityEditError: when it is missing or damaged, or holds code.
    """
    from safetensors.torch import load_file

    try:
        if path.lower().endswith(".safetensors"):
            return load_file(path, device=device)
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, weights_only=True, map_location=device, mmap=mmap)
    except FileNotFoundError as error:
        raise IdentityEditError(f"The file {path} does not exist; choose another.") from error
    except pickle.UnpicklingError as error:
        raise IdentityEditError(
            f"The file {path} is damaged or holds code beside its tensors, which is never executed; {instead}."
        ) from error
    except Exception as error:  # torch raises many kinds for what is no file of its own
        raise IdentityEditError(f"The file {path} cannot be read ({first_line(error)}); {remedy}.") from error


@contextlib.contextmanager
def understanding(path: str, what: str, remedy: str = "train and save it again") -> Iterator[None]:
    """Around the lines that make something of a file's tensors and description, which may hold anything at all.

    Args:
        path: the file.
        what: what it should hold, for the message, such as "The subject".
        remedy: the end of the message.

    Raises:
        IdentityEditError: when they could not make it.
    """
    try:
        yield
    except IdentityEditError:
        raise
    except _NOT_UNDERSTOOD as error:
        raise IdentityEditError(
            f"{what} {path} is damaged or of another version of this pack ({type(error).__name__}: {error}); {remedy}."
        ) from error


def check_facts(training: Any, numbers: tuple[str, ...]) -> dict[str, Any]:
    """What a description says about a training, which reports print.

    Raises:
        TypeError, ValueError: unless it is a dictionary in which these, where they are there, are numbers; see
            `understanding`.
    """
    if not isinstance(training, dict):
        raise TypeError("training is no dictionary")
    for name in numbers:
        if isinstance(training.get(name, 0), (str, bool)) or not float(training.get(name, 0)) >= 0:
            raise ValueError(f"{name} is no number from 0")
    return training
