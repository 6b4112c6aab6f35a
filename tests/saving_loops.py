"""Every kind of save in an endless loop, for the test that kills processes while they save.

`serve` runs in a process of its own that has loaded the pack: for each line "kind folder" it forks, and the child saves
one version after the other until it is killed. What a version is: every number of the file's large tensor.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
import tiny_vision
import torch
from identity_edit_pack.attention.style_cross_attention import SEQUENTIAL
from identity_edit_pack.demo_world.training import save_whole
from identity_edit_pack.pipelines.engine import edit_model
from identity_edit_pack.pipelines.engine.model import ModelTag
from identity_edit_pack.pipelines.hifi_tuner import subject_files
from identity_edit_pack.pipelines.hifi_tuner.subject_embedding import WORD, SubjectEmbedding
from identity_edit_pack.pipelines.inversion import inversion
from identity_edit_pack.pipelines.lipe import identity_prior
from identity_edit_pack.pipelines.mcdm import encoded_pairs, identity_words
from identity_edit_pack.pipelines.mcdm import model as mcdm
from identity_edit_pack.pipelines.mcdm.pair_dataset import save_pairs
from identity_edit_pack.pipelines.mcdm.pair_folder import INDEX, PairFolder
from identity_edit_pack.pipelines.pidiff import style_attention, style_attention_files, w_plus, w_plus_encoder
from identity_edit_pack.pipelines.subjects import images as subject_images
from identity_edit_pack.pipelines.training import loop as training
from safetensors.torch import load_file

NUMBERS = 1_000_000
"""In a large tensor: 4 MB, so that most of a child's time is spent in writing."""
TAG = ModelTag("SD1", "eps", "SD15", 14.6, "float32", (0.5, 0.25))
STEPS = 4


def large(version: int) -> torch.Tensor:
    return torch.full((NUMBERS,), float(version))


def version_of(tensor: torch.Tensor) -> int:
    """The version that fills a tensor; an assertion fails where two are mixed."""
    assert bool((tensor == tensor.flatten()[0]).all()), "the file is of two versions"
    return int(tensor.flatten()[0])


@dataclass(frozen=True)
class Kind:
    """One kind of save.

    Attributes:
        save: (folder, version) writes the version over what is there.
        read: (folder) -> the version that is there, or None for none; raises where it is half of one.
    """

    save: Callable[[Path, int], None]
    read: Callable[[Path], int | None]


def in_one_file(save: Callable[[str, int], None], read: Callable[[str], torch.Tensor], name: str = "file") -> Kind:
    """A kind that has one file of a fixed name."""

    def path(folder: Path) -> str:
        return str(folder / f"{name}.safetensors")

    def version(folder: Path) -> int | None:
        return version_of(read(path(folder))) if os.path.exists(path(folder)) else None

    return Kind(lambda folder, version: save(path(folder), version), version)


def save_inversion(path: str, version: int) -> None:
    trajectory = large(version).reshape(2, 1, 4, 250, 500)
    made = inversion.Inversion(
        trajectory, torch.tensor([1.0, 0.0]), inversion.DDIM, 1.0, TAG
    )  # fmt: skip
    inversion.save_inversion(made, path)


def save_w_plus(path: str, version: int) -> None:
    rows = large(version).reshape(100, 20, 500)
    w_plus.save_w_plus(w_plus.WPlus(rows, torch.zeros(20, 500), "encoder"), path)


class Network:
    """What Save W+ Encoder sees of an encoder."""

    architecture = "small"

    def __init__(self, version: int) -> None:
        self.version = version

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"large": large(self.version)}

    @staticmethod
    def config() -> dict[str, Any]:
        return {}


def save_w_plus_encoder(path: str, version: int) -> None:
    w_plus_encoder.save_w_plus_encoder(path, Network(version), torch.zeros(18, 16), "small")


def prior(version: int) -> identity_prior.IdentityPrior:
    return identity_prior.IdentityPrior({"weight": large(version)}, {}, "sks", "cat", TAG, {})


def save_lora(path: str, version: int) -> None:
    identity_prior.save_lora(prior(version), {"large": large(version)}, 4, 0.0, path)


