"""The Multi-Conditioned Diffusion Model, MCDM (Chen et al. 2024, section 3.3): its conditions and its file.

epsilon_theta(z_t, t, {c_s, c_im, c_p}) has two conditions for the source image x_A in addition to the text prompt p:
- spatial embeddings c_s = E(x_A), the VAE's latent, in four additional input channels of the UNet;
- image embeddings c_im = MLP([E(x_A), CLIP(x_A)]), tokens appended to those of the text.

The MLP is DreamPose's adapter (Karras et al. 2023), as section 1.2 of the supplement says, for encoders of any size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import engine
from ..engine.edit_model import checkpoint_tensors, require_edit_model
from ..engine.vision import VisionTag, vision_projection, vision_tag, vision_tokens
from ..shared.conditioning import Conditioning
from ..shared.errors import IdentityEditError, check_conditioning
from ..shared.files import FILE_DTYPES, checked_record, parsing_file, read_tensors, write_tensors
from ..shared.images import encoded

KIND = "MCDM"
IMAGE_TOKENS = 77
"""The length of a text, so that a context without c_im, repeated once, is as long as one with it: ComfyUI then
evaluates both in one call, and repeating a whole context does not change attention."""
TOKENS_OPTION = "identity_edit_image_tokens"
"""Option of a conditioning: number of c_im tokens at its end."""
SPATIAL_OPTION = "concat_latent_image"
"""Option of a conditioning in which ComfyUI keeps c_s."""
ALL_CONDITIONS, IMAGE_ALONE, SPATIAL_ALONE = "image and spatial", "image only", "spatial only"
CONDITIONS = {ALL_CONDITIONS: (True, True), IMAGE_ALONE: (True, False), SPATIAL_ALONE: (False, True)}
"""Whether c_im and whether c_s is used, beside the text: the full model and the two ablations of section 4."""
CONVENTIONS: dict[str, Any] = {
    "spatial": "the latent as the VAE gives it, unscaled, in input channels 5 to 8",
    "latent of the MLP": "scaled as the noisy latent is",
    "tokens of CLIP": "last hidden states after CLIP's last normalisation, of the picture squeezed to a square",
    "null spatial": "zeros in latent space",
    "null image": "no image tokens",
    "null text": "the empty prompt",
    "order": ["image", "spatial", "text"],
}
"""Conventions of training and inference. Files contain them, and files with other conventions are refused."""

_PREFIX = "identity_edit_mcdm."


class ImageEmbedding(nn.Module):
    """MLP(.) of section 3.3: c_im from CLIP's tokens and the VAE's latent of an image.

    CLIP's tokens are projected to the width of the text's tokens; each channel of the latent, max-pooled by two,
    becomes one more; a linear layer along the tokens mixes them all. It has no activation, as DreamPose's has none.

    Attributes:
        project: [D to C] of CLIP's tokens.
        latent_to_token: [h w / 4 to C] of the latent's channels.
        mix: [N + channels to M] along the tokens.
        grid: height and width that all latents are pooled to: half of those it is trained with.
    """

    def __init__(
        self, tokens: int, width: int, latent: tuple[int, int, int], context: int, image_tokens: int = IMAGE_TOKENS
    ) -> None:
        """
        Args:
            tokens, width: N and D, of CLIP's tokens.
            latent: channels, height and width of the latents it is trained with.
            context: C, the width of the text's tokens.
            image_tokens: M, the number of c_im's tokens; 0 takes N, as DreamPose does.
        """
        super().__init__()
        channels, height, columns = latent
        self.grid = (max(1, height // 2), max(1, columns // 2))
        self.project = nn.Linear(width, context, bias=False)
        self.latent_to_token = nn.Linear(self.grid[0] * self.grid[1], context)
        self.mix = nn.Linear(tokens + channels, image_tokens or tokens)
        self.requires_grad_(False)

    @property
    def image_tokens(self) -> int:
        """M, the number of c_im's tokens."""
        return int(self.mix.out_features)

    @torch.no_grad()
    def initialize(self, tokens: int, projection: torch.Tensor | None, generator: torch.Generator) -> ImageEmbedding:
        """Begin as a pass-through of CLIP's tokens.

        `project` begins as CLIP's own projection where that leads to the text's width, else as the identity. `mix`
        begins as the identity on CLIP's N tokens where M = N (DreamPose's begins so), else as the mean of neighboring
        ones or their repetition, and with zeros for the latent's tokens. These differ from zero, or the zeros would
        never learn.
        """
        if projection is not None and projection.shape == self.project.weight.shape:
            self.project.weight.copy_(projection)
        else:
            nn.init.eye_(self.project.weight)
        bound = self.latent_to_token.in_features**-0.5
        for parameter in self.latent_to_token.parameters():
            parameter.copy_(bound * (2.0 * torch.rand(parameter.shape, generator=generator) - 1.0))
        self.mix.weight.zero_()
        self.mix.bias.zero_()
        self.mix.weight[:, :tokens] = nn.functional.adaptive_avg_pool1d(torch.eye(tokens)[None], self.image_tokens)[0].T
        return self

    def forward(self, tokens: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """c_im [B, M, C] of CLIP's tokens [B, N, D] and the latent [B, channels, h, w] in the model's scale."""
        of_clip = self.project(tokens)
        pooled = nn.functional.adaptive_max_pool2d(latent, self.grid)
        of_latent = self.latent_to_token(pooled.flatten(2))
        both = torch.cat([of_clip, of_latent.to(of_clip)], dim=1)
        return self.mix(both.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class MCDM:
    """Contents of a file other than the UNet.

    Attributes:
        embedding: MLP(.), float32 on the CPU.
        vision: tag of the CLIP vision of its tokens.
        model: tag of the trained model.
        latent: channels, height and width of the latents it was trained with.
        training: training metadata: settings, prompts, the number of pairs.
    """

    embedding: ImageEmbedding
    vision: VisionTag
    model: engine.ModelTag
    latent: tuple[int, int, int]
    training: dict[str, Any]


@dataclass(frozen=True)
class SourceImages:
    """The conditions of x_A.

    Attributes:
        latent: c_s [B, C, h, w], as the VAE gives it.
        image_embeddings: c_im [B, M, context] float32.
    """

    latent: torch.Tensor
    image_embeddings: torch.Tensor


def new_embedding(
    model: Any, clip_vision: Any, latent: tuple[int, int, int], generator: torch.Generator, image_tokens: int
) -> ImageEmbedding:
    """An untrained MLP(.) for a MODEL's text width and a CLIP_VISION; arguments as in `ImageEmbedding`."""
    tag = vision_tag(clip_vision)
    made = ImageEmbedding(tag.tokens, tag.width, latent, engine.require(model).text_width, image_tokens)
    return made.initialize(tag.tokens, vision_projection(clip_vision), generator)


def see_images(mcdm: MCDM, model: Any, clip_vision: Any, vae: Any, images: torch.Tensor) -> SourceImages:
    """Encode source images for an MCDM.

    Args:
        mcdm: from the model's file.
        model: MODEL of the same file.
        clip_vision: CLIP_VISION that it was trained with.
        vae: VAE of the same file.
        images: [B, H, W, 3] float32, 0 to 1.

    Raises:
        IdentityEditError: when the model sees no source image or is of another family than the file's, the CLIP
            vision is another one, or a latent cannot be used.
    """
    check_mcdm(mcdm, model)
    other = vision_tag(clip_vision).difference(mcdm.vision)
    if other is not None:
        raise IdentityEditError(
            f"The CLIP vision is not the one that this MCDM was trained with ({other}); load that one."
        )
    latent = encoded(vae, images, "The image")
    if latent.shape[1] != mcdm.latent[0]:
        raise IdentityEditError(
            f"The VAE returns latents {tuple(latent.shape)} but the MCDM takes {mcdm.latent[0]} channels; use the VAE "
            f"of its checkpoint."
        )
    with torch.no_grad():
        tokens = vision_tokens(clip_vision, images)
        embeddings = mcdm.embedding(tokens, engine.to_model_scale(model, latent))
    return SourceImages(latent, embeddings)


def with_images(conditioning: Conditioning, images: SourceImages) -> Conditioning:
    """A CONDITIONING of a prompt, with c_im appended to its tokens and c_s for the additional input channels."""
    check_conditioning(conditioning, "The prompt's conditioning")
    result: Conditioning = []
    for text, options in conditioning:
        image = images.image_embeddings.to(text)
        batch = max(text.shape[0], image.shape[0])
        both = torch.cat([text.expand(batch, -1, -1), image.expand(batch, -1, -1)], dim=1)
        result.append([both, {**options, SPATIAL_OPTION: images.latent, TOKENS_OPTION: int(image.shape[1])}])
    return result


def without_images(conditioning: Conditioning, *, spatial: bool, image: bool, name: str) -> Conditioning:
    """A CONDITIONING of `with_images` with the null value of c_s in its place if `spatial`, and of c_im if `image`.

    Raises:
        IdentityEditError: when it has none of them.
    """
    check_conditioning(conditioning, name)
    result: Conditioning = []
    for embedding, options in conditioning:
        if TOKENS_OPTION not in options:
            raise IdentityEditError(f"{name} holds no source image; connect MCDM Conditioner.")
        left = {key: value for key, value in options.items() if not (spatial and key == SPATIAL_OPTION)}
        count = options[TOKENS_OPTION]
        if image:
            left[TOKENS_OPTION] = 0
        result.append([embedding[:, : embedding.shape[1] - count] if image else embedding, left])
    return result


def only_with(conditioning: Conditioning, mcdm: MCDM, conditions: str) -> Conditioning:
    """A CONDITIONING of `with_images` reduced to the chosen image conditions that the MCDM was trained with.

    Args:
        conditioning: from `with_images`.
        mcdm: from the model's file.
        conditions: a key of CONDITIONS.

    Raises:
        IdentityEditError: when the MCDM was trained with none of the chosen ones.
    """
    if conditions not in CONDITIONS:
        raise IdentityEditError(f"conditions is '{conditions}'; choose one of {', '.join(CONDITIONS)}.")
    learned = trained_with(mcdm)
    image, spatial = (a and b for a, b in zip(CONDITIONS[conditions], CONDITIONS[learned], strict=True))
    if not (image or spatial):
        raise IdentityEditError(
            f"conditions is '{conditions}', but this MCDM was trained with '{learned}'; choose the same."
        )
    return without_images(conditioning, spatial=not spatial, image=not image, name="The prompt's conditioning")


def trained_with(mcdm: MCDM) -> str:
    """The key of CONDITIONS that an MCDM was trained with."""
    settings = mcdm.training.get("settings")
    conditions = settings.get("conditions") if isinstance(settings, dict) else None
    return conditions if conditions in CONDITIONS else ALL_CONDITIONS


def check_mcdm(mcdm: MCDM, model: Any) -> str | None:
    """Check that a MODEL can be used with an MCDM's file.

    Returns:
        a warning when it has other weights than the file's, or None.

    Raises:
        IdentityEditError: when it sees no source image, or is of another family.
    """
    require_edit_model(model)
    tag = engine.model_tag(model)
    difference = dataclasses.replace(tag, weights=mcdm.model.weights).difference(mcdm.model)
    if difference is not None:
        raise IdentityEditError(
            f"The model is not of the family of this MCDM's file ({difference}); load both from the same file."
        )
    # The tag is the trained model's; the file keeps its weights in one of FILE_DTYPES, bfloat16 the coarsest.
    if tag.difference(dataclasses.replace(mcdm.model, dtype="bfloat16")) is not None:
        return "The model has other weights than the MCDM's file; load both from the same file."
    return None


def save_mcdm(
    mcdm: MCDM, path: str, model: Any, clip: Any | None, vae: Any | None, weights: dict[str, torch.Tensor], dtype: str
) -> None:
    """Write one file that ComfyUI's own loaders read as a model of the InstructPix2Pix family, with MLP(.) and the
    conventions; completely or not at all.

    Args:
        mcdm: what the file has beside the UNet.
        path: where to write.
        model: MODEL of the InstructPix2Pix family.
        clip, vae: those of a whole checkpoint (Load Checkpoint), or None: the UNet alone (Load Diffusion Model).
        weights: trained weights that take the place of the model's, by keys of `model.model.state_dict()`.
        dtype: of all weights in the file but MLP(.)'s, which are float32: a key of FILE_DTYPES.

    Raises:
        IdentityEditError: when the file cannot be written.
    """
    tensors = checkpoint_tensors(model, clip, vae, weights, FILE_DTYPES[dtype])
    tensors |= {_PREFIX + name: value for name, value in mcdm.embedding.state_dict().items()}
    description = {
        "kind": KIND,
        "conventions": CONVENTIONS,
        "vision": dataclasses.asdict(mcdm.vision),
        "model": dataclasses.asdict(mcdm.model),
        "latent": list(mcdm.latent),
        "image_tokens": mcdm.embedding.image_tokens,
        "training": mcdm.training,
    }
    write_tensors(path, tensors, description)


def load_mcdm(path: str) -> MCDM:
    """Read what `save_mcdm` stores beside the UNet.

    Raises:
        IdentityEditError: when the file is missing, damaged, an ordinary checkpoint, or of other conventions.
    """
    try:
        tensors, description = read_tensors(path, KIND, _PREFIX)
    except IdentityEditError as error:
        raise IdentityEditError(f"{error} The checkpoints of Train MCDM hold one.") from error
    if description.get("conventions") != CONVENTIONS:
        raise IdentityEditError(
            f"The MCDM in {path} was trained with conventions that this version of the pack does not use; train it "
            f"again."
        )
    with parsing_file(path, "The MCDM in", "train it again"):
        vision = VisionTag.from_description(description["vision"])
        model = engine.ModelTag.from_description(description["model"])
        channels, height, width = (int(side) for side in description["latent"])
        training = checked_record(description["training"], ())
        if not isinstance(training.get("prompts") or [], list):
            raise TypeError("prompts is no list")
        context = tensors[_PREFIX + "project.weight"].shape[0]
        latent = (channels, height, width)
        with torch.inference_mode(False):  # it may be trained further
            own = {name.removeprefix(_PREFIX): value.float().clone() for name, value in tensors.items()}
        with torch.device("meta"):  # whatever sizes a file claims, no memory is taken for them
            embedding = ImageEmbedding(vision.tokens, vision.width, latent, context, int(description["image_tokens"]))
        embedding.load_state_dict(own, assign=True)
        return MCDM(embedding.requires_grad_(False), vision, model, latent, training)
