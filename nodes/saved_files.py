"""Files that the pack's nodes save below ComfyUI's folders, and lists of the files that they can load."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import folder_paths
from comfy_api.latest import io

from ..pipelines.shared.errors import IdentityEditError, for_console
from ..pipelines.shared.files import CLAIMED

FILE_ENDING = ".safetensors"
IN_OUTPUT_FOLDER = " [output]"
"""ComfyUI's suffix for names that are relative to the output folder."""
_LONGEST_NAME = 200
"""Maximum bytes of a file or folder name; file systems allow 255, and a number and an ending follow."""
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}
_DIFFUSION_MODELS = "diffusion_models"
_FOLDER_MARK = f" [{_DIFFUSION_MODELS}]"
_CLOCK_STEP = 2_000_000_000
"""Nanoseconds within which two changes of a folder may have the same timestamp (FAT has the coarsest clock)."""


def next_path(filename_prefix: str, example: str) -> str:
    """The next free file of a prefix below the output folder, numbered as ComfyUI numbers images.

    Raises:
        IdentityEditError: when the prefix is empty, points outside the output folder, or cannot be written to.
    """
    output = folder_paths.get_output_directory()
    check_name(filename_prefix, "filename_prefix")
    if not os.path.basename(os.path.normpath(filename_prefix)).strip(". "):
        raise IdentityEditError(f"filename_prefix is empty; write a file name such as '{example}'.")
    if not os.path.abspath(os.path.join(output, filename_prefix)).startswith(os.path.abspath(output) + os.sep):
        raise IdentityEditError(
            f"filename_prefix '{filename_prefix}' points outside the output folder; write a name or a folder below it."
        )
    try:
        folder, name, number, _, _ = folder_paths.get_save_image_path(filename_prefix, output)
    except OSError as error:
        raise IdentityEditError(
            f"filename_prefix '{filename_prefix}' cannot be written to ({error.strerror}); choose another folder, or "
            f"make the output folder writable."
        ) from error
    return os.path.join(folder, f"{name}_{number:05}_{FILE_ENDING}")


@contextlib.contextmanager
def new_path(filename_prefix: str, example: str) -> Iterator[str]:
    """`next_path`, reserved for this process while the block writes the file.

    A second server that saves into the same folder under the same prefix gets the next number; without the
    reservation both would write the same file and one result would be lost.

    Raises:
        IdentityEditError: as `next_path` does.
    """
    while True:
        path = next_path(filename_prefix, example)
        claim = path + CLAIMED
        try:
            with open(claim, "x"):
                pass
        except FileExistsError:
            continue  # reserved by another process; ComfyUI counts the claim, so the next number differs
        except OSError as error:
            raise IdentityEditError(
                f"filename_prefix '{filename_prefix}' cannot be written to ({error.strerror}); choose another folder, "
                f"or make the output folder writable."
            ) from error
        if not os.path.exists(path):  # else another process has written it since
            break
        os.remove(claim)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            os.remove(claim)


def check_name(name: str, what: str) -> None:
    """Check a file or folder name, with folders before it; `what` is the name of the input.

    Raises:
        IdentityEditError: when a part of it is too long for file systems, or a reserved device name on Windows.
    """
    for part in name.replace("\\", "/").split("/"):
        if len(part.encode("utf-8", "replace")) > _LONGEST_NAME:
            raise IdentityEditError(f"{what} is too long; write a shorter name.")
        if part.split(".")[0].strip().upper() in _DEVICES:
            raise IdentityEditError(f"{what} '{name}' is a reserved device name on Windows; write another name.")


def loadable_files(folder: str, without: str | None = None) -> list[str]:
    """Names for a combo: files in the input folder itself, and in `folder` below the input and output folders, except
    in its subfolder `without`. Other folders below the input folder may contain any number of images and are not
    searched; a file in one of them is still accepted (`check_file`)."""
    inputs, outputs = folder_paths.get_input_directory(), folder_paths.get_output_directory()
    return [
        *_listing(inputs).files,
        *_files_below(inputs, folder, without),
        *(f"{name}{IN_OUTPUT_FOLDER}" for name in _files_below(outputs, folder, without)),
    ]


def filename_prefix_input(folder: str, name: str, loader: str) -> io.String.Input:
    """The input `filename_prefix` of a node that saves to `folder` below the output folder, which `loader` lists."""
    return io.String.Input(
        "filename_prefix",
        default=f"{folder}/{name}",
        tooltip=f"Folder and start of the file name, below the output folder. {loader} lists the files in '{folder}'.",
    )


def file_input(made_by: str, folder: str, without: str | None = None) -> io.Combo.Input:
    """Combo of `loadable_files`; `made_by` is the node that saves them."""
    return io.Combo.Input(
        "file",
        options=loadable_files(folder, without),
        tooltip=f"Files saved by {made_by}: in the input folder itself and in '{folder}' below the output or "
        "input folder. Press R to refresh the list.",
    )


def check_file(file: str | None, remedy: str, folders: Sequence[str] = ()) -> bool | str:
    """For `validate_inputs`: True when a name of `loadable_files` or `model_folder_files` is a file, or unknown because
    the combo is linked, else an error message; `remedy` is the alternative to choosing another file."""
    if file is None:
        return True
    try:
        path = path_of(file, folders)
    except IdentityEditError as error:
        return str(error)
    from_models = any(file.endswith(f" [{folder}]") for folder in folders)
    if path is not None and os.path.isfile(path) and (from_models or path.endswith(FILE_ENDING)):
        return True
    return for_console(f"file '{file}' no longer exists; choose another one, or {remedy}.")


