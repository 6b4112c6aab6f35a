"""Mixing, averaging and files of W+ codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from identity_edit_pack.pipelines.pidiff import w_plus
from identity_edit_pack.pipelines.pidiff.w_plus import WPlus
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from safetensors.torch import save_file


def styles(images: int = 1, seed: int = 0, encoder: str = "e4e", rows: int = 18) -> WPlus:
    draw = torch.Generator().manual_seed(seed)
    average = torch.randn(rows, 8, generator=torch.Generator().manual_seed(99))
    return WPlus(torch.randn(images, rows, 8, generator=draw), average, encoder)


def test_rows_as_the_paper_counts_them() -> None:
    assert w_plus.parse_rows("1-9, 12", 18) == (*range(9), 11)
    assert w_plus.parse_rows(" 10 - 18 ", 18) == tuple(range(9, 18))
    assert w_plus.parse_rows("3,3,2-3", 4) == (1, 2)
    assert w_plus.parse_rows("10\N{EN DASH}18", 18) == tuple(range(9, 18))
    assert w_plus.parse_rows("1-2\uff0c4\u3001", 5) == (0, 1, 3)
    assert w_plus.parse_rows("All", 5) == (0, 1, 2, 3, 4)
    coarse, fine = (w_plus.parse_rows(rows, 18) for rows in ("1-9", w_plus.FINE_ROWS))
    assert sorted(coarse + fine) == list(range(18))


@pytest.mark.parametrize("text", ["", " , ", "0-3", "17-19", "9-1", "1-2-3", "-3", "a", "1.5"])
def test_rows_that_there_are_not(text: str) -> None:
    with pytest.raises(IdentityEditError, match="rows"):
        w_plus.parse_rows(text, 18)


def test_mixing_takes_whole_rows() -> None:
    first, second = styles(seed=0), styles(seed=1)
    before = first.rows.clone()
    mixed = w_plus.mix_styles(first, second, w_plus.parse_rows("10-18", 18))
    assert torch.equal(mixed.rows[:, :9], first.rows[:, :9]) and torch.equal(mixed.rows[:, 9:], second.rows[:, 9:])
    assert torch.equal(first.rows, before) and mixed.encoder == "e4e"
    half = w_plus.mix_styles(first, second, (2,), weight=0.25)
    torch.testing.assert_close(half.rows[:, 2], 0.75 * first.rows[:, 2] + 0.25 * second.rows[:, 2])
    assert torch.equal(half.rows[:, 3:], first.rows[:, 3:])
    assert torch.equal(w_plus.mix_styles(first, second, (2,), weight=0.0).rows, first.rows)


def test_mixing_one_with_many() -> None:
    one, many = styles(1), styles(3, seed=5)
    assert torch.equal(w_plus.mix_styles(one, many, (0,)).rows[:, 0], many.rows[:, 0])
    assert torch.equal(w_plus.mix_styles(many, one, (0,)).rows[:, 0], one.rows[:, 0].expand(3, -1))
    with pytest.raises(IdentityEditError, match="2 entries for a batch of 3"):
        w_plus.mix_styles(styles(2), many, (0,))


@pytest.mark.parametrize("other", [styles(encoder="another"), styles(rows=16)])
def test_different_encoders_do_not_mix(other: WPlus) -> None:
    with pytest.raises(IdentityEditError, match="same encoder"):
        w_plus.mix_styles(styles(), other, (0,))
    with pytest.raises(IdentityEditError, match="W\\+ input 2 .* same encoder"):
        w_plus.average_styles([styles(), other])


def test_the_average_counts_every_image_alike() -> None:
    parts = [styles(1, seed=1), styles(3, seed=2)]
    mean = w_plus.average_styles(parts)
    torch.testing.assert_close(mean.rows[0], torch.cat([part.rows for part in parts]).mean(dim=0))
    assert torch.equal(w_plus.average_styles(parts[:1]).rows, parts[0].rows)
    with pytest.raises(IdentityEditError, match="no W\\+ codes"):
        w_plus.average_styles([])


def test_files_keep_every_bit(tmp_path: Path) -> None:
    path = str(tmp_path / "folder" / "person.safetensors")
    saved = styles(2)
    w_plus.save_w_plus(saved, path)
    loaded = w_plus.load_w_plus(path)
    assert torch.equal(loaded.rows, saved.rows) and torch.equal(loaded.average, saved.average)
    assert loaded.encoder == saved.encoder


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "other.safetensors")
    save_file({"rows": torch.zeros(1)}, path)
    with pytest.raises(IdentityEditError, match="contains no entry of W"):
        w_plus.load_w_plus(path)
    with pytest.raises(IdentityEditError, match="does not exist"):
        w_plus.load_w_plus(str(tmp_path / "none.safetensors"))


def test_styles_must_be_styles() -> None:
    with pytest.raises(IdentityEditError, match="rows"):
        WPlus(torch.zeros(18, 8), torch.zeros(18, 8), "e4e")
    with pytest.raises(IdentityEditError, match="latent average"):
        WPlus(torch.zeros(1, 18, 8), torch.zeros(16, 8), "e4e")
    with pytest.raises(IdentityEditError, match="NaN"):
        WPlus(torch.full((1, 18, 8), float("nan")), torch.zeros(18, 8), "e4e")
