"""All scores of an edit: preservation of the source, prompt fidelity and subject identity.

`score_edit` computes the scores for which inputs and networks are available, each with its definition, direction and
source. The other modules of this package and `faces.similarity` implement them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.host import stop_if_interrupted
from ..faces.detection import FaceDetector, detect_faces
from ..faces.similarity import FaceRecognizer, embed_faces, similarities
from ..shared.errors import IdentityEditError
from . import pixels
from .aesthetic import AestheticPredictor, load_aesthetic_predictor
from .clip import ClipEmbedder, check_sizes, direction_similarity, open_clip_folder, text_similarity
from .definitions import DEFINITIONS, INSIDE, OUTSIDE, definition_of
from .features import NEEDED_DINO, NEEDED_DINOV2, ImageEncoder, Structure, cosines, open_encoder, open_structure
from .frechet import FEWEST, Inception, frechet_distance, kernel_distance, open_inception
from .inputs import ScoredImages, prompt_for_each
from .lpips import LpipsScorer, open_lpips

PLAIN, PIE_BENCH = "mean over the part", "PIE-Bench"
RULES = (PLAIN, PIE_BENCH)


@dataclass(frozen=True)
class Score:
    """One score of a batch of edits.

    Attributes:
        name: "LPIPS", "LPIPS outside", "CLIP-I (references)", ...
        values: float64 [B], one for each edited image, or [1] for scores of the whole set (FID, KID). NaN where a score
            is undefined, as for an empty region.
        higher_is_better: the direction; None inside the mask, where an edit should change the image.
        definition: one sentence.
        source: paper and section, or code.
    """

    name: str
    values: torch.Tensor
    higher_is_better: bool | None
    definition: str
    source: str

    @property
    def mean(self) -> float:
        """Mean over the images for which the score is defined; NaN if there is none."""
        return float(self.values.nanmean())


@dataclass(frozen=True)
class Networks:
    """Loaded networks, from `open_networks` or elsewhere; None omits the scores that need the network."""

    clip: ClipEmbedder | None = None
    dino: ImageEncoder | None = None
    dinov2: ImageEncoder | None = None
    structure: Structure | None = None
    lpips: LpipsScorer | None = None
    face_detector: FaceDetector | None = None
    face_recognizer: FaceRecognizer | None = None
    aesthetic: AestheticPredictor | None = None
    inception: Inception | None = None


@contextmanager
def open_networks(
    *,
    clip: str | ClipEmbedder | None = None,
    dino: str | None = None,
    dinov2: str | None = None,
    structure: str | None = None,
    lpips: str | None = None,
    face_detector: FaceDetector | None = None,
    face_recognizer: FaceRecognizer | None = None,
    aesthetic: str | None = None,
    inception: str | None = None,
) -> Iterator[Networks]:
    """Context manager for networks from local files, to score many edits with the same networks.

    The networks occupy device memory that ComfyUI does not manage, so make the edits first.

    Args:
        clip: folder of a CLIP (transformers), or an embedder such as `clip.SocketClip`.
        dino, dinov2, structure: folders of image encoders.
        lpips: key of `lpips.BACKBONES`.
        aesthetic, inception: names of `files.files`.
        face_detector, face_recognizer: from `faces.detection.load_detector` and `faces.similarity.load_recognizer`.

    Raises:
        IdentityEditError: naming the missing file and its folder.
    """
    with ExitStack() as opened:

        def opens(opener: Callable[..., Any], name: str | None, *arguments: str) -> Any:
            return None if name is None else opened.enter_context(opener(name, *arguments))

        yield Networks(
            clip=opens(open_clip_folder, clip) if isinstance(clip, str) else clip,
            dino=opens(open_encoder, dino, NEEDED_DINO),
            dinov2=opens(open_encoder, dinov2, NEEDED_DINOV2),
            structure=opens(open_structure, structure),
            lpips=opens(open_lpips, lpips),
            face_detector=face_detector,
            face_recognizer=face_recognizer,
            aesthetic=None if aesthetic is None else load_aesthetic_predictor(aesthetic),
            inception=opens(open_inception, inception),
        )


@torch.no_grad()
def score_edit(
    edited: torch.Tensor,
    source: torch.Tensor | None,
    *,
    mask: torch.Tensor | None = None,
    source_prompt: str | list[str] = "",
    target_prompt: str | list[str] = "",
    references: Sequence[torch.Tensor] | None = None,
    networks: Networks | None = None,
    rule: str = PLAIN,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """All scores for which inputs and networks are available.

    Args:
        edited: [B, H, W, 3], 0 to 1.
        source: source images of the same size: one for all, or one for each.
        mask: [B, H, W] or one for all, 1 where the edit may change the image; adds scores inside and outside the mask.
        source_prompt, target_prompt: one for all, or one for each; "" omits the scores that need it.
        references: images [h, w, 3] of the subject, of any sizes; each edited image is compared with all of them.
        networks: the loaded networks.
        rule: comparison of image regions, one of `RULES`; see `pixels`. "PIE-Bench" also computes the structure
            distance as its code does (see `Structure.distance`).
        progress: called with (scored images, total images).

    Returns:
        scores in the order of `definitions.DEFINITIONS`.

    Raises:
        IdentityEditError: for images, masks or prompts that do not fit together.
    """
    networks = networks or Networks()
    if rule not in RULES:
        raise IdentityEditError(f"rule is {rule!r}; choose one of {', '.join(RULES)}.")
    if networks.aesthetic is not None and networks.clip is None:
        raise IdentityEditError("The aesthetic predictor reads CLIP's embeddings; choose a clip too.")
    if (networks.face_detector is None) != (networks.face_recognizer is None):
        raise IdentityEditError(
            "ArcFace ID needs a face detector and a recognizer; connect Load Face Detector and choose a recognizer, or "
            "leave both out."
        )
    case = ScoredImages.of(edited, source, mask, references)
    source_prompts = prompt_for_each(source_prompt, case, "source_prompt")
    target_prompts = prompt_for_each(target_prompt, case, "target_prompt")
    prompts = {*source_prompts, *target_prompts} - {""}
    texts = {} if networks.clip is None else {text: networks.clip.texts([text]) for text in prompts}
    of_references = _of_references(case, networks)
    values: dict[str, list[float]] = {}
    for number in range(len(case.edited)):
        stop_if_interrupted()
        target, origin = texts.get(target_prompts[number]), texts.get(source_prompts[number])
        found = {
            **_image_scores(case, number, networks, rule),
            **_clip_scores(case, number, target, origin, of_references, networks),
            **_feature_scores(case, number, of_references, networks),
            **_identity_scores(case, number, of_references, networks),
        }
        for name, value in found.items():
            values.setdefault(name, []).append(value)
        if progress is not None:
            progress(number + 1, len(case.edited))
    if networks.inception is not None:
        values.update(_set_scores(case, networks.inception))
    return _in_order(values, networks, rule)


# -- computed once for all images ------------------------------------------------------------------------------------


def _of_references(case: ScoredImages, networks: Networks) -> dict[str, torch.Tensor]:
    """Embeddings of the references by each network, by its name in `Networks`."""
    if not case.references:
        return {}
    encoders = {
        "clip": None if networks.clip is None else networks.clip.images,
        "dino": networks.dino,
        "dinov2": networks.dinov2,
    }
    found = {name: encode(case.references) for name, encode in encoders.items() if encode is not None}
    if networks.face_recognizer is not None:
        faces = [_face_embedding(image, networks) for image in case.references]
        if with_face := [embedding for embedding in faces if embedding is not None]:
            found["face_recognizer"] = torch.cat(with_face)
    return found


# -- scores of one image ---------------------------------------------------------------------------------------------


def _image_scores(case: ScoredImages, number: int, networks: Networks, rule: str) -> dict[str, float]:
    """MSE, PSNR, SSIM, LPIPS and structure distance of the whole image, inside and outside the mask."""
    if case.source is None:
        return {}
    found: dict[str, float] = {}
    for part in ("",) if case.mask is None else ("", INSIDE, OUTSIDE):
        edited, source = case.edited[number : number + 1], case.source[number : number + 1]
        weights = case.weights(part, number)
        is_empty = weights is not None and not bool(weights.any())
        if weights is not None and rule == PIE_BENCH:
            edited, source = (pixels.multiplied(images, weights) for images in (edited, source))
            weights = None
        error = pixels.mean_squared_error(edited, source, weights)
        scores = {
            "MSE": error,
            "PSNR": pixels.psnr_of_error(error),
            "SSIM": pixels.ssim(edited, source, weights),
        }
        if networks.lpips is not None:
            scores["LPIPS"] = networks.lpips.distance(edited, source, weights)
        if networks.structure is not None and (not part or rule == PIE_BENCH):
            scores["structure distance"] = networks.structure.distance(edited, source, as_pie_bench=rule == PIE_BENCH)
        found |= {_of_part(name, part): torch.nan if is_empty else float(value) for name, value in scores.items()}
    return found


def _clip_scores(
    case: ScoredImages,
    number: int,
    target: torch.Tensor | None,
    origin: torch.Tensor | None,
    of_references: Mapping[str, torch.Tensor],
    networks: Networks,
) -> dict[str, float]:
    """CLIP-T, CLIP-I, CLIP-D and the aesthetic score."""
    if networks.clip is None:
        return {}
    clip = networks.clip
    image = clip.images([case.edited[number]])
    source = None if case.source is None else clip.images([case.source[number]])
    found: dict[str, float] = {}
    if target is not None:
        check_sizes(image, target, clip.name)
        found["CLIP-T"] = float(text_similarity(image, target))
        if case.mask is not None:
            weights = case.weights(INSIDE, number)
            assert weights is not None
            inside = clip.images([pixels.multiplied(case.edited[number : number + 1], weights)[0]])
            value = float(text_similarity(inside, target))
            found[_of_part("CLIP-T", INSIDE)] = value if bool(weights.any()) else torch.nan
    found |= _similarity("CLIP-I", image, source, of_references.get("clip"))
    if target is not None and origin is not None and source is not None:
        found["CLIP-D"] = float(direction_similarity(image, source, target, origin))
    if networks.aesthetic is not None:
        found["aesthetic score"] = float(networks.aesthetic.predict(image))
    return found


def _feature_scores(
    case: ScoredImages, number: int, of_references: Mapping[str, torch.Tensor], networks: Networks
) -> dict[str, float]:
    """DINO-I and DINOv2-I."""
    found: dict[str, float] = {}
    for name, network in (("DINO-I", "dino"), ("DINOv2-I", "dinov2")):
        encode = getattr(networks, network)
        if encode is not None:
            image = encode([case.edited[number]])
            source = None if case.source is None else encode([case.source[number]])
            found |= _similarity(name, image, source, of_references.get(network))
    return found


def _similarity(
    name: str, image: torch.Tensor, source: torch.Tensor | None, references: torch.Tensor | None
) -> dict[str, float]:
    """Cosine similarity to the source, and its mean over all references."""
    pairs = {f"{name} (source)": source, f"{name} (references)": references}
    return {key: float(cosines(image, other).mean()) for key, other in pairs.items() if other is not None}


def _identity_scores(
    case: ScoredImages, number: int, of_references: Mapping[str, torch.Tensor], networks: Networks
) -> dict[str, float]:
    """ArcFace ID to the source and to the most similar reference; 0 where the edited image has no face."""
    if networks.face_recognizer is None:
        return {}
    image = _face_embedding(case.edited[number], networks)
    others: dict[str, torch.Tensor | None] = {}
    if case.source is not None:
        others["ArcFace ID (source)"] = _face_embedding(case.source[number], networks)
    if case.references:
        others["ArcFace ID (references)"] = of_references.get("face_recognizer")
    found = {}
    for name, other in others.items():
        if other is None:
            found[name] = torch.nan
        else:
            found[name] = 0.0 if image is None else float(similarities(image, other).max())
    return found


def _face_embedding(image: torch.Tensor, networks: Networks) -> torch.Tensor | None:
    """Embedding [1, D] of the largest face, or None."""
    assert networks.face_detector is not None and networks.face_recognizer is not None
    faces = detect_faces(networks.face_detector, image)
    return embed_faces(networks.face_recognizer, [(image, faces[0])]) if faces else None


# -- scores of all images together -----------------------------------------------------------------------------------


def _set_scores(case: ScoredImages, inception: Inception) -> dict[str, list[float]]:
    """FID and KID to the references, or else to the sources; none if a set has fewer than FEWEST images."""
    others = case.references or ([] if case.source is None else list(case.source[: case.sources]))
    if min(len(case.edited), len(others)) < FEWEST:
        return {}
    first, second = inception.features(list(case.edited)), inception.features(others)
    return {
        "FID": [frechet_distance(first, second)],
        "KID": [kernel_distance(first, second)],
    }


def _in_order(values: dict[str, list[float]], networks: Networks, rule: str) -> list[Score]:
    """Scores with their definitions, in the order of `DEFINITIONS`."""
    scores = []
    for base, definition in DEFINITIONS.items():
        name_of_network = getattr(getattr(networks, definition.network, None), "name", None)
        for part in ("", INSIDE, OUTSIDE, "(source)", "(references)"):
            name = _of_part(base, part)
            if name in values:
                sentence = definition_of(base, part, name_of_network, is_pie_bench=rule == PIE_BENCH)
                is_better = definition.higher_is_better if part != INSIDE or base == "CLIP-T" else None
                found = torch.tensor(values[name], dtype=torch.float64)
                scores.append(Score(name, found, is_better, sentence, definition.source))
    return scores


def _of_part(name: str, part: str) -> str:
    return f"{name} {part}" if part else name
