"""e4e, the encoder of StyleGAN's space W+ (Tov et al. 2021, "Designing an Encoder for StyleGAN Image Manipulation").

An IR-SE50 (ArcFace's residual network with squeeze and excitation) extracts features at three depths, which are mapped
to the W+ code by one head per row, coarse rows using the deepest features. Row 1 is a base for all rows, the others are
offsets from it (section 4.1 there). Names and shapes of all parameters are those of the published weights, so
`e4e_ffhq_encode.pt` can be loaded directly: 621 tensors for 18 rows.

Implemented here because no maintained library contains it; tested against the published implementation on random
weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate, linear

from ..shared.errors import IdentityEditError

SIZE = 256
"""Input size in pixels; any other size would silently produce another number of rows."""
WIDTH = 512
ROWS = 18
"""Rows of a W+ code for FFHQ's StyleGAN of 1024x1024 pixels: 2 * log2(1024) - 2."""
UNITS = ((64, 64, 3), (64, 128, 4), (128, 256, 14), (256, 512, 3))
"""(channels in, channels out, number of units) of the four stages; each stage halves the image in its first unit."""
TAPS = (6, 20, 23)
"""Units with feature outputs: 128 channels at 64x64, 256 at 32x32 and 512 at 16x16."""
MIDDLE_ROW, FINE_ROW = 3, 7
"""The first rows (from 0) that use the 32x32 and the 64x64 features."""
_REDUCTION = 16


