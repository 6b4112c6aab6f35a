"""Atomic writes and safe reads: tensors as safetensors, with a JSON description in the header.

safetensors files contain no code, so loading one never executes anything.

A process killed during a write leaves a temporary folder behind, which file lists do not show. The next write into the
same folder removes it once it is too old to belong to a running process.
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
"""Suffix that marks the name of a file a process is about to write."""
ABANDONED_AFTER = 3600.0
"""Seconds without a change after which a partial file is considered abandoned."""
FILE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Data types for saved weights."""
DESCRIPTION = "identity_edit"
"""Header entry with the JSON description of this pack's files."""
_TEMPORARY = re.compile(r"\.(claimed|[0-9a-f]{8})\.tmp$")
_FORMER_SPELLINGS = (("picture", "image"), ("regularisation", "regularization"), ("normalise", "normalize"))
"""(old, new) spellings in the names of tensors and the keys of descriptions."""
_PARSE_ERRORS = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, MemoryError
)  # fmt: skip
"""Exceptions that Python and torch raise for values of wrong types and sizes; RecursionError is a RuntimeError."""


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[str]:
    """Context manager for an atomic write: yields a temporary path that replaces `path` on success.

    The temporary file is in its own folder next to `path`, because safetensors (from 0.8) itself writes to a temporary
    file beside its target, under an unpredictable name. Abandoned folders are removed first. Raises OSError.
    """
    path = os.path.abspath(path)
    parent = os.path.dirname(path)
    folder = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    os.makedirs(parent, exist_ok=True)
    remove_abandoned(parent)
    os.mkdir(folder)
    try:
        temporary = os.path.join(folder, "unfinished")  # no extension, so that recursive file lists skip it
        yield temporary
        os.chmod(temporary, _mode_of_new_files(folder))
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _mode_of_new_files(folder: str) -> int:
    """The permissions of new files under the user's umask. safetensors (from 0.8) creates files that only the owner
    can read, so another user's server could not read them from a shared models folder."""
    probe = os.path.join(folder, "permissions")
    with open(probe, "x"):
        return os.stat(probe).st_mode & 0o777


def remove_abandoned(parent: str) -> None:
    """Remove temporary folders of `atomic_write` and claims that have not changed for ABANDONED_AFTER seconds."""
    with contextlib.suppress(OSError):  # best effort: another process may be cleaning up too
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
    """Write tensors and a JSON description to `path` atomically, replacing an existing file.

    Args:
        path: the file; its folder is created if needed.
        tensors: the tensors by name.
        description: JSON-serializable; stored in the file's header.

    Raises:
        IdentityEditError: when the folder or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomic_write(path) as temporary:
            save_file(_with_memory_of_their_own(tensors), temporary, metadata={DESCRIPTION: json.dumps(description)})
    except (OSError, SafetensorError) as error:
        raise IdentityEditError(
            f"The file {path} cannot be written ({getattr(error, 'strerror', None) or error}); choose another folder, "
            f"or free disk space."
        ) from error


def _with_memory_of_their_own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, copied where several share memory, which safetensors rejects."""
    unshared: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        unshared[name] = plain
    return unshared


def read_tensors(path: str, kind: str, prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file written by `write_tensors`.

    Args:
        path: the file.
        kind: the required value of the description's "kind", such as "inversion".
        prefix: only tensors whose names start with it are read.

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
                raise IdentityEditError(f"The file {path} contains no {kind}; choose one saved by this pack.")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
    except FileNotFoundError as error:
        raise IdentityEditError(f"The file {path} does not exist; choose another, or save one first.") from error
    except IdentityEditError:
        raise
    except (OSError, SafetensorError, *_PARSE_ERRORS) as error:  # includes JSON that is too deep, oversized integers
        raise IdentityEditError(f"The file {path} cannot be read ({error}); save it again.") from error
    return _with_current_names(tensors), _with_current_names(description)


def _with_current_names(value: Any) -> Any:
    """Tensors by name, or a description, with former spellings of names replaced by current ones."""
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
    """The tensor names and metadata of a safetensors file; both empty for any other file type.

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


def load_external(
    path: str, remedy: str, instead: str, classes: tuple[type, ...] = (), device: str = "cpu", mmap: bool = False
) -> Any:
    """Load a third-party safetensors or pickle file without executing any code in it.

    Args:
        path: the file.
        remedy: end of the message for a file that cannot be read.
        instead: end of the message for a pickle that contains more than tensors.
        classes: additional classes allowed in a pickle.
        device, mmap: as for `torch.load`.

    Raises:
        IdentityEditError: when it is missing or damaged, or contains code.
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
            f"The file {path} is damaged or contains code, which is never executed; {instead}."
        ) from error
    except Exception as error:  # torch raises many kinds of exceptions for files that it did not write
        raise IdentityEditError(f"The file {path} cannot be read ({first_line(error)}); {remedy}.") from error


@contextlib.contextmanager
def parsing_file(path: str, what: str, remedy: str = "train and save it again") -> Iterator[None]:
    """Context manager for parsing untrusted file contents (tensors and description).

    Args:
        path: the file.
        what: the expected content, for the message, such as "The subject".
        remedy: end of the message.

    Raises:
        IdentityEditError: when the contents cannot be parsed.
    """
    try:
        yield
    except IdentityEditError:
        raise
    except _PARSE_ERRORS as error:
        raise IdentityEditError(
            f"{what} {path} is damaged or from another version of this pack ({type(error).__name__}: {error}); "
            f"{remedy}."
        ) from error


def checked_record(training: Any, numbers: tuple[str, ...]) -> dict[str, Any]:
    """Validate a description's record of the training run, which reports print.

    Args:
        training: the record.
        numbers: names of its entries that, where present, must be numbers from 0.

    Raises:
        TypeError, ValueError: when it is invalid; see `parsing_file`.
    """
    if not isinstance(training, dict):
        raise TypeError("training is not a dictionary")
    for name in numbers:
        if isinstance(training.get(name, 0), (str, bool)) or not float(training.get(name, 0)) >= 0:
            raise ValueError(f"{name} is not a number from 0")
    return training
