"""LAION's aesthetic predictors, which score images from 1 to 10 (Schuhmann et al. 2022).

Both published predictors read the normalized image embedding of CLIP ViT-L/14: `sa_0_4_vit_l_14_linear.pth` is a linear
layer, `sac+logos+ava1-l14-linearMSE.pth` consists of five linear layers without activations.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..networks.model_folders import read_checkpoint
from ..shared.errors import IdentityEditError
from .files import files, missing_file

NEEDED = "LAION's aesthetic predictor for CLIP ViT-L/14"
PURPOSE = "The aesthetic score"


@dataclass(frozen=True)
class AestheticPredictor:
    """The layers of a predictor.

    Attributes:
        name: its file name.
        layers: (weight [out, in], bias [out]) in order; the last layer has one output.
    """

    name: str
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def predict(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Scores [n] float64 of normalized image embeddings [n, D].

        Raises:
            IdentityEditError: when the embeddings are not from CLIP ViT-L/14.
        """
        wanted = self.layers[0][0].shape[1]
        if embeddings.shape[1] != wanted:
            raise IdentityEditError(
                f"{self.name} needs embeddings of {wanted} channels and this CLIP has {embeddings.shape[1]}; choose "
                f"the CLIP that it was trained with, OpenAI's ViT-L/14."
            )
        values = embeddings.double()
        for weight, bias in self.layers:
            values = values @ weight.double().T + bias.double()
        return values[:, 0]


def load_aesthetic_predictor(name: str) -> AestheticPredictor:
    """Load a predictor from models/image_scores.

    Raises:
        IdentityEditError: when the file is missing or is not an aesthetic predictor.
    """
    paths = files()
    if name not in paths:
        raise IdentityEditError(missing_file(name, PURPOSE, NEEDED))
    state = read_checkpoint(paths[name])
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():  # "weight", or "layers.4.weight" and so on
        place, _, kind = key.rpartition(".")
        number = place.rpartition(".")[2]
        layers.setdefault(int(number) if number.isdigit() else 0, {})[kind] = value
    ordered = [layers[number] for number in sorted(layers)]
    if not _fit(ordered):
        raise IdentityEditError(
            f"{name} is not an aesthetic predictor; choose sa_0_4_vit_l_14_linear.pth or "
            f"sac+logos+ava1-l14-linearMSE.pth."
        )
    return AestheticPredictor(os.path.basename(name), tuple((layer["weight"], layer["bias"]) for layer in ordered))


def _fit(layers: list[dict[str, torch.Tensor]]) -> bool:
    """Whether the layers fit together, and the last one has one output."""
    if not layers or any(set(layer) != {"weight", "bias"} or layer["weight"].ndim != 2 for layer in layers):
        return False
    outputs = [len(layer["weight"]) for layer in layers]
    inputs = [layer["weight"].shape[1] for layer in layers]
    return outputs[:-1] == inputs[1:] and outputs[-1] == 1