def model_folder_files(folders: Sequence[str], endings: tuple[str, ...]) -> list[str]:
    """Names for a combo: files in ComfyUI's model folders, each with its folder as a suffix."""
    known = [folder for folder in folders if folder in folder_paths.folder_names_and_paths]
    return [
        f"{name} [{folder}]"
        for folder in known
        for name in folder_paths.get_filename_list(folder)
        if name.lower().endswith(endings)
    ]


def path_of(file: str, folders: Sequence[str]) -> str | None:
    """Path of a name of `loadable_files` or of `model_folder_files`, or None when a folder has no such file.

    Raises:
        IdentityEditError: for a name outside ComfyUI's folders, which can arrive through a link to the combo.
    """
    for folder in folders:
        if file.endswith(f" [{folder}]"):
            return folder_paths.get_full_path(folder, file.removesuffix(f" [{folder}]"))
    return saved_path(file)


def saved_path(file: str) -> str:
    """Path of a name of `loadable_files`.

    Raises:
        IdentityEditError: for a name outside ComfyUI's folders, which can arrive through a link to the combo.
    """
    name, folder = folder_paths.annotated_filepath(file)
    return path_below(folder or folder_paths.get_input_directory(), name, "file")


def path_below(folder: str, name: str, what: str) -> str:
    """Path of a file or folder by its name below a folder; `what` is the name of the input.

    Raises:
        IdentityEditError: when the name is empty or points outside the folder.
    """
    folder = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(folder, name))
    if not path.startswith(folder + os.sep):
        raise IdentityEditError(f"{what} '{name}' is empty or outside ComfyUI's folders; choose one from the list.")
    return path


def fingerprint_of(file: str | None, folders: Sequence[str] = ()) -> float:
    """For `fingerprint_inputs`: `changed_at` of a name of `loadable_files` or `model_folder_files`; 0 for None, a
    linked combo, whose file ComfyUI does not know yet."""
    return 0.0 if file is None else changed_at(path_of(file, folders))


def changed_at(path: str | None) -> float:
    """Modification time of a file; 0 for a missing file."""
    return os.path.getmtime(path) if path is not None and os.path.isfile(path) else 0.0


def folders_below(root: str) -> list[str]:
    """All folders below a folder at any depth except links, by relative path, sorted like ComfyUI's own list."""
    names: list[str] = []
    waiting = [""]
    while waiting:
        name = waiting.pop()
        path = os.path.join(root, name) if name else root
        below = [f"{name}/{folder}" if name else folder for folder in _listing(path).folders]
        below = [folder for folder in below if not os.path.islink(os.path.join(root, folder))]
        names += below
        waiting += below
    return sorted(names)


@dataclass(frozen=True)
class _Listing:
    """Direct contents of a folder: safetensors files and folders, sorted; `changed` is its timestamp in nanoseconds."""

    changed: int
    files: tuple[str, ...]
    folders: tuple[str, ...]


_listings: dict[str, _Listing] = {}
"""Cache by folder, so that a folder of many thousand images is not read at every page load."""


def _listing(folder: str) -> _Listing:
    """A folder's listing, read again when the folder has changed; empty for one that cannot be read."""
    files, folders = [], []
    try:
        changed = os.stat(folder).st_mtime_ns
        kept = _listings.get(folder)
        if kept is not None and kept.changed == changed:
            return kept
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.endswith(FILE_ENDING):
                    files.append(entry.name)
    except OSError:
        return _Listing(0, (), ())
    listing = _Listing(changed, tuple(sorted(files)), tuple(sorted(folders)))
    if time.time_ns() - changed > _CLOCK_STEP:  # else a later file may not change the folder's timestamp
        _listings[folder] = listing
    return listing


def _files_below(root: str, folder: str, without: str | None) -> list[str]:
    """Files in a root's folder at any depth, by their path from the root, sorted."""
    names: list[str] = []
    waiting = [folder]
    while waiting:
        name = waiting.pop()
        listing = _listing(os.path.join(root, name))
        names += [f"{name}/{file}" for file in listing.files]
        below = [f"{name}/{inner}" for inner in listing.folders]
        waiting += [path for path in below if without is None or path != f"{folder}/{without}"]
    return sorted(names)


def model_files() -> list[str]:
    """Names of all checkpoints, and of all diffusion models with a suffix."""
    models = [f"{name}{_FOLDER_MARK}" for name in folder_paths.get_filename_list(_DIFFUSION_MODELS)]
    return [name for name in folder_paths.get_filename_list("checkpoints") + models if ".safetensors" in name]


def model_path(file: str) -> str:
    """Path of one of `model_files`.

    Raises:
        IdentityEditError: for a missing one.
    """
    folder = _DIFFUSION_MODELS if file.endswith(_FOLDER_MARK) else "checkpoints"
    path = folder_paths.get_full_path(folder, file.removesuffix(_FOLDER_MARK)) if file else None
    if path is None:
        raise IdentityEditError(f"file '{file}' is not in ComfyUI's {folder}; choose another one.")
    return path
