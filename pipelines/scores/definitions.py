"""Definition, direction and source of each score of an edit."""

from __future__ import annotations

from typing import NamedTuple

INSIDE, OUTSIDE = "inside", "outside"
PLAIN_PARTS = "the mean over its pixels only"
PIE_BENCH_PARTS = "both images are multiplied by it and compared as a whole, as in PIE-Bench"


class Definition(NamedTuple):
    """A kind of score.

    Attributes:
        higher_is_better: the direction.
        text: the definition without its period; {other} stands for the images of the comparison.
        source: paper and section, or code.
        network: the attribute of `edit_scores.Networks` that computes it; "" for none.
        pie_bench: addition to the definition under PIE-Bench's rule.
    """

    higher_is_better: bool
    text: str
    source: str
    network: str = ""
    pie_bench: str = ""


PIE_BENCH_CODE = "PIE-Bench, evaluation/matrics_calculator.py (Ju et al. 2024)"
DEFINITIONS = {
    "MSE": Definition(
        False,
        "Mean squared difference of edited image and source over pixels and colors, 0 to 1",
        PIE_BENCH_CODE,
    ),
    "PSNR": Definition(
        True,
        "Peak signal-to-noise ratio in dB, -10 log10 of the mean squared error of images from 0 to 1",
        PIE_BENCH_CODE,
    ),
    "SSIM": Definition(
        True,
        "Mean structural similarity in Gaussian windows of 11 pixels and standard deviation 1.5, per color channel",
        "Wang et al. 2004, eq. 13",
    ),
    "LPIPS": Definition(
        False,
        "Distance of the features of edited image and source in a network, weighted by the linear heads of version "
        "0.1, over all layers",
        "Zhang et al. 2018, eq. 1",
        "lpips",
    ),
    "structure distance": Definition(
        False,
        "Mean squared difference of the self-similarities (cosines of the keys of DINO's last layer) of edited image "
        "and source, at 224 pixels along the shorter side",
        f"Tumanyan et al. 2022, structure loss; {PIE_BENCH_CODE}",
        "structure",
        "as in PIE-Bench's code, the network gets pixels from 0 to 255, resized without antialiasing",
    ),
    "CLIP-T": Definition(
        True,
        "Cosine of CLIP's embeddings of the edited image and the target prompt; PIE-Bench reports 100 times this",
        "Ruiz et al. 2023, section 4.1",
        "clip",
    ),
    "CLIP-I": Definition(
        True,
        "Cosine of CLIP's embeddings of the edited image and {other}",
        "Ruiz et al. 2023, section 4.1",
        "clip",
    ),
    "CLIP-D": Definition(
        True,
        "Cosine, in CLIP's space, of the change from source to edited image and the change from source to target "
        "prompt",
        "Gal et al. 2022, directional loss; Brooks et al. 2023, section 3.1.2",
        "clip",
    ),
    "DINO-I": Definition(
        True,
        "Cosine of DINO's class tokens of the edited image and {other}",
        "Ruiz et al. 2023, section 4.1",
        "dino",
    ),
    "DINOv2-I": Definition(
        True,
        "Cosine of DINOv2's class tokens of the edited image and {other}",
        "Ruiz et al. 2023, section 4.1, with the network of Oquab et al. 2024, as in Liu et al. 2024 (LIPE)",
        "dinov2",
    ),
    "ArcFace ID": Definition(
        True,
        "Cosine of the ArcFace embeddings of the largest faces of the edited image and {other}, 0 where the edited "
        "image has no face",
        "Deng et al. 2019; Gu et al. 2025 (PIDiff), section 3.2",
        "face_recognizer",
    ),
    "aesthetic score": Definition(
        True,
        "Prediction of LAION's predictor for CLIP's embedding of the edited image, about 1 to 10",
        "Schuhmann et al. 2022",
        "aesthetic",
    ),
    "FID": Definition(
        False,
        "Fréchet distance of the Inception features of the edited images and the references (or the sources without "
        "references); it is larger for few images, so compare equal numbers only",
        "Heusel et al. 2017, eq. 6",
        "inception",
    ),
    "KID": Definition(
        False,
        "Squared maximum mean discrepancy of the same features with a cubic kernel, unbiased, over all pairs",
        "Bińkowski et al. 2018, section 4",
        "inception",
    ),
}
"""Definitions by name, in the order of reports. Score names may have a suffix: "LPIPS outside", "CLIP-I (source)"."""


def definition_of(name: str, part: str, network: str | None, *, is_pie_bench: bool) -> str:
    """The definition of a score as one sentence.

    Args:
        name: key of `DEFINITIONS`.
        part: suffix of the score's name: "inside", "outside", "(source)", "(references)" or "".
        network: name of the network.
        is_pie_bench: whether PIE-Bench's rule is used.
    """
    definition = DEFINITIONS[name]
    is_of_references = part == "(references)"
    text = definition.text.format(other="of the references" if is_of_references else "of the source")
    if is_of_references:
        text += ", maximum over them" if definition.network == "face_recognizer" else ", mean over them"
    if network:
        text += f" ({network})"
    if part in (INSIDE, OUTSIDE):
        rule = PIE_BENCH_PARTS if is_pie_bench else PLAIN_PARTS
        text += f", {part} the mask: {'the image is multiplied by it' if definition.network == 'clip' else rule}"
    if is_pie_bench and definition.pie_bench:
        text += f"; {definition.pie_bench}"
    return f"{text}."
