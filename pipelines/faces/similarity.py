"""Identity similarity: cosine similarity of ArcFace embeddings (Deng et al. 2019).

The metric "ID" of PIDiff (section 3.2): faces are detected, aligned and embedded by ArcFace; the score is the cosine of
two embeddings, about 1 for the same image and around 0 for different people. Users provide the files in
models/insightface: a model pack, or a single .onnx; nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..networks.optional import import_optional, onnx_session
from ..shared.errors import IdentityEditError
from .alignment import ARCFACE_SIZE, align_arcface
from .detection import Face, insightface_model, list_detectors, missing_file

if TYPE_CHECKING:
    import numpy as np

SAME_PERSON = 0.5
"""Threshold above which images show the same person; see benchmarks/results/face_identity.md."""
OTHER_PERSON = 0.35
NEEDED = (
    "a model pack with its .onnx files as models/PACK, such as models/buffalo_l/w600k_r50.onnx, or an ArcFace such as "
    "w600k_r50.onnx"
)
_OLD_EXPORT = (b"_minusscalar", b"_mulscalar")
"""Layer names in ArcFaces exported from MXNet, which normalize images themselves."""


class FaceRecognizer:
    """An ArcFace, run by insightface if installed, which supports all exports, else by onnxruntime."""

    def __init__(self, path: str) -> None:
        self.name = os.path.basename(path)
        self._network: Any = None
        self._session: Any = None
        if os.path.isdir(path) or _has_insightface():
            self._network = insightface_model(path, "recognition")
            size = tuple(self._network.input_size)
        else:
            self._session = _session(path)
            size = tuple(self._session.get_inputs()[0].shape[2:4])
        if size != (ARCFACE_SIZE, ARCFACE_SIZE):
            raise IdentityEditError(
                f"{path} takes faces of {size} pixels, and no ArcFace does; choose one such as w600k_r50.onnx."
            )

    def embed(self, faces: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, D] float32 of length 1.

        Args:
            faces: [B, 112, 112, 3] float32, 0 to 1, from `face_alignment.align_arcface`.
        """
        import numpy as np

        pixels = (faces * 255.0).round()
        # One at a time: some exports have a fixed batch size of 1.
        found = np.concatenate([self._run(face) for face in pixels])
        return torch.nn.functional.normalize(torch.from_numpy(found).float(), dim=1)

    def _run(self, pixels: torch.Tensor) -> np.ndarray:
        """The embedding [1, D] of a face [112, 112, 3], 0 to 255."""
        if self._network is not None:
            return self._network.get_feat(pixels.to(torch.uint8).numpy()[..., ::-1].copy())  # blue before red
        blob = ((pixels - 127.5) / 127.5).permute(2, 0, 1)[None].contiguous().numpy()
        return self._session.run(None, {self._session.get_inputs()[0].name: blob})[0]


def load_recognizer(name: str) -> FaceRecognizer:
    """An ArcFace by its name in `faces.list_detectors` (packs and single files below models/insightface).

    Raises:
        IdentityEditError: when the file or its package is missing, or it is no ArcFace.
    """
    paths = list_detectors()
    if name not in paths:
        raise IdentityEditError(missing_file(name, NEEDED))
    return FaceRecognizer(paths[name])


def embed_faces(recognizer: FaceRecognizer, faces: Sequence[tuple[torch.Tensor, Face]]) -> torch.Tensor:
    """Embeddings [B, D] of faces, each an image [H, W, 3] and the face's position in it."""
    return recognizer.embed(torch.stack([align_arcface(image, face.points) for image, face in faces]))


def similarities(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Cosine similarity [B1, B2] of embeddings [B1, D] and [B2, D] of length 1."""
    if first.shape[1] != second.shape[1]:
        raise IdentityEditError("The faces were embedded by different networks; use the same network for both.")
    return (first.double() @ second.double().T).clamp(-1.0, 1.0).float()


def verdict(score: float) -> str:
    """A score as text."""
    if score > SAME_PERSON:
        return "the same person"
    return "not the same person" if score < OTHER_PERSON else "uncertain"


def _has_insightface() -> bool:
    from importlib.util import find_spec

    return all(find_spec(name) is not None for name in ("insightface", "onnx", "cv2", "skimage"))


def _session(path: str) -> Any:
    import_optional("onnxruntime", "onnxruntime", path)
    with open(path, "rb") as file:
        content = file.read()
    if any(name in content for name in _OLD_EXPORT):
        raise IdentityEditError(
            f"{path} is an old export, which insightface alone knows; run `pip install insightface`."
        )
    session = onnx_session(path)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1 or len(inputs[0].shape) != 4 or len(outputs[0].shape) != 2:
        raise IdentityEditError(f"{path} is no ArcFace; choose one such as w600k_r50.onnx.")
    return session
