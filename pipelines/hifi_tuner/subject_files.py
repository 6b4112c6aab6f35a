"""Files of learned subjects: the pack's format, and textual inversions from other programs.

The pack's format is a safetensors file of at most a megabyte for 50 steps and 5 vectors:

- `shared.NAME` [n, C] float32: c_s, the vectors that all timesteps share. NAME is "output" (rows of the text encoder's
  output, 768 channels for SD1.x, 1024 for SD2.x, 2048 for SDXL), or "clip_l", "clip_g", "clip_h" (word vectors).
- `steps.NAME` [N, n, C] float32: c_s^t, row i for timestep i of the header, where all of them fit into a megabyte
  (50 x 5 x 768 are 768 kB). Otherwise (SD2.x, SDXL) the difference to the shared vectors in 8 bits: `steps.NAME.levels`
  [N, n, C] int8, -127 to 127, times `steps.NAME.scale` [N, n] float32, one for each vector, so that no number is off by
  more than 1/254 of the vector's largest difference. The header says by how much it is in all ("rounding": Frobenius
  norm of the error relative to that of the differences).
- The header's `identity_edit` is JSON: kind, form ("output" or "word"), class_word, token, timesteps, model (the tag of
  the model it was trained on, or null), training (steps, learning rate, settings), rounding.

Textual inversions: A1111's .pt (`string_to_param`) and .safetensors (`emb_params`), diffusers' .bin and .safetensors
({"<token>": tensor}), and ComfyUI's `clip_l`, `clip_g`, `clip_h`. Pickles are read by torch's weights-only reader,
which executes nothing.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from .. import engine
from ..shared.errors import IdentityEditError
from ..shared.files import checked_record, header_of, load_external, parsing_file, read_tensors, write_tensors
from .subject_embedding import OUTPUT, WORD, SubjectEmbedding

KIND = "embedding of a subject"
EMBEDDING_ENDINGS = (".safetensors", ".pt", ".bin")
MAXIMUM_BYTES = 1_000_000
_BYTES_OF_HEADER = 20_000
_LEVELS = 127
_ENCODER_OF_WIDTH = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}


def save_subject(subject: SubjectEmbedding, path: str) -> None:
    """Write a subject atomically, in the format described at the top of this file."""
    tensors = {f"shared.{name}": shared.float() for name, shared in subject.vectors.items()}
    steps = subject.step_vectors or {}
    numbers = sum(tensor.numel() for tensor in (*tensors.values(), *steps.values()))
    rounding = 0.0
    if 4 * numbers + _BYTES_OF_HEADER <= MAXIMUM_BYTES:
        tensors |= {f"steps.{name}": each.float() for name, each in steps.items()}
    else:
        for name, each in steps.items():
            difference = each.float() - subject.vectors[name].float()
            scale = difference.abs().amax(dim=2) / _LEVELS
            levels = (difference / scale.clamp(min=1e-30)[..., None]).round().to(torch.int8)
            error = difference - levels.float() * scale[..., None]
            rounding = max(rounding, float(error.norm() / difference.norm().clamp(min=1e-30)))
            tensors |= {f"steps.{name}.levels": levels, f"steps.{name}.scale": scale}
    description = {
        "kind": KIND,
        "form": subject.kind,
        "class_word": subject.class_word,
        "token": subject.token,
        "timesteps": list(subject.timesteps),
        "model": None if subject.model is None else dataclasses.asdict(subject.model),
        "training": subject.training,
        "rounding": rounding,
    }
    write_tensors(path, tensors, description)


def load_subject(path: str) -> SubjectEmbedding:
    """Read a subject written by `save_subject`, or a textual inversion from another program.

    Raises:
        IdentityEditError: when the file is missing, damaged, or of another kind.
    """
    if not os.path.isfile(path):
        raise IdentityEditError(f"The file {path} does not exist; choose another, or train a subject first.")
    names, _ = header_of(path, "train the subject or load it again")
    if not any(name.startswith("shared.") for name in names):
        return load_textual_inversion(path)
    tensors, description = read_tensors(path, KIND)
    with parsing_file(path, "The subject"):
        vectors = {name.removeprefix("shared."): part for name, part in tensors.items() if name.startswith("shared.")}
        steps: dict[str, torch.Tensor] = {}
        for name, shared in vectors.items():
            if f"steps.{name}" in tensors:
                steps[name] = tensors[f"steps.{name}"]
            elif f"steps.{name}.levels" in tensors:
                scale = tensors[f"steps.{name}.scale"][..., None]
                steps[name] = shared + tensors[f"steps.{name}.levels"].float() * scale
        tag, training = description["model"], description["training"]
        checked_record(training, ("steps", "learning_rate", "images"))
        return SubjectEmbedding(
            kind=description["form"],
            vectors=vectors,
            step_vectors=steps or None,
            timesteps=tuple(int(timestep) for timestep in description["timesteps"]),
            class_word=str(description["class_word"]),
            token=str(description["token"]),
            model=None if tag is None else engine.ModelTag.from_description(tag),
            training=training,
        )


def load_textual_inversion(path: str) -> SubjectEmbedding:
    """Read a textual inversion from another program as a subject of the kind WORD.

    The encoder of a single tensor is inferred from its width (768 clip_l, 1024 clip_h, 1280 clip_g; any other: clip_l).
    The subject's token is the name in the file, or else the file name without extension.

    Raises:
        IdentityEditError: when the file is missing, damaged, not a textual inversion, or contains code.
    """
    content = load_external(path, "save it again", "save it as safetensors in the program that made it")
    token = os.path.splitext(os.path.basename(path))[0]
    found: dict[str, Any] = {}
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):  # A1111, .pt
        found = {"": next(iter(content["string_to_param"].values()), None)}
        token = content["name"] if isinstance(content.get("name"), str) and content["name"].strip() else token
    elif isinstance(content, dict) and set(content) and set(content) <= set(_ENCODER_OF_WIDTH.values()):  # ComfyUI
        found = content
    elif isinstance(content, dict) and "emb_params" in content:  # A1111, .safetensors
        found = {"": content["emb_params"]}
    elif isinstance(content, dict) and len(content) == 1:  # diffusers
        (key, value), *_ = content.items()
        found, token = {"": value}, str(key)
    vectors: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (1, 2) or tensor.numel() == 0:
            found = {}
            break
        rows = tensor.detach().float().reshape(-1, tensor.shape[-1])
        vectors[name or _ENCODER_OF_WIDTH.get(rows.shape[-1], "clip_l")] = rows
    if not found:
        raise IdentityEditError(
            f"The file {path} is neither a subject of this pack nor a textual inversion; choose another file."
        )
    return SubjectEmbedding(kind=WORD, vectors=vectors, token=token.strip(), training={"file": os.path.basename(path)})


def save_textual_inversion(subject: SubjectEmbedding, path: str) -> None:
    """Write the shared word vectors as a stock embedding: safetensors with `clip_l`, `clip_g`, `clip_h`.

    ComfyUI's `embedding:name`, A1111 and diffusers can read it. Step-wise vectors are not saved.

    Raises:
        IdentityEditError: for a subject of the kind OUTPUT, or when the file cannot be written.
    """
    if subject.kind == OUTPUT:
        raise IdentityEditError(
            f"The subject '{subject.name}' consists of text encoder output and not of word vectors; train it with kind "
            f"'word' to save it as an embedding, or use Apply Subject."
        )
    description = {"kind": "textual inversion", "token": subject.token, "class_word": subject.class_word}
    write_tensors(path, {name: shared.float() for name, shared in subject.vectors.items()}, description)
