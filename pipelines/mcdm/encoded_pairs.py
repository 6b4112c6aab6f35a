"""Training pairs encoded once by the VAE and CLIP, in a file on disk.

70,000 pairs of 512x512 pixels take 46 GB, so the file is memory-mapped and the operating system caches frequently used
parts. Interrupted encoding resumes with the next pair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.host import stop_if_interrupted
from ..engine.vision import VisionTag, vision_tag, vision_tokens
from ..shared.errors import IdentityEditError
from ..shared.images import encoded, from_pillow, middle, open_image
from ..training.loop import run_hash
from ..training.processes import OneProcess, Processes
from .pair_dataset import TRAIN
from .pair_folder import INDEX

_AT_ONCE = 8
"""Images encoded per call."""
_LOCK_SECONDS = 0.5
"""Interval of checks for cancellation while waiting."""


@dataclass(frozen=True)
class PairFiles:
    """One pair on the disk.

    Attributes:
        source, target: files of x_A and x_B.
        source_prompt, target_prompt: p_a and p_b.
        mirrored: whether both images are flipped horizontally.
    """

    source: Path
    target: Path
    source_prompt: str
    target_prompt: str
    mirrored: bool = False


@dataclass(frozen=True)
class EncodedPairs:
    """Encoded pairs, mapped from a file.

    Attributes:
        records: structured array of n entries: `source` and `target` [C, h, w] float32, the VAE's latents of x_A and
            x_B, and `tokens` [N, D] float16, CLIP's tokens of x_A.
        source_prompts, target_prompts: p_a and p_b of each pair.
        vision: tag of the CLIP vision.
        fingerprint: hexadecimal hash of the pairs and their encoders.
        path: the file.
    """

    records: np.ndarray
    source_prompts: list[str]
    target_prompts: list[str]
    vision: VisionTag
    fingerprint: str
    path: str

    def __len__(self) -> int:
        return len(self.source_prompts)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        channels, height, width = self.records.dtype["source"].shape
        return channels, height, width

    def latents(self, which: str, chosen: Sequence[int]) -> torch.Tensor:
        """Latents [B, C, h, w] float32 CPU of the chosen pairs; `which` is "source" or "target"."""
        return torch.from_numpy(np.array(self.records[which][list(chosen)]))

    def tokens(self, chosen: Sequence[int]) -> torch.Tensor:
        """CLIP's tokens [B, N, D] float32 CPU of the chosen pairs' x_A."""
        return torch.from_numpy(self.records["tokens"][list(chosen)].astype(np.float32))


def pairs_in_folder(folder: Path) -> tuple[list[PairFiles], list[PairFiles]]:
    """The training and validation pairs of a folder's index.

    Raises:
        IdentityEditError: when there is no index, or a line is invalid.
    """
    index = folder / INDEX
    try:
        lines = [line for line in index.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityEditError(
            f"The folder {folder} has no readable {INDEX} ({error}); choose a folder of pairs."
        ) from error
    splits: tuple[list[PairFiles], list[PairFiles]] = ([], [])
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            texts = [entry[name] for name in ("source", "target", "source_prompt", "target_prompt")]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("paths and prompts are texts")
            pair = PairFiles(_inside(folder, texts[0]), _inside(folder, texts[1]), texts[2], texts[3])
            splits[0 if entry.get("split", TRAIN) == TRAIN else 1].append(pair)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IdentityEditError(
                f"Line {number} of {index} is invalid ({error!r}); remove it, or generate the pairs again."
            ) from error
    return splits


def _inside(folder: Path, name: str) -> Path:
    """The path of an image listed in an index, which is untrusted.

    Raises:
        ValueError: when it is outside the folder, by its name or by a link.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is outside the folder")
    return path


def with_mirrored(pairs: Sequence[PairFiles]) -> list[PairFiles]:
    """The pairs, followed by a mirrored copy of each."""
    return [*pairs, *(dataclasses.replace(pair, mirrored=True) for pair in pairs)]