class SqueezeAndExcitation(nn.Module):
    """Channel attention from global image features (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // _REDUCTION, kernel_size=1, bias=False)
        self.fc2 = nn.Conv2d(channels // _REDUCTION, channels, kernel_size=1, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        mean = features.mean(dim=(2, 3), keepdim=True)
        return features * torch.sigmoid(self.fc2(torch.relu(self.fc1(mean))))


class ResidualUnit(nn.Module):
    """IR-SE unit: batch norm, 3x3, PReLU, 3x3 with the stride, batch norm, squeeze and excitation; plus the input."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        if channels_in == channels_out:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)  # subsampling
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
            nn.PReLU(channels_out),
            nn.Conv2d(channels_out, channels_out, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            SqueezeAndExcitation(channels_out),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.res_layer(features) + self.shortcut_layer(features)


class ScaledLinear(nn.Module):
    """A linear layer whose weights are stored with unit variance (the "equalized learning rate" of StyleGAN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return linear(features, self.weight / math.sqrt(self.weight.shape[1]), self.bias)


class StyleHead(nn.Module):
    """Features [B, 512, S, S] -> one row of the W+ code [B, 512], by strided convolutions down to 1x1."""

    def __init__(self, places: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(int(math.log2(places))):
            layers += [nn.Conv2d(WIDTH, WIDTH, kernel_size=3, stride=2, padding=1), nn.LeakyReLU()]
        self.convs = nn.Sequential(*layers)
        self.linear = ScaledLinear(WIDTH)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(self.convs(features).flatten(1))


class E4E(nn.Module):
    """The encoder: images [B, 3, 256, 256] in -1 to 1 -> offset from the latent average [B, N, 512].

    Args:
        rows: N, 18 for StyleGANs of 1024x1024 pixels, 16 for 512x512, 14 for 256x256.
    """

    architecture = "e4e"

    def __init__(self, rows: int = ROWS) -> None:
        super().__init__()
        if not 1 <= rows <= ROWS:
            raise IdentityEditError(f"An e4e has 1 to {ROWS} rows, not {rows}; choose another file.")
        self.rows, self.width, self.size = rows, WIDTH, SIZE
        first = UNITS[0][0]
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, first, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(first), nn.PReLU(first)
        )
        units = []
        for channels_in, channels_out, count in UNITS:
            units.append(ResidualUnit(channels_in, channels_out, stride=2))
            units += [ResidualUnit(channels_out, channels_out, stride=1) for _ in range(count - 1)]
        self.body = nn.Sequential(*units)
        self.styles = nn.ModuleList(
            StyleHead(16 if row < MIDDLE_ROW else 32 if row < FINE_ROW else 64) for row in range(rows)
        )
        self.latlayer1 = nn.Conv2d(UNITS[2][1], WIDTH, kernel_size=1)
        self.latlayer2 = nn.Conv2d(UNITS[1][1], WIDTH, kernel_size=1)

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"rows": self.rows}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.input_layer(images)
        tapped = []
        for number, unit in enumerate(self.body):
            features = unit(features)
            if number in TAPS:
                tapped.append(features)
        fine, middle, coarse = tapped

        # The feature pyramid: deeper features are enlarged and added to the shallower ones.
        middle = _enlarged(coarse, middle) + self.latlayer1(middle)
        fine = _enlarged(middle, fine) + self.latlayer2(fine)

        base = self.styles[0](coarse)
        rows = [base]
        for row in range(1, self.rows):
            read = coarse if row < MIDDLE_ROW else middle if row < FINE_ROW else fine
            rows.append(base + self.styles[row](read))
        return torch.stack(rows, dim=1)


def _enlarged(features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return interpolate(features, size=like.shape[2:], mode="bilinear", align_corners=True)


def from_published(content: dict[str, Any], path: str) -> tuple[E4E, torch.Tensor]:
    """The encoder and the latent average [N, 512] of a published checkpoint.

    Args:
        content: {"state_dict": tensors with the prefix "encoder.", "latent_avg": [N, 512], "opts": training options},
            or the tensors and latent_avg in one dictionary, with or without the prefix. Other tensors, such as the
            StyleGAN's, are ignored.
        path: its location, for messages.

    Raises:
        IdentityEditError: when it is not an e4e, or lacks tensors or the latent average.
    """
    options = content.get("opts")
    options = options if isinstance(options, dict) else vars(options) if hasattr(options, "__dict__") else {}
    trained_as = options.get("encoder_type", "Encoder4Editing")
    if trained_as != "Encoder4Editing":
        raise IdentityEditError(
            f"The file {path} contains the encoder {trained_as}, whose W+ codes differ from e4e's; choose an e4e such "
            f"as e4e_ffhq_encode.pt."
        )
    if options.get("start_from_latent_avg") is False:
        raise IdentityEditError(
            f"The e4e in {path} was trained without a latent average, which this pack needs; choose e4e_ffhq_encode.pt."
        )
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise IdentityEditError(f"The file {path} contains no e4e encoder; choose one such as e4e_ffhq_encode.pt.")
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    average = content.get("latent_avg", tensors.pop("latent_avg", None))
    if any(name.startswith("encoder.") for name in tensors):
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
        tensors = {name.removeprefix("encoder."): tensor for name, tensor in own.items()}
    numbers = {
        int(name.split(".")[1])
        for name in tensors
        if name.startswith("styles.") and name.split(".")[1].isdecimal() and len(name.split(".")[1]) < 6
    }
    if "input_layer.0.weight" not in tensors or not numbers:
        raise IdentityEditError(f"The file {path} contains no e4e encoder; choose one such as e4e_ffhq_encode.pt.")
    rows = max(numbers) + 1
    if (
        not isinstance(average, torch.Tensor)
        or average.ndim < 1
        or average.shape[-1] != WIDTH
        or average.numel() not in (WIDTH, rows * WIDTH)
    ):
        raise IdentityEditError(
            f"The e4e in {path} has no latent average (latent_avg, {rows}x{WIDTH}); choose the complete file, such as "
            f"e4e_ffhq_encode.pt."
        )
    return with_weights(E4E, {"rows": rows}, tensors, path), average.float().reshape(-1, WIDTH).expand(rows, -1).clone()


def with_weights(architecture: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], path: str) -> Any:
    """A network with a file's tensors as its float32 parameters, without random initialization.

    Raises:
        IdentityEditError: when tensors are missing, unexpected, or of other shapes.
    """
    try:
        # Leave ComfyUI's inference mode, because autograd cannot use tensors created in it.
        with torch.inference_mode(False), torch.no_grad():
            with torch.device("meta"):
                network = architecture(**config)
            own = {
                name: (tensor.float() if tensor.is_floating_point() else tensor).clone()
                for name, tensor in tensors.items()
            }
            network.load_state_dict(own, assign=True)
    except IdentityEditError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        what = lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__
        raise IdentityEditError(
            f"The weights in {path} do not fit the encoder ({what[:160]}); download the file again, or choose another."
        ) from error
    return network.requires_grad_(False).eval()
