"""Identity words: word embeddings for the person in an image (Chen et al. 2024, supplement 1.1).

As in the paper, the identity encoder is a variant of ELITE's global mapping (Wei et al. 2023): CLIP vision features, a
Transformer decoder layer (Vaswani et al. 2017) and a multi-layer perceptron, which outputs two word embeddings. In
prompts they precede the class word: "a [w1] [w2] woman, santa claus costume". The diffusion model, the text encoder and
the image encoder are not trained.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import engine
from ..shared.conditioning import Conditioning
from ..shared.errors import IdentityEditError, check_finite
from ..shared.files import checked_record, parsing_file, read_tensors, write_tensors
from ..subjects.word_vectors import check_word_widths, mark_subject, with_word_vectors
from ..subjects.words import has_word, with_token

WORDS = 2
"""Chen et al. 2024: c_id is 2 x 768, two words."""
MOST_WORDS = 16
KIND = "identity words file"
_PLACE = "<identity>"


class IdentityEncoder(nn.Module):
    """Features of a CLIP image encoder -> word embeddings for each text encoder of a checkpoint.

    Learned queries, one per word, attend to the image's features in one decoder layer (torch's); the perceptron
    projects each to the width of the word embeddings. Its initial output is the class word's embedding.
    """

    def __init__(self, features: int, widths: dict[str, int], words: int) -> None:
        """
        Args:
            features: width of the image encoder's features.
            widths: of the word embeddings, by the text encoder's name ("clip_l", "clip_g", "clip_h").
            words: number of words.
        """
        super().__init__()
        heads = next(h for h in (16, 12, 8, 6, 4, 3, 2, 1) if features % h == 0 and (features // h >= 32 or h == 1))
        self.queries = nn.Parameter(torch.randn(words, features) * features**-0.5)
        self.normalize = nn.LayerNorm(features)
        self.decoder = nn.TransformerDecoderLayer(
            features, heads, 4 * features, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.perceptrons = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.LayerNorm(features), nn.Linear(features, features), nn.GELU(), nn.Linear(features, width)
                )
                for name, width in widths.items()
            }
        )

    def begin_with(self, vectors: dict[str, torch.Tensor]) -> None:
        """Set the initial output of every word to `vectors[name]` [width]."""
        for name, perceptron in self.perceptrons.items():
            *_, weight, bias = perceptron.parameters()  # its last layer's
            with torch.no_grad():
                weight.zero_()
                bias.copy_(vectors[name])

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features [B, N, C] of B images -> word embeddings [B, words, width] by the text encoder's name."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        read = self.decoder(queries, self.normalize(features))
        return {name: perceptron(read) for name, perceptron in self.perceptrons.items()}


@dataclass(frozen=True)
class IdentityWords:
    """A trained identity encoder.

    Attributes:
        encoder: the network, float32 on the CPU.
        words: how many words it gives.
        widths: of the word embeddings by text encoder.
        features: (tokens, width) of the image features that it reads.
        class_word: what the images of its training showed, "person".
        model: tag of the model it was trained with.
        training: what is known about the training.
    """

    encoder: IdentityEncoder
    words: int
    widths: dict[str, int]
    features: tuple[int, int]
    class_word: str
    model: engine.ModelTag | None = None
    training: dict[str, Any] = field(default_factory=dict)


def image_features(output: Any, name: str = "The CLIP vision output") -> torch.Tensor:
    """Input of the identity encoder from a CLIP_VISION_OUTPUT: the penultimate layer [B, N, C] float32 CPU.

    Raises:
        IdentityEditError: when there are no such features.
    """
    features = getattr(output, "penultimate_hidden_states", None)
    if not isinstance(features, torch.Tensor) or features.ndim != 3:
        raise IdentityEditError(f"{name} has no features of single patches; use CLIP Vision Encode with a CLIP model.")
    return features.detach().float().cpu()


def identity_vectors(words: IdentityWords, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Word embeddings [B, words, width] of B images by text encoder, float32 CPU.

    Raises:
        IdentityEditError: when the features are another image encoder's.
    """
    if tuple(features.shape[1:]) != words.features:
        raise IdentityEditError(
            f"The identity words read {words.features[0]} features of width {words.features[1]}, and this CLIP vision "
            f"gives {features.shape[1]} of width {features.shape[2]}; use the CLIP vision that they were trained with."
        )
    with torch.inference_mode(False), torch.no_grad():
        return words.encoder.eval()(features.detach().clone().float())