def encode_pairs(
    pairs: Sequence[PairFiles],
    vae: Any,
    clip_vision: Any,
    folder: str,
    *,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes | None = None,
) -> EncodedPairs:
    """Encode both images of every pair, or resume an interrupted encoding.

    Args:
        pairs: all of one size, at least one.
        vae, clip_vision: VAE and CLIP_VISION.
        folder: folder of the file, whose name is a hash of the pairs and the encoders.
        progress: called with (encoded pairs, total pairs).
        processes: the processes that train together; the first encodes.

    Raises:
        IdentityEditError: when an image cannot be read or has another size, or the file cannot be written.
    """
    if not pairs:
        raise IdentityEditError("There is no pair to train on; generate pairs first, or choose another folder.")
    processes = processes or OneProcess()
    vision = vision_tag(clip_vision)
    height, width = read_image(pairs[0].source).shape[:2]
    fingerprint = _fingerprint(pairs, (height, width), vae, vision)
    path = os.path.join(folder, f"pairs-{fingerprint}.bin")
    latent = _encode(vae, read_image(pairs[0].source)[None])
    layout = np.dtype(
        [
            ("source", "<f4", tuple(latent.shape[1:])),
            ("target", "<f4", tuple(latent.shape[1:])),
            ("tokens", "<f2", (vision.tokens, vision.width)),
        ]
    )
    records = None
    if processes.index == 0:
        with _alone(path):
            if not os.path.exists(path):
                _write(pairs, (height, width), vae, clip_vision, path, layout, progress)
            records = np.memmap(path, dtype=layout, mode="r")
    processes.wait()
    return EncodedPairs(
        records=np.memmap(path, dtype=layout, mode="r") if records is None else records,
        source_prompts=[pair.source_prompt for pair in pairs],
        target_prompts=[pair.target_prompt for pair in pairs],
        vision=vision,
        fingerprint=fingerprint,
        path=path,
    )


def remove_encoded(encoded: EncodedPairs) -> None:
    """Delete the file of encoded pairs, if the system allows it. Trainings that have mapped it can still read it."""
    with contextlib.suppress(OSError), _alone(encoded.path):  # Windows keeps a file that is mapped
        os.remove(encoded.path)


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """Lock the file of encoded pairs against other processes on this machine.

    Otherwise two servers that train on the same pairs could both append to it. It is an operating system lock, released
    when its process is killed; filelock is a dependency of torch. Its empty file is not deleted, because a waiting
    process and a new one could then hold the lock at the same time.

    Raises:
        IdentityEditError: when the lock cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        while not lock.is_locked:
            stop_if_interrupted()
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=_LOCK_SECONDS)
    except OSError as error:
        raise IdentityEditError(
            f"The encoded pairs cannot be written to {path} ({error.strerror or error}); make its folder writable."
        ) from error
    try:
        yield
    finally:
        lock.release()


def read_image(path: Path) -> torch.Tensor:
    """Read an image file [H, W, 3] float32, 0 to 1, center-cropped like VAE Encode.

    Raises:
        IdentityEditError: when the file is missing or damaged.
    """
    image = open_image(path, str(path), "generate its pair again, or remove it from the index")
    return middle(from_pillow(image.convert("RGB"))[None])[0]


def _write(
    pairs: Sequence[PairFiles],
    size: tuple[int, int],
    vae: Any,
    clip_vision: Any,
    path: str,
    layout: np.dtype,
    progress: Callable[[int, int], None] | None,
) -> None:
    partial = f"{path}.part"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(partial, "ab") as file:
            done = file.tell() // layout.itemsize  # complete records; a killed process may have written a partial one
            file.truncate(done * layout.itemsize)
            for start in range(done, len(pairs), _AT_ONCE):
                some = pairs[start : start + _AT_ONCE]
                records = np.zeros(len(some), dtype=layout)
                sources = torch.stack([_read(pair.source, size, pair.mirrored) for pair in some])
                targets = torch.stack([_read(pair.target, size, pair.mirrored) for pair in some])
                records["source"] = _encode(vae, sources).numpy()
                records["target"] = _encode(vae, targets).numpy()
                records["tokens"] = vision_tokens(clip_vision, sources).numpy()
                file.write(records.tobytes())
                file.flush()
                if progress is not None:
                    progress(start + len(some), len(pairs))
        os.replace(partial, path)
    except OSError as error:
        raise IdentityEditError(
            f"The encoded pairs cannot be written to {partial} ({error.strerror or error}); free disk space and queue "
            f"again to resume."
        ) from error


def _read(path: Path, size: tuple[int, int], mirrored: bool) -> torch.Tensor:
    image = read_image(path)
    if tuple(image.shape[:2]) != size:
        raise IdentityEditError(
            f"The image {path} is {image.shape[1]}x{image.shape[0]} and others are {size[1]}x{size[0]}; train on "
            f"pairs of one size."
        )
    return image.flip(1) if mirrored else image


def _encode(vae: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return encoded(vae, images, "The image of a pair")


def _fingerprint(pairs: Sequence[PairFiles], size: tuple[int, int], vae: Any, vision: VisionTag) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for path in (pair.source, pair.target):
            try:
                status = path.stat()
            except OSError as error:
                raise IdentityEditError(
                    f"The image {path} is missing; generate its pair again, or remove it from the index."
                ) from error
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns} ".encode())
        digest.update(f"{pair.source_prompt}\0{pair.target_prompt}\0{'mirrored' * pair.mirrored}".encode())
    state = vae.get_sd()
    vae_tag = [[name, state[name].flatten()[:2].float().tolist()] for name in sorted(state)[:64]]
    return run_hash({"pairs": digest.hexdigest(), "size": size, "vae": vae_tag, "vision": dataclasses.asdict(vision)})
