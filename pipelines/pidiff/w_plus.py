"""W+ codes, which describe the person in an image from coarse to fine.

A W+ encoder (e4e: Tov et al. 2021) encodes an image as N rows; the first determine the pose and the shape of the face,
the last the colors. PIDiff (section 2.2.2) conditions a diffusion model on them and mixes people: rows 1-9 of one
person with rows 10-18 of another. As there, rows are counted from 1.

The file format is safetensors: `rows` [B, N, C] and `average` [N, C] in float32, and in the header's
`identity_edit` the kind and the encoder's name and fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..shared.errors import IdentityEditError, check_batch_matches
from ..shared.files import parsing_file, read_tensors, write_tensors
from ..shared.parsing import as_range, split_parts

KIND = "entry of W+ styles"
FINE_ROWS = "10-18"


@dataclass(frozen=True)
class WPlus:
    """The W+ codes of one or more images.

    Attributes:
        rows: [B, N, C] float32 CPU, absolute styles: `average` is already added. N is 18 and C 512 for e4e; other
            encoders have others.
        average: [N, C] float32 CPU, the encoder's latent average (`latent_avg`).
        encoder: name and fingerprint of the encoder that made them; rows of different encoders mean different things.
    """

    rows: torch.Tensor
    average: torch.Tensor
    encoder: str

    def __post_init__(self) -> None:
        if self.rows.ndim != 3 or min(self.rows.shape) < 1:
            raise IdentityEditError(
                f"W+ codes need the shape [images, rows, channels], not {tuple(self.rows.shape)}; encode an image."
            )
        if tuple(self.average.shape) != tuple(self.rows.shape[1:]):
            raise IdentityEditError(
                f"The latent average {tuple(self.average.shape)} does not match W+ codes {tuple(self.rows.shape)}; "
                f"take both from the same encoder."
            )
        check_finite_styles(self.rows, "The W+ codes")
        check_finite_styles(self.average, "The latent average")

    @property
    def count(self) -> int:
        """N, the number of rows of a W+ code."""
        return int(self.rows.shape[1])

    @property
    def width(self) -> int:
        """C, the width of a row."""
        return int(self.rows.shape[2])


def check_finite_styles(styles: torch.Tensor, name: str) -> None:
    """Raise `IdentityEditError` when styles hold NaN or infinite values."""
    if not bool(torch.isfinite(styles).all()):
        raise IdentityEditError(
            f"{name} contain NaN or infinite values; encode the image again, and choose another encoder file if that "
            f"does not help."
        )


def check_same_encoder(first: WPlus, other: WPlus, name: str) -> None:
    """Raise `IdentityEditError` unless `other`, called `name`, comes from the encoder of `first`."""
    if first.rows.shape[1:] != other.rows.shape[1:] or first.encoder != other.encoder:
        raise IdentityEditError(
            f"{name} comes from the encoder {other.encoder} ({other.count} rows of {other.width}), and the first "
            f"styles from {first.encoder} ({first.count} rows of {first.width}); encode both with the same encoder."
        )


def parse_rows(text: str, count: int) -> tuple[int, ...]:
    """Parse row numbers such as "1-9, 12".

    Args:
        text: numbers and ranges, separated by commas; counted from 1, ranges include their ends; "all" means all rows.
        count: N, the number of rows.

    Returns:
        positions from 0, ascending, each once.

    Raises:
        IdentityEditError: when a part is not a number or range, or there is no such row.
    """
    if text.strip().lower() == "all":
        return tuple(range(count))
    found: set[int] = set()
    for part in split_parts(text):
        ends = as_range(part)
        if ends is None:
            raise IdentityEditError(f"rows has '{part}'; write numbers and ranges, such as '1-9, 12'.")
        first, last = ends
        if not 1 <= first <= last <= count:
            raise IdentityEditError(
                f"rows has '{part}', but the W+ codes have rows 1 to {count}; write ranges in ascending order "
                f"within them."
            )
        found |= set(range(first - 1, last))
    if not found:
        raise IdentityEditError("rows is empty; write which rows to take, such as '10-18', or 'all'.")
    return tuple(sorted(found))


def mix_styles(first: WPlus, second: WPlus, rows: Sequence[int], weight: float = 1.0) -> WPlus:
    """Take rows of another image (PIDiff, sections 2.2.2 and 3.4.1), or interpolate to them.

    w_i = (1 - weight) * w1_i + weight * w2_i for the chosen rows i, and w1_i for all others.

    Args:
        first: styles of B images, or of one for all.
        second: styles of as many, or of one for all, from the same encoder.
        rows: positions from 0; see `parse_rows`.
        weight: 0 keeps `first`, 1 takes the rows from `second`; beyond these it extrapolates.

    Returns:
        styles of max(B1, B2) images.

    Raises:
        IdentityEditError: when they come from different encoders, or are of different numbers of images.
    """
    check_same_encoder(first, second, "The second W+ input")
    images = max(first.rows.shape[0], second.rows.shape[0])
    check_batch_matches(first.rows.shape[0], images, "first", "faces")
    check_batch_matches(second.rows.shape[0], images, "second", "faces")
    mixed = first.rows.expand(images, -1, -1).clone()
    other = second.rows.expand(images, -1, -1)
    chosen = list(rows)
    # At 1 these are the other's rows bit for bit, and at 0 nothing changes.
    mixed[:, chosen] = other[:, chosen] if weight == 1.0 else torch.lerp(mixed[:, chosen], other[:, chosen], weight)
    return WPlus(mixed, first.average.clone(), first.encoder)


def average_styles(styles: Sequence[WPlus]) -> WPlus:
    """The mean W+ code of several images of a person.

    Args:
        styles: each of one or more images, all from one encoder; every image counts alike.

    Returns:
        styles [1, N, C].

    Raises:
        IdentityEditError: when there are none, or they come from different encoders.
    """
    if not styles:
        raise IdentityEditError("There are no W+ codes to average; connect at least one face.")
    for number, other in enumerate(styles[1:], start=2):
        check_same_encoder(styles[0], other, f"W+ input {number}")
    rows = torch.cat([each.rows for each in styles])
    mean = rows.double().mean(dim=0, keepdim=True).float()
    return WPlus(mean, styles[0].average.clone(), styles[0].encoder)


def save_w_plus(styles: WPlus, path: str) -> None:
    """Write W+ codes atomically; see the top of this file for the format.

    Raises:
        IdentityEditError: when the file cannot be written.
    """
    write_tensors(path, {"rows": styles.rows, "average": styles.average}, {"kind": KIND, "encoder": styles.encoder})


def load_w_plus(path: str) -> WPlus:
    """Read a file of `save_w_plus`.

    Raises:
        IdentityEditError: when the file is missing, damaged, or holds something else.
    """
    tensors, description = read_tensors(path, KIND)
    with parsing_file(path, "The file of W+ codes", "encode and save them again"):
        return WPlus(tensors["rows"].float(), tensors["average"].float(), str(description["encoder"]))