def mark_identity(clip: Any, class_word: str, count: int, prompt: str, **options: Any) -> dict[str, Any]:
    """Tokenize a prompt with `count` placeholders right before its first class word; see `mark_subject`.

    Raises:
        IdentityEditError: when the prompt does not contain the class word.
    """
    if not class_word.strip() or not has_word(prompt, class_word):
        raise IdentityEditError(
            f"The prompt '{prompt}' does not contain the class word '{class_word}', in front of which the identity "
            f"words go; add it, or choose another class_word."
        )
    return mark_subject(clip, _PLACE, "", count, with_token(prompt, class_word, _PLACE), **options)


def identity_conditioning(clip: Any, vectors: dict[str, torch.Tensor], prompt: str, class_word: str) -> Conditioning:
    """Encode a prompt with identity words in it, as CLIP Text Encode does.

    Args:
        clip: CLIP of the model.
        vectors: word embeddings [B, words, width] of B images, from `identity_vectors`.
        prompt: holds the class word; the identity words go before its first occurrence.
        class_word: what the person is, "woman".

    Returns:
        a CONDITIONING whose embeddings are [B, T, C]: one row for each image.

    Raises:
        IdentityEditError: when the prompt lacks the class word, or the CLIP has another width.
    """
    if clip is None:
        raise IdentityEditError("There is no CLIP; connect the one of the checkpoint.")
    check_word_widths(clip, vectors)
    images, count = next(iter(vectors.values())).shape[:2]
    marked = mark_identity(clip, class_word, count, prompt)
    rows = [
        clip.encode_from_tokens_scheduled(with_word_vectors(marked, {name: each[i] for name, each in vectors.items()}))
        for i in range(images)
    ]
    result: Conditioning = []
    for entries in zip(*rows, strict=True):
        options = dict(entries[0][1])
        if options.get("pooled_output") is not None:
            options["pooled_output"] = torch.cat([each["pooled_output"] for _, each in entries])
        result.append([torch.cat([embedding for embedding, _ in entries]), options])
    return result


# -- files -------------------------------------------------------------------------------------------------------------


def save_identity_words(words: IdentityWords, path: str) -> None:
    """Write the encoder in float32 with its description, completely or not at all.

    Raises:
        IdentityEditError: when the file cannot be written.
    """
    description = {
        "kind": KIND,
        "words": words.words,
        "widths": words.widths,
        "features": list(words.features),
        "class_word": words.class_word,
        "model": None if words.model is None else dataclasses.asdict(words.model),
        "training": words.training,
    }
    write_tensors(path, dict(words.encoder.state_dict()), description)


def load_identity_words(path: str) -> IdentityWords:
    """Read a file of `save_identity_words`.

    Raises:
        IdentityEditError: when the file is missing, damaged, or holds something else.
    """
    tensors, description = read_tensors(path, KIND)
    with parsing_file(path, "The identity words"):
        tag = description["model"]
        words, (tokens, width) = int(description["words"]), description["features"]
        widths = {str(name): int(each) for name, each in description["widths"].items()}
        # ComfyUI runs nodes in inference mode, in which weights would be made that nothing can be trained through.
        with torch.inference_mode(False), torch.no_grad():
            with torch.device("meta"):  # whatever sizes a file claims, no memory is taken for them
                encoder = IdentityEncoder(int(width), widths, words)
            encoder.load_state_dict({name: tensor.float().clone() for name, tensor in tensors.items()}, assign=True)
        for name, tensor in tensors.items():
            check_finite(tensor, f"{name} of {path}", "train it again with a lower learning rate")
        return IdentityWords(
            encoder=encoder.requires_grad_(False),
            words=words,
            widths=widths,
            features=(int(tokens), int(width)),
            class_word=str(description["class_word"]),
            model=None if tag is None else engine.ModelTag.from_description(tag),
            training=checked_record(description["training"], ()),
        )
