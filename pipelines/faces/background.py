"""Background removal with a salient-object network in ONNX (U2-Net: Qin et al. 2020, as used by rembg).

Users provide the files, models/rembg/*.onnx: u2net.onnx, u2netp.onnx, u2net_human_seg.onnx. Nothing is downloaded. The
package rembg is not used because it downloads networks automatically; running them takes only a few lines.
"""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from ..networks.image_encoders import IMAGENET_DEVIATION, IMAGENET_MEAN
from ..networks.optional import onnx_session
from ..shared.errors import IdentityEditError

FOLDER = "rembg"
ENDINGS = (".onnx",)
NEEDED = "u2net.onnx, u2netp.onnx or u2net_human_seg.onnx"


def subject_masks(path: str, images: torch.Tensor) -> torch.Tensor:
    """Soft subject masks.

    Args:
        path: an .onnx file; see the top of this file.
        images: [B, H, W, 3] float32, 0 to 1.

    Returns:
        [B, H, W] float32, 0 to 1; normalized to each image's minimum and maximum, as in rembg.

    Raises:
        IdentityEditError: when onnxruntime is missing, or the file is another network.
    """
    session = onnx_session(path)
    shape = session.get_inputs()[0].shape
    if len(shape) != 4 or shape[1] != 3 or not all(isinstance(side, int) for side in shape[2:]):
        raise IdentityEditError(f"{path} is no salient-object network; choose {NEEDED}.")
    height, width = images.shape[1:3]
    mean, deviation = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_DEVIATION)[:, None, None]
    masks = []
    for image in images:
        shown = interpolate(image.movedim(-1, 0)[None], size=tuple(shape[2:]), mode="bicubic", antialias=True)[0]
        shown = shown.clamp(0.0, 1.0)
        shown = (shown / shown.max().clamp(min=1e-6) - mean) / deviation
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: shown[None].numpy()})[0])
        if found.ndim != 4 or found.shape[1] != 1:
            raise IdentityEditError(f"{path} is no salient-object network; choose {NEEDED}.")
        found = (found - found.min()) / (found.max() - found.min()).clamp(min=1e-6)
        masks.append(interpolate(found, size=(height, width), mode="bilinear", antialias=True)[0, 0])
    return torch.stack(masks).clamp(0.0, 1.0)


def without_background(images: torch.Tensor, masks: torch.Tensor, level: float) -> torch.Tensor:
    """Images [B, H, W, 3] composited over gray of `level` (0 black, 1 white) with masks [B, H, W]."""
    share = masks[..., None]
    return images * share + level * (1.0 - share)
