"""The pack's own files below ComfyUI's folders: where a node saves one, and which ones another node can load."""

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
"""ComfyUI's mark on names that are not relative to the input folder."""
_LONGEST_NAME = 200
"""Bytes of a file's or folder's name that a user gives; file systems end at 255, and numbers and endings follow."""
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}
_DIFFUSION_MODELS = "diffusion_models"
_FOLDER_MARK = f" [{_DIFFUSION_MODELS}]"
_CLOCK_STEP = 2_000_000_000
"""Nanoseconds within which two changes of a folder may have the same time (FAT has the coarsest clock)."""


def next_path(filename_prefix: str, example: str) -> str:
    """The next free file of a prefix below the output folder, numbered as ComfyUI numbers images.

    Raises:
        IdentityEditError: when the prefix is empty, leads out of the output folder, or cannot be written to.
    """
    output = folder_paths.get_output_directory()
    check_name(filename_prefix, "filename_prefix")
    if not os.path.basename(os.path.normpath(filename_prefix)).strip(". "):
        raise IdentityEditError(f"filename_prefix is empty; write a file name such as '{example}'.")
    if not os.path.abspath(os.path.join(output, filename_prefix)).startswith(os.path.abspath(output) + os.sep):
        raise IdentityEditError(
            f"filename_prefix '{filename_prefix}' leads out of the output folder; write a name or a folder below it."
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
    """`next_path`, kept for this process while the block writes the file.

    Another server that saves into the same folder under the same prefix gets the next number, where both would write
    the same file and one result would be lost.

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
            continue  # the other one's number; ComfyUI counts the claim, so that the next is another
        except OSError as error:
            raise IdentityEditError(
                f"filename_prefix '{filename_prefix}' cannot be written to ({error.strerror}); choose another folder, "
                f"or make the output folder writable."
            ) from error
        if not os.path.exists(path):  # else the other one has written it since its number was asked for
            break
        os.remove(claim)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            os.remove(claim)


def check_name(name: str, what: str) -> None:
    """Check a file's or folder's name that a user gives, with folders before it; `what` is the input's name.

    Raises:
        IdentityEditError: when a part of it is too long for file systems, or a device of Windows and no file there.
    """
    for part in name.replace("\\", "/").split("/"):
        if len(part.encode("utf-8", "replace")) > _LONGEST_NAME:
            raise IdentityEditError(f"{what} is too long; write a shorter name.")
        if part.split(".")[0].strip().upper() in _DEVICES:
            raise IdentityEditError(f"{what} '{name}' names a device of Windows; write another name.")


def loadable_files(folder: str, without: str | None = None) -> list[str]:
    """Names for a combo: files in the input folder itself, and in the input and output folder's `folder` without its
    `without`. Other folders below the input folder may hold any number of images and are not searched; a file in one
    of them can be named all the same (`check_file`)."""
    inputs, outputs = folder_paths.get_input_directory(), folder_paths.get_output_directory()
    return [
        *_listing(inputs).files,
        *_files_below(inputs, folder, without),
        *(f"{name}{IN_OUTPUT_FOLDER}" for name in _files_below(outputs, folder, without)),
    ]


def file_input(made_by: str, folder: str, without: str | None = None) -> io.Combo.Input:
    """The widget of a node that loads one of `loadable_files`; `made_by` is the node that saves them."""
    return io.Combo.Input(
        "file",
        options=loadable_files(folder, without),
        tooltip=f"Files of {made_by} in the input folder itself and in '{folder}' below the output or the input "
        f"folder. Press R to list new ones.",
    )


def check_file(file: str, remedy: str, folders: Sequence[str] = ()) -> bool | str:
    """For `validate_inputs`: True where a name of `loadable_files` or `model_folder_files` is a file, or the sentence
    that says it is not; `remedy` is what else to do than to choose another one."""
    try:
        path = path_of(file, folders)
    except IdentityEditError as error:
        return str(error)
    from_models = any(file.endswith(f" [{folder}]") for folder in folders)
    if path is not None and os.path.isfile(path) and (from_models or path.endswith(FILE_ENDING)):
        return True
    return for_console(f"file '{file}' is not there any more; choose another one, or {remedy}.")


def model_folder_files(folders: Sequence[str], endings: tuple[str, ...]) -> list[str]:
    """Names for a combo: files of ComfyUI's folders of models, each with its folder as a mark behind it."""
    known = [folder for folder in folders if folder in folder_paths.folder_names_and_paths]
    return [
        f"{name} [{folder}]"
        for folder in known
        for name in folder_paths.get_filename_list(folder)
        if name.lower().endswith(endings)
    ]


def path_of(file: str, folders: Sequence[str]) -> str | None:
    """The path of a name of `loadable_files` or of `model_folder_files`, or None where a folder has no such file.

    Raises:
        IdentityEditError: for a name that leads out of ComfyUI's folders, which a link to the combo could bring.
    """
    for folder in folders:
        if file.endswith(f" [{folder}]"):
            return folder_paths.get_full_path(folder, file.removesuffix(f" [{folder}]"))
    return saved_path(file)


def saved_path(file: str) -> str:
    """The path of a name of `loadable_files`.

    Raises:
        IdentityEditError: for a name that leads out of ComfyUI's folders, which a link to the combo could bring.
    """
    name, folder = folder_paths.annotated_filepath(file)
    return path_below(folder or folder_paths.get_input_directory(), name, "file")


def path_below(folder: str, name: str, what: str) -> str:
    """The path of a file or folder by its name below a folder; `what` is the input's name.

    Raises:
        IdentityEditError: when it is empty or leads out of the folder.
    """
    folder = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(folder, name))
    if not path.startswith(folder + os.sep):
        raise IdentityEditError(f"{what} '{name}' is empty or leads out of ComfyUI's folders; choose one of the list.")
    return path


