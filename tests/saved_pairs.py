"""Pairs of a dataset as they stand on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from identity_edit_pack.pipelines.mcdm.pair_folder import SOURCE, TARGET, read_pair
from identity_edit_pack.pipelines.shared.images import read_image


def load_pair(folder: Path) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Source and target [H, W, 3] in [0, 1] and the description of the pair in a folder; see `read_pair`."""
    facts = read_pair(folder)
    source, target = (read_image(folder / name, str(folder / name))[0] for name in (SOURCE, TARGET))
    return source, target, facts