def word(version: int) -> SubjectEmbedding:
    return SubjectEmbedding(WORD, {"clip_l": torch.full((64, 768), float(version))}, class_word="cat", model=TAG)


def save_identity_words(path: str, version: int) -> None:
    with torch.random.fork_rng(devices=[]):
        encoder = identity_words.IdentityEncoder(128, {"clip_l": 128}, 2)
    for parameter in encoder.parameters():
        parameter.data.fill_(float(version))
    identity_words.save_identity_words(
        identity_words.IdentityWords(encoder, 2, {"clip_l": 128}, (17, 128), "person", TAG), path
    )


def read_identity_words(path: str) -> torch.Tensor:
    encoder = identity_words.load_identity_words(path).encoder
    return torch.cat([parameter.flatten() for parameter in encoder.parameters()])


_edit_models: list[Any] = []


def save_mcdm(path: str, version: int) -> None:
    if not _edit_models:
        _edit_models.append(edit_model.as_edit_model(tiny_models.sd1()))
    vision = mcdm.VisionTag(17, 16, (0.5,))
    made = mcdm.MCDM(mcdm.ImageEmbedding(17, 16, (4, 8, 8), 32), vision, TAG, (4, 8, 8), {})
    mcdm.save_mcdm(made, path, _edit_models[0], None, None, {"diffusion_model.large": large(version)}, "float32")


def read_mcdm(path: str) -> torch.Tensor:
    mcdm.load_mcdm(path)
    (found,) = [tensor for name, tensor in load_file(path).items() if name.endswith("large")]
    return found


def save_style_attention(path: str, version: int) -> None:
    groups = ((1, 9), (10, 18))
    with torch.random.fork_rng(devices=[]):
        network = style_attention.StyleNetwork(groups, 64, 256, {("input", 1, 0): (64, 64, 256)})
    for parameter in network.parameters():
        parameter.data.fill_(float(version % 1000))  # saved as float16
    style = style_attention.StyleAttention(network, SEQUENTIAL, 18, 64, 256, "encoder", model=TAG)
    style_attention_files.save_style_attention(style, path)


def read_style_attention(path: str) -> torch.Tensor:
    network = style_attention_files.load_style_attention(path).network
    return torch.cat([parameter.flatten() for parameter in network.parameters()])


def train(folder: Path, version: int, steps: int = STEPS) -> training.TrainingRun:
    """A training with a checkpoint at every step; its result is -learning rate * steps in every number."""
    variables = {"large": torch.zeros(NUMBERS, requires_grad=True)}
    settings = training.TrainingSettings(
        steps=steps, learning_rate=1.0, optimizer="SGD", gradient_clip=0.0, checkpoint_every=1
    )
    run = training.train(
        variables,
        lambda index: [variables["large"].sum()],
        settings,
        checkpoint=lambda run: str(folder / "run.safetensors"),
    )
    assert version_of(variables["large"].detach()) == -steps
    if version:  # in the loop the next one begins anew
        os.remove(folder / "run.safetensors")
    return run


def read_training(folder: Path) -> int | None:
    """Going on from whatever is there must give the result of a run that nobody stopped."""
    return train(folder, 0).resumed_at


def add_pair(folder: Path, version: int) -> None:
    pairs = PairFolder(folder)
    image = torch.full((1, 160, 160, 3), version % 200 / 255)
    save_pairs(pairs, image, image, source_prompt=f"{version}", target_prompt="", edit="none")


def read_pairs(folder: Path) -> int | None:
    """Number of pairs: all are whole, and so is every line of the index."""
    pairs = PairFolder(folder)
    count = len(pairs.finished())
    assert not (folder / "damaged").exists(), "a pair was half written"
    if (folder / INDEX).exists():
        listed, _ = encoded_pairs.pairs_in_folder(folder)
        assert all(encoded_pairs.read_image(pair.source).shape == (160, 160, 3) for pair in listed)
    return count


PAIRS_OF = "images"


