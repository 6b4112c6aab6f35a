"""Files that somebody made to do harm, or that are only broken, through the nodes that read them.

Nothing in a file is executed, nothing outside of its folder is read, no more memory is taken than it holds, and what
the user sees is one sentence.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import signal
import struct
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from identity_edit_pack.pipelines.faces import detection as faces
from identity_edit_pack.pipelines.mcdm.encoded_pairs import encode_pairs, pairs_in_folder, read_image
from identity_edit_pack.pipelines.mcdm.pair_folder import PairFolder
from identity_edit_pack.pipelines.networks import model_folders
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects.images import NO_CAPTIONS_YET, load_subject_folder
from identity_edit_pack.tests.nodes.good_inputs import CLASSES, SIDE, World, good, world_in
from identity_edit_pack.tests.nodes.test_bad_inputs import complaint_about_message
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = pytest.mark.fuzz

SECONDS = 60
"""A file that keeps a loader busy for longer hangs it."""
BYTES = 2 * 2**30
"""What a loader may take beside what the process has; the files here hold some kilobytes."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        yield world_in(tmp_path_factory.mktemp("comfyui"), patch)


@pytest.fixture
def bounded(world: World) -> Iterator[None]:
    """Time and memory end where no honest file of this size needs them."""
    resource = pytest.importorskip("resource", reason="Windows has no limits of a process")
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()

    def stop(*_: Any) -> None:
        raise TimeoutError(f"busy for more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


LOADERS = {
    "LoadInversion": (".safetensors",),
    "LoadIdentityPrior": (".safetensors",),
    "SaveIdentityPriorAsLoRA": (".safetensors",),
    "StepWiseEmbeddingLoader": (".safetensors", ".pt", ".bin"),
    "LoadIdentityWords": (".safetensors",),
    "MCDMConditioner": (".safetensors",),
    "LoadWPlusEncoder": (".safetensors", ".pt", ".pth"),
    "LoadWPlus": (".safetensors",),
    "LoadStyleAttention": (".safetensors", ".pt", ".pth", ".bin"),
}
"""Nodes that read a file, and the endings that they accept."""
MODEL_FOLDERS = {
    "StepWiseEmbeddingLoader": "embeddings", "MCDMConditioner": "checkpoints", "LoadWPlusEncoder": "w_plus_encoders",
    "LoadStyleAttention": "style_attention",
}  # fmt: skip
"""Where files of other endings are; all others are in the input folder."""
CASES = [(name, ending) for name, endings in LOADERS.items() for ending in endings]


def load(world: World, name: str, content: bytes, ending: str = ".safetensors") -> tuple[Any, ...] | None:
    """What a node gives for a file of this content, or None where it refuses it in a sentence."""
    folder = MODEL_FOLDERS.get(name)
    root = Path(folder_paths.get_folder_paths(folder)[0] if folder else folder_paths.get_input_directory())
    path = root / f"given{ending}"
    path.write_bytes(content)
    folder_paths.filename_list_cache.clear()
    mark = f" [{folder}]" if folder in ("embeddings", "style_attention") else ""
    inputs = {**good(world, name), "file": f"{path.name}{mark}"}
    try:
        with torch.inference_mode():
            return CLASSES[name].execute(**inputs).args
    except IdentityEditError as error:
        assert complaint_about_message(str(error)) is None
        return None
    finally:
        path.unlink()


def good_file(world: World, name: str) -> Path:
    """The file that a node's good inputs name."""
    file = good(world, name)["file"]
    if name == "LoadWPlusEncoder":
        return Path(world.model_file("w_plus_encoders", file))
    if name == "MCDMConditioner":
        return Path(folder_paths.get_output_directory(), "checkpoints", file.split(" [")[0])
    return Path(folder_paths.get_annotated_filepath(file))


# -- code in files -----------------------------------------------------------------------------------------------------


class Code:
    """Runs a command where it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def archive(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def payloads(canary: Path) -> dict[str, bytes]:
    """Pickles that write the file `canary` when they are executed."""
    command = Code(os.system, f"touch {canary}")
    text = f"open({str(canary)!r}, 'w').close()"
    evaluated, executed = Code(eval, text), Code(exec, text)
    tensors = {"a": torch.zeros(2)}
    return {
        "plain": pickle.dumps(command),
        "protocol 0": pickle.dumps(command, protocol=0),
        "archive": archive(command),
        "evaluated": archive({"state_dict": evaluated, "latent_avg": torch.zeros(18, 512)}),
        "executed": archive({"string_to_param": {"*": executed}}),
        "beside tensors": archive({**tensors, "opts": command}),
        "in a namespace": archive({"state_dict": tensors, "opts": Namespace(start=command)}),
        "old form": _old_form({"a": command}),
        "deep": archive([command] * 3 + [{"w_proj": {"x": command}, "wplus_adapter": {}}]),
    }


def _old_form(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def test_the_payloads_are_dangerous(tmp_path: Path) -> None:
    """Or the next test would show nothing."""
    for number, (name, content) in enumerate(payloads(tmp_path / "canary").items()):
        canary = tmp_path / f"canary{number}"
        content = payloads(canary)[name]
        torch.load(io.BytesIO(content), weights_only=False) if name not in ("plain", "protocol 0") else pickle.loads(
            content
        )
        assert canary.exists(), name


@pytest.mark.parametrize(("name", "ending"), CASES)
def test_no_code_is_executed(name: str, ending: str, world: World, tmp_path: Path, bounded: None) -> None:
    canary = tmp_path / "canary"
    for payload, content in payloads(canary).items():
        assert load(world, name, content, ending) is None, payload
        assert not canary.exists(), f"{payload} was executed"


def test_checkpoints_of_other_networks_execute_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for content in payloads(canary).values():
        for ending in (".pt", ".pth", ".safetensors"):
            path = tmp_path / f"given{ending}"
            path.write_bytes(content)
            with pytest.raises(IdentityEditError) as error:
                model_folders.read_checkpoint(str(path))
            assert complaint_about_message(str(error.value)) is None
        onnx = tmp_path / "given.onnx"
        onnx.write_bytes(content)
        with pytest.raises(IdentityEditError):
            faces.open_detector(str(onnx))
    assert not canary.exists()


# -- broken safetensors ------------------------------------------------------------------------------------------------


def safetensors_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@functools.cache
def broken_headers() -> dict[str, bytes]:
    eight = b"\0" * 8

    def tensors(data: bytes = eight, **entries: Any) -> bytes:
        return safetensors_file(json.dumps(entries).encode(), data)

    return {
        "empty": b"",
        "seven bytes": b"\0" * 7,
        "no header": b"\0" * 8,
        "random": bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)),
        "longer than the file": safetensors_file(b"{}", length=10_000),
        "longest": safetensors_file(b"{}", length=2**64 - 1),
        "a hundred megabytes": safetensors_file(b"{}", length=99_999_999),
        "no JSON": safetensors_file(b"not JSON"),
        "cut JSON": safetensors_file(b'{"a": {"dtype"'),
        "not UTF-8": safetensors_file(b'{"\xff\xfe": 1}'),
        "a list": safetensors_file(b"[1, 2]"),
        "deep": safetensors_file(b"[" * 100_000 + b"]" * 100_000),
        "overlapping": tensors(a=entry(), b=entry(offsets=(4, 12)), data=b"\0" * 12),
        "beyond the file": tensors(a=entry(shape=(1000,), offsets=(0, 4000))),
        "a hole": tensors(a=entry(shape=(1,), offsets=(4, 8))),
        "backwards": tensors(a=entry(offsets=(8, 0))),
        "below zero": tensors(a=entry(offsets=(-8, 0))),
        "unknown dtype": tensors(a=entry(dtype="F31")),
        "dtype of another kind": tensors(a=entry(dtype=7)),
        "shape of another size": tensors(a=entry(shape=(3,))),
        "shape that overflows": tensors(a=entry(shape=(2**62, 4), offsets=(0, 0)), data=b""),
        "shape below zero": tensors(a=entry(shape=(-1,))),
        "metadata of numbers": tensors(__metadata__={"identity_edit": 1}, a=entry()),
        "metadata of lists": tensors(__metadata__=["x"], a=entry()),
        "a zip": _zip(),
    }


def _zip() -> bytes:
    """That unpacks to a gigabyte of zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file, file.open("archive/data.pkl", "w") as member:
        for _ in range(64):
            member.write(b"\0" * 2**20)
    return buffer.getvalue()


@pytest.mark.parametrize(("name", "ending"), CASES)
def test_broken_files_are_refused(name: str, ending: str, world: World, bounded: None) -> None:
    for broken, content in broken_headers().items():
        assert load(world, name, content, ending) is None, broken


# -- files that lie about what they hold -------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "nothing": None, "true": True, "below zero": -1, "huge": 10**12, "a large float": 1e308, "infinite": float("inf"),
    "nan": float("nan"), "text": "x", "long text": "x" * 10_000, "a path": "../../x", "a list": [],
    "numbers": [10**9] * 2,
    "an object": {}, "an object in an object": {"a": {"b": 1}}, "texts": ["a", "b"], "half a character": "\ud83d",
}  # fmt: skip