def changed_at(path: str | None) -> float:
    """When a file was written last, for `fingerprint_inputs`; 0 for a file that is not there."""
    return os.path.getmtime(path) if path is not None and os.path.isfile(path) else 0.0


def folders_below(root: str) -> list[str]:
    """All folders below a folder at any depth but links, by their path from it, sorted: as ComfyUI's own list."""
    found: list[str] = []
    waiting = [""]
    while waiting:
        name = waiting.pop()
        path = os.path.join(root, name) if name else root
        below = [f"{name}/{folder}" if name else folder for folder in _listing(path).folders]
        below = [folder for folder in below if not os.path.islink(os.path.join(root, folder))]
        found += below
        waiting += below
    return sorted(found)


@dataclass(frozen=True)
class _Listing:
    """What a folder holds directly: safetensors files and folders, sorted; `changed` is its time in nanoseconds."""

    changed: int
    files: tuple[str, ...]
    folders: tuple[str, ...]


_listings: dict[str, _Listing] = {}
"""By folder, so that a folder of many thousand images is read once and not at each load of the page."""


def _listing(folder: str) -> _Listing:
    """A folder's listing, read anew when the folder has changed; empty for one that cannot be read."""
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
    if time.time_ns() - changed > _CLOCK_STEP:  # else a file that comes next may leave the folder's time as it is
        _listings[folder] = listing
    return listing


def _files_below(root: str, folder: str, without: str | None) -> list[str]:
    """The files in a root's folder at any depth, by their path from the root, sorted."""
    found: list[str] = []
    waiting = [folder]
    while waiting:
        name = waiting.pop()
        listing = _listing(os.path.join(root, name))
        found += [f"{name}/{file}" for file in listing.files]
        below = [f"{name}/{inner}" for inner in listing.folders]
        waiting += [path for path in below if without is None or path != f"{folder}/{without}"]
    return sorted(found)


def model_files() -> list[str]:
    """Names of all checkpoints, and of all diffusion models with a mark behind them."""
    models = [f"{name}{_FOLDER_MARK}" for name in folder_paths.get_filename_list(_DIFFUSION_MODELS)]
    return [name for name in folder_paths.get_filename_list("checkpoints") + models if ".safetensors" in name]


def model_path(file: str) -> str:
    """The path of one of `model_files`.

    Raises:
        IdentityEditError: for one that is not there.
    """
    folder = _DIFFUSION_MODELS if file.endswith(_FOLDER_MARK) else "checkpoints"
    path = folder_paths.get_full_path(folder, file.removesuffix(_FOLDER_MARK)) if file else None
    if path is None:
        raise IdentityEditError(f"file '{file}' is not in ComfyUI's {folder}; choose another one.")
    return path