def pairs_to_encode(folder: Path) -> list[encoded_pairs.PairFiles]:
    """Twenty-four small pairs below the folder, made by whoever asks first."""
    from PIL import Image

    images = folder / PAIRS_OF
    pairs = []
    for number in range(24):
        path = images / f"{number}.png"
        if not path.exists():
            images.mkdir(exist_ok=True)
            Image.new("RGB", (64, 64), (number, 2 * number, 3 * number)).save(path)
        pairs.append(encoded_pairs.PairFiles(path, path, "a cat", "a smiling cat"))
    return pairs


def encode(folder: Path, version: int) -> None:
    encoded_pairs.remove_encoded(read_encoded(folder))


def read_encoded(folder: Path) -> encoded_pairs.EncodedPairs:
    return encoded_pairs.encode_pairs(
        pairs_to_encode(folder), tiny_vision.VAE(), tiny_vision.clip_vision(), str(folder / "encoded")
    )


def check_encoded(folder: Path) -> int:
    """Encoding goes on, and the records are those of an encoding that nobody stopped."""
    found = read_encoded(folder)
    whole = encoded_pairs.encode_pairs(
        pairs_to_encode(folder), tiny_vision.VAE(), tiny_vision.clip_vision(), str(folder / "whole")
    )
    assert found.records.tobytes() == whole.records.tobytes()
    return len(found)


def save_captions(folder: Path, version: int) -> None:
    subject = subject_images.SubjectImages(
        images=[torch.zeros(8, 8, 3)],
        captions=[f"a sks cat {version}, " + "lying on a sofa, " * 5_000],
        class_word="cat",
        token="sks",
        masks=[None],
        names=["cat.png"],
        folder=str(folder),
    )
    subject_images.save_captions(subject, overwrite=True)


def read_captions(folder: Path) -> int | None:
    path = folder / "cat.txt"
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    assert text.count("lying on a sofa, ") == 5_000, "the caption is half of one"
    return int(text.split(",")[0].split()[-1])


KINDS: dict[str, Kind] = {
    "inversion": in_one_file(save_inversion, lambda path: inversion.load_inversion(path).trajectory),
    "w_plus": in_one_file(save_w_plus, lambda path: w_plus.load_w_plus(path).rows),
    "w_plus_encoder": in_one_file(save_w_plus_encoder, lambda path: load_file(path)["encoder.large"]),
    "identity_prior": in_one_file(
        lambda path, version: identity_prior.save_identity_prior(prior(version), path),
        lambda path: identity_prior.load_identity_prior(path).model_change["weight"],
    ),
    "lora": in_one_file(save_lora, lambda path: load_file(path)["large"]),
    "subject_embedding": in_one_file(
        lambda path, version: subject_files.save_subject(word(version), path),
        lambda path: subject_files.load_subject(path).vectors["clip_l"],
    ),
    "textual_inversion": in_one_file(
        lambda path, version: subject_files.save_textual_inversion(word(version), path),
        lambda path: subject_files.load_textual_inversion(path).vectors["clip_l"],
    ),
    "identity_words": in_one_file(save_identity_words, read_identity_words),
    "mcdm": in_one_file(save_mcdm, read_mcdm),
    "style_attention": in_one_file(save_style_attention, read_style_attention),
    "training_checkpoint": Kind(lambda folder, version: None if train(folder, version) else None, read_training),
    "pairs": Kind(add_pair, read_pairs),
    "encoded_pairs": Kind(encode, check_encoded),
    "captions": Kind(save_captions, read_captions),
    "demo_world_checkpoint": Kind(
        lambda folder, version: save_whole({"large": large(version)}, folder / "demo.pt"),
        lambda folder: (
            version_of(torch.load(folder / "demo.pt", weights_only=True)["large"])
            if (folder / "demo.pt").exists()
            else None
        ),
    ),
}


def serve() -> None:
    """Read "kind folder" from standard input and print the process id of a fork that saves until it is killed."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, folder = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if child == 0:
            try:
                for version in itertools.count(1):
                    KINDS[kind].save(Path(folder), version)
                    Path(folder, "saved_once").touch()
            except BaseException:
                traceback.print_exc()
            os._exit(1)  # without the clean-up of what belongs to the process that forked
        print(child, flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)