def description_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and description of a file, without a UNet's weights beside them, which only ComfyUI's own nodes read."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in list(file.keys()) if not name.startswith("model.diffusion_model.")]
        return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["identity_edit"])


def content_of(tensors: dict[str, torch.Tensor], description: str, path: Path) -> bytes:
    save_file(tensors, path, metadata={"identity_edit": description})
    return path.read_bytes()


READ = {"steps", "learning_rate", "images", "identity_images", "regularization_images", "prompts", "pairs"}
"""What reports read of a training; the rest of it is only kept."""


def places(description: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in description.items():
        yield (key,)
        if isinstance(value, dict) and key != "conventions":
            yield from ((key, inner) for inner in value if key != "training" or inner in READ)


def replaced(description: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = place
    return {**description, first: replaced(description[first], tuple(rest), value) if rest else value}


@pytest.mark.parametrize("name", [name for name in LOADERS if name != "SaveIdentityPriorAsLoRA"])
def test_a_description_may_hold_anything(name: str, world: World, tmp_path: Path, bounded: None) -> None:
    """Every entry of it with every kind of value: read, or refused in a sentence; and no memory is taken for it."""
    tensors, description = description_of(good_file(world, name))
    faults = []
    for place in places(description):
        for kind, value in VALUES.items():
            text = json.dumps(replaced(description, place, value))
            try:
                load(world, name, content_of(tensors, text, tmp_path / "x"))
            except Exception as error:
                faults.append(f"{'.'.join(place)} is {kind}: {type(error).__name__}: {str(error)[:150]}")
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("name", LOADERS)
def test_a_description_that_is_no_description(name: str, world: World, tmp_path: Path, bounded: None) -> None:
    tensors, description = description_of(good_file(world, name))
    kind = json.dumps(description)[1:-1]
    for wrong in (
        "", "{", "null", "7", "[]", '"text"', "[" * 100_000, '{"a": ' * 50_000, "9" * 10_000, "NaN",
        f'{{{kind}, "steps": {"9" * 5000}}}',
    ):  # fmt: skip
        assert load(world, name, content_of(tensors, wrong, tmp_path / "x")) is None, wrong[:40]


@pytest.mark.parametrize("name", [name for name in LOADERS if name != "SaveIdentityPriorAsLoRA"])
def test_tensors_may_be_of_any_form(name: str, world: World, tmp_path: Path, bounded: None) -> None:
    tensors, description = description_of(good_file(world, name))
    text = json.dumps(description)
    faults = []
    for key in list(tensors)[:6]:
        good_one = tensors[key]
        for kind, value in {
            "missing": None,
            "of no dimension": torch.tensor(1.0),
            "empty": torch.zeros(0),
            "of another shape": torch.zeros(3, 5),
            "of seven dimensions": torch.zeros(1, 1, 1, 1, 1, 1, 2),
            "int": good_one.long(),
            "bool": good_one > 0,
            "float64": good_one.double(),
            "nan": torch.full_like(good_one.float(), float("nan")),
        }.items():
            changed = {name: each for name, each in tensors.items() if name != key}
            if value is not None:
                changed[key] = value
            try:
                load(world, name, content_of(changed, text, tmp_path / "x"))
            except Exception as error:
                faults.append(f"{key} {kind}: {type(error).__name__}: {str(error)[:150]}")
    assert not faults, "\n" + "\n".join(faults)


def test_an_encoder_cannot_claim_a_billion_rows(world: World, bounded: None) -> None:
    tensors = {"input_layer.0.weight": torch.zeros(2), "styles.999999999.linear.weight": torch.zeros(2)}
    for content in (archive({"state_dict": tensors, "latent_avg": torch.zeros(512)}), archive({"state_dict": 7})):
        assert load(world, "LoadWPlusEncoder", content, ".pt") is None


# -- images and captions ---------------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes = b"", bits: int = 8, color: int = 2) -> bytes:
    """A PNG that claims any size; color 2 is red, green and blue, and 0 is gray."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def a_image(width: int = SIDE, height: int = SIDE) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


REFUSED_IMAGES = {
    "empty": b"",
    "text": b"this is no image",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "truncated": saved(a_image(), "PNG")[:-2000],
    "half a JPEG": saved(a_image(), "JPEG")[:700],
    "a bomb": png(60_000, 60_000),
    "a smaller bomb": png(13_000, 13_000, b"\0" * (13_000 * (1 + 13_000 // 8)), bits=1, color=0),
    "the largest": png(2**31 - 1, 2**31 - 1),
    "no pixels": png(0, 0),
    "no data": png(64, 64),
    "a text that unpacks to a gigabyte": b"",
}
TEXT_BOMB = zlib.compress(b"\0" * 2**27)
_chunk = b"zTXtx\0\0" + TEXT_BOMB
REFUSED_IMAGES["a text that unpacks to a gigabyte"] = (
    png(8, 8)[:33]
    + struct.pack(">I", len(_chunk) - 4)
    + _chunk
    + struct.pack(">I", zlib.crc32(_chunk))
    + png(8, 8)[33:]
)


def folder_of(path: Path, content: bytes, name: str = "1.png") -> Path:
    path.mkdir()
    (path / name).write_bytes(content)
    (path / "1.txt").write_text("a sks cat")
    return path


@pytest.mark.parametrize("kind", REFUSED_IMAGES)
def test_images_that_are_none(kind: str, tmp_path: Path, bounded: None) -> None:
    folder = folder_of(tmp_path / "cat", REFUSED_IMAGES[kind])
    with pytest.raises(IdentityEditError, match=r"1\.png") as error:
        load_subject_folder(str(folder), "cat")
    assert complaint_about_message(str(error.value)) is None
    with pytest.raises(IdentityEditError, match=r"1\.png"):
        read_image(folder / "1.png")


def test_images_of_every_kind_are_read(tmp_path: Path) -> None:
    """Each is the image it was, within what its format loses."""
    image = a_image(48, 32)
    shown = np.asarray(image, dtype=np.float64) / 255.0
    turned = image.getexif()
    turned[0x0112] = 6  # to be turned to the right
    smooth = Image.fromarray(np.tile(np.linspace(0, 255, 48).astype(np.uint8)[None, :, None], (32, 1, 3)))
    gray = np.asarray(smooth, dtype=np.float64)[..., 0]
    two_tones = smooth.convert("1")
    cases: dict[str, tuple[bytes, np.ndarray, float]] = {
        "animated GIF": (
            saved(smooth.convert("L"), "GIF", save_all=True, append_images=[image.convert("L")]),
            np.asarray(smooth) / 255.0, 0.01,
        ),
        "CMYK JPEG": (saved(smooth.convert("CMYK"), "JPEG", quality=100), np.asarray(smooth) / 255.0, 0.03),
        "turned": (saved(image, "PNG", exif=turned), np.rot90(shown, -1), 0.0),
        "16 bits": (saved(Image.fromarray((gray * 257).astype(np.uint16)), "PNG"), np.asarray(smooth) / 255.0, 0.01),
        "WebP named PNG": (saved(image, "WEBP", lossless=True), shown, 0.0),
        "black and white": (saved(two_tones, "PNG"), np.asarray(two_tones.convert("RGB")) / 255.0, 0.0),
    }  # fmt: skip
    for number, (kind, (content, wanted, most)) in enumerate(cases.items()):
        found = load_subject_folder(str(folder_of(tmp_path / str(number), content)), "cat").images[0]
        assert found.shape == wanted.shape, kind
        assert float(np.abs(found.numpy() - wanted).max()) <= most + 1e-6, kind


def test_a_palette_with_transparency_is_a_mask(tmp_path: Path) -> None:
    image = a_image().quantize(8)
    opaque = np.asarray(image) != 3
    content = saved(image, "PNG", transparency=3)
    subject = load_subject_folder(str(folder_of(tmp_path / "cat", content)), "cat")
    assert subject.masks[0] is not None and np.array_equal(subject.masks[0].numpy(), opaque)
    assert bool((subject.images[0].numpy()[~opaque] == 1.0).all()), "it is not laid on white"


@pytest.mark.parametrize(
    "caption", [b"\xff\xfe\x00a\x00", bytes(range(256)) * 10, b"a sks\0 cat", b"a sks cat " * 10**6, b"\x80\x04K\x01."]
)
def test_captions_that_are_no_text(caption: bytes, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "cat", saved(a_image(), "PNG"))
    for name in ("1.txt", "class_word.txt"):
        (folder / "1.txt").write_text("a sks cat")
        (folder / name).write_bytes(caption)
        with pytest.raises(IdentityEditError, match=name.replace(".", r"\.")) as error:
            load_subject_folder(str(folder), "" if name == "class_word.txt" else "cat")
        assert complaint_about_message(str(error.value)) is None
        (folder / name).unlink()


@pytest.mark.parametrize("name", ["1.png", "1.txt", "1.mask.png", "class_word.txt"])
def test_links_out_of_a_folder_are_not_followed(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"sks cat" if name.endswith(".txt") else saved(a_image(), "PNG"))
    folder = folder_of(tmp_path / "cat", saved(a_image(), "PNG"))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(IdentityEditError, match="is a link to a file outside of its folder"):
        load_subject_folder(str(folder), "" if name == "class_word.txt" else "cat")
    (tmp_path / "linked").symlink_to(folder, target_is_directory=True)
    (folder / name).unlink()
    if name == "1.mask.png":  # a folder may be a link itself
        assert len(load_subject_folder(str(tmp_path / "linked"), "cat").images) == 1


def test_files_in_the_place_of_folders_and_folders_in_that_of_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(IdentityEditError, match="does not exist"):
        load_subject_folder(str(tmp_path / "file"), "cat")
    folder = folder_of(tmp_path / "cat", saved(a_image(), "PNG"))
    (folder / "2.png").mkdir()
    (folder / "1.txt").unlink()
    (folder / "1.txt").mkdir()
    assert len(load_subject_folder(str(folder), "cat", captions=NO_CAPTIONS_YET).images) == 1


# -- folders of pairs --------------------------------------------------------------------------------------------------


def index_line(**changes: Any) -> str:
    line = {"source": "pairs/0/source.png", "target": "pairs/0/target.png", "source_prompt": "a", "target_prompt": "b"}
    return json.dumps({**line, **changes})


@pytest.mark.parametrize(
    "line",
    [
        index_line(source="../../secret.png"), index_line(target="/etc/passwd"), index_line(source=7),
        index_line(source="link/secret.png"), index_line(source_prompt=["a"]), index_line(target_prompt=None),
        index_line(source="a\0b.png"), "[" * 100_000, "9" * 10_000, "null", "{}", "x",
    ],
)  # fmt: skip
def test_an_index_leads_nowhere_else(line: str, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(saved(a_image(), "PNG"))
    (folder / "link").symlink_to(tmp_path, target_is_directory=True)
    (folder / "index.jsonl").write_text(line)
    with pytest.raises(IdentityEditError, match="Line 1 of .* is invalid") as error:
        pairs_in_folder(folder)
    assert complaint_about_message(str(error.value)) is None


def test_an_index_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "index.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IdentityEditError, match=r"no readable index\.jsonl"):
        pairs_in_folder(tmp_path)
    (tmp_path / "index.jsonl").unlink()
    (tmp_path / "index.jsonl").mkdir()
    with pytest.raises(IdentityEditError, match=r"no readable index\.jsonl"):
        pairs_in_folder(tmp_path)


def test_a_bomb_in_a_pair_is_refused(world: World, tmp_path: Path, bounded: None) -> None:
    pair = tmp_path / "pairs" / "0"
    pair.mkdir(parents=True)
    for name in ("source.png", "target.png"):
        (pair / name).write_bytes(png(60_000, 60_000))
    (tmp_path / "index.jsonl").write_text(index_line())
    with pytest.raises(IdentityEditError, match="which is too large|cannot be read"):
        encode_pairs(pairs_in_folder(tmp_path)[0], world.vae, world.clip_vision, str(tmp_path / "encoded"))


DESCRIPTIONS = [b"", b"{", b"[]", b"7", b"[" * 100_000, b"9" * 10_000, b"\xff\xfe", b'{"files": 7}', b'{"files": {}}']


@pytest.mark.parametrize("content", DESCRIPTIONS)
def test_damaged_descriptions_of_pairs_are_set_aside(content: bytes, tmp_path: Path) -> None:
    folder = PairFolder(tmp_path / "pairs")
    folder.add(0, torch.rand(8, 8, 3), torch.rand(8, 8, 3), {"edit": "costume"})
    folder.add(1, torch.rand(8, 8, 3), torch.rand(8, 8, 3), {"edit": "laughing"})
    files = [tmp_path / "pairs" / "pairs" / name / "pair.json" for name in ("000000", "000001")]
    odd = {**json.loads(files[0].read_text()), "edit": "\ud83d", "number": "x" * 5000, "split": ["a"]}
    files[0].write_text(json.dumps(odd))
    files[1].write_bytes(content)
    assert sorted(folder.finished()) == [0]
    assert folder.contact_sheet() is not None and folder.write_index() == 1
    (tmp_path / "pairs" / "dataset.json").write_bytes(content)
    with pytest.raises(IdentityEditError) as error:
        folder.claim({"seed": 1})
    assert complaint_about_message(str(error.value)) is None
