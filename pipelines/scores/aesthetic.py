"""How beautiful people would find an image, from 1 to 10, as LAION's predictors say (Schuhmann et al. 2022).

Two kinds are published, both on the image embedding of CLIP ViT-L/14 scaled to length 1: a linear layer
(`sa_0_4_vit_l_14_linear.pth`) and five linear layers after one another (`sac+logos+ava1-l14-linearMSE.pth`), whose
activations were left out by their author, so that an image's score is a weighted sum of its embedding here as there.
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
        name: its file's.
        layers: (weight [out, in], bias [out]) in order; the last gives one number.
    """

    name: str
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def predict(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Scores [n] float64 of image embeddings [n, D] of length 1.

        Raises:
            IdentityEditError: when the embeddings are of another network than CLIP ViT-L/14.
        """
        wanted = self.layers[0][0].shape[1]
        if embeddings.shape[1] != wanted:
            raise IdentityEditError(
                f"{self.name} reads {wanted} numbers an image and this CLIP gives {embeddings.shape[1]}; choose the "
                f"CLIP that it was trained with, ViT-L/14 of OpenAI."
            )
        values = embeddings.double()
        for weight, bias in self.layers:
            values = values @ weight.double().T + bias.double()
        return values[:, 0]


def load_aesthetic_predictor(name: str) -> AestheticPredictor:
    """A predictor from a file of models/image_scores.

    Raises:
        IdentityEditError: when the file is missing or holds something else.
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
            f"{name} is no aesthetic predictor of linear layers; choose sa_0_4_vit_l_14_linear.pth or "
            f"sac+logos+ava1-l14-linearMSE.pth."
        )
    return AestheticPredictor(os.path.basename(name), tuple((layer["weight"], layer["bias"]) for layer in ordered))


def _fit(layers: list[dict[str, torch.Tensor]]) -> bool:
    """Whether each layer reads what the one before gives, and the last gives one number."""
    if not layers or any(set(layer) != {"weight", "bias"} or layer["weight"].ndim != 2 for layer in layers):
        return False
    outputs = [len(layer["weight"]) for layer in layers]
    inputs = [layer["weight"].shape[1] for layer in layers]
    return outputs[:-1] == inputs[1:] and outputs[-1] == 1
