"""A folder of pairs: whole or absent, never lost and never doubled, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from identity_edit_pack.pipelines.mcdm.pair_folder import PairFolder
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from PIL import Image
from saved_pairs import load_pair


def image(seed: int, height: int = 24, width: int = 16) -> torch.Tensor:
    return (torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed)) * 255).round() / 255


def filled(path: Path, count: int = 3) -> PairFolder:
    folder = PairFolder(path)
    for number in range(count):
        facts = {"edit": "hat", "split": "train", "source_prompt": "a", "target_prompt": "b"}
        assert folder.add(number, image(number), image(100 + number), facts)
    return folder


def test_a_pair_is_read_as_it_was_written(tmp_path) -> None:
    folder = filled(tmp_path / "pairs")
    source, target, facts = load_pair(folder.path / "pairs" / "000001")
    assert torch.allclose(source, image(1), atol=1e-6) and torch.allclose(target, image(101), atol=1e-6)
    assert facts["edit"] == "hat" and facts["number"] == 1
    # Any other reader sees the same.
    assert Image.open(folder.path / "pairs" / "000001" / "target.png").size == (16, 24)


def test_the_index_has_one_line_for_each_pair_and_paths_that_exist(tmp_path) -> None:
    folder = filled(tmp_path)
    assert folder.write_index() == 3
    lines = [json.loads(line) for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1, 2]
    assert len({line["number"] for line in lines}) == 3
    for line in lines:
        facts = json.loads((tmp_path / f"pairs/{line['number']:06}/pair.json").read_text())
        assert (tmp_path / line["source"]).is_file() and (tmp_path / line["target"]).is_file()
        assert {key: line[key] for key in facts} == facts


def test_a_pair_that_is_there_is_not_written_again(tmp_path) -> None:
    folder = filled(tmp_path)
    before = (tmp_path / "pairs/000001/source.png").read_bytes()
    assert not folder.add(1, image(7), image(8), {})
    assert (tmp_path / "pairs/000001/source.png").read_bytes() == before
    # Two processes at once: the second finds the folder only when it renames.
    files = {file.name: file.read_bytes() for file in (tmp_path / "pairs/000001").iterdir()}
    assert not folder.adopt(1, files) and sorted(folder.finished()) == [0, 1, 2]


def test_a_full_disk_leaves_nothing_half_and_keeps_what_was_there(tmp_path, monkeypatch) -> None:
    folder = filled(tmp_path)
    written = []
    write = Path.write_bytes

    def full(self, data):
        written.append(self)
        if self.name == "target.png":
            write(self, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(IdentityEditError, match="No space left on device"):
        folder.add(3, image(3), image(4), {})
    monkeypatch.undo()
    assert len(written) >= 2
    assert sorted(os.listdir(tmp_path / "pairs")) == ["000000", "000001", "000002"]
    assert sorted(folder.finished()) == [0, 1, 2]
    assert folder.add(3, image(3), image(4), {})


def test_a_full_disk_keeps_the_index_of_before(tmp_path, monkeypatch) -> None:
    folder = filled(tmp_path)
    folder.write_index()
    before = (tmp_path / "index.jsonl").read_bytes()
    assert folder.add(3, image(3), image(4), {})

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(IdentityEditError, match="cannot be written"):
        folder.write_index()
    monkeypatch.undo()
    assert (tmp_path / "index.jsonl").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("fault", ["cut", "other image", "missing", "no description"])
def test_a_damaged_pair_is_set_aside_and_the_others_are_kept(tmp_path, fault) -> None:
    folder = filled(tmp_path)
    broken = tmp_path / "pairs" / "000001"
    if fault == "cut":
        (broken / "target.png").write_bytes((broken / "target.png").read_bytes()[:100])
    elif fault == "other image":
        (broken / "target.png").write_bytes((tmp_path / "pairs/000002/target.png").read_bytes())
    elif fault == "missing":
        (broken / "source.png").unlink()
    else:
        (broken / "pair.json").write_text("{")
    with pytest.raises(IdentityEditError):
        load_pair(broken)
    assert sorted(folder.finished()) == [0, 2]
    assert [path.name.split(".")[0] for path in (tmp_path / "damaged").iterdir()] == ["000001"]
    assert folder.add(1, image(1), image(101), {}) and sorted(folder.finished()) == [0, 1, 2]


def test_what_a_killed_process_left_is_no_pair(tmp_path) -> None:
    folder = filled(tmp_path)
    left = tmp_path / "pairs" / "000003.abcdef01.tmp"
    left.mkdir()
    (left / "source.png").write_bytes(b"half")
    assert sorted(folder.finished()) == [0, 1, 2] and left.exists(), "it may belong to a living process"
    os.utime(left, (0, 0))
    assert sorted(folder.finished()) == [0, 1, 2] and not left.exists()


def test_other_settings_are_refused_and_a_longer_dataset_is_not(tmp_path) -> None:
    folder = PairFolder(tmp_path)
    folder.claim({"count": 4, "seed": 1, "edits": ({"name": "hat"},)})
    folder.claim({"count": 9, "seed": 1, "edits": ({"name": "hat"},)})
    with pytest.raises(IdentityEditError, match="another seed"):
        folder.claim({"count": 9, "seed": 2, "edits": ({"name": "hat"},)})


def test_the_contact_sheet_shows_the_pairs(tmp_path) -> None:
    assert PairFolder(tmp_path / "empty").contact_sheet() is None
    folder = filled(tmp_path / "pairs", count=5)
    sheet = folder.contact_sheet(columns=2, height=24)
    assert sheet is not None and sheet.shape[0] == 1
    shown = Image.open(folder.path / "contact_sheet.jpg")
    assert shown.size == (sheet.shape[2], sheet.shape[1])
    assert torch.allclose(sheet[0, :24, :16], image(0), atol=1 / 255)
    assert torch.allclose(sheet[0, :24, 16:32], image(100), atol=1 / 255)


def test_a_folder_that_cannot_be_made_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityEditError, match="cannot be written to"):
        PairFolder(tmp_path / "file" / "pairs")
