"""What the editing benchmarks share: pairs of an image and its true edit, and how an edit is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from identity_edit_pack.demo_world.attributes import IDENTITY_OF, Attributes
from identity_edit_pack.demo_world.classifier import AttributeClassifier, classify, load_classifier
from identity_edit_pack.demo_world.renderer import render
from identity_edit_pack.pipelines.shared.conditioning import Conditioning
from PIL import Image
from skimage.metrics import structural_similarity

from .harness import RESULTS, markdown
from .orders import Cases
from .paper_scores import scores_of_edits

PAPER_SCORES = {
    "feature_similarity": "feature similarity",
    "feature_distance": "feature distance",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "clip_d": "CLIP-D",
}
"""The papers' own scores, by the demo world's encoders, with their headings."""


@dataclass(frozen=True)
class Pair:
    """An image and its true edit.

    Attributes:
        source, target: what the two images show.
        edited: the kind of edit: the attribute that changes, or those that do.
        before, after: the two images [128, 128, 3] in [0, 1].
        mask_before, mask_after: [128, 128] bool, the subject in them.
    """

    source: Attributes
    target: Attributes
    edited: str
    before: torch.Tensor
    after: torch.Tensor
    mask_before: torch.Tensor
    mask_after: torch.Tensor

    @property
    def background(self) -> torch.Tensor:
        """[128, 128] bool, outside of the subject in both."""
        return ~(self.mask_before | self.mask_after)


def render_pair(source: Attributes, target: Attributes, edited: str, seed: int) -> Pair:
    (before, mask_before), (after, mask_after) = (render(attributes, seed) for attributes in (source, target))
    return Pair(
        source=source,
        target=target,
        edited=edited,
        before=torch.from_numpy(before.copy()).float() / 255,
        after=torch.from_numpy(after.copy()).float() / 255,
        mask_before=torch.from_numpy(mask_before != 0),
        mask_after=torch.from_numpy(mask_after != 0),
    )


@torch.no_grad()
def embed(clip: Any, texts: list[str]) -> Conditioning:
    """One CONDITIONING with an embedding and a pooled output for each latent of a batch."""
    encoded = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in texts]
    embeddings, pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    return [[embeddings, {"pooled_output": pooled}]]


def mean_psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(((a - b) ** 2).mean().clamp(min=1e-10)))


def composite(images: torch.Tensor, edited: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The source's own pixels outside of the mask, as the stock ImageCompositeMasked does it."""
    m = torch.nn.functional.interpolate(mask[:, None], size=images.shape[1:3], mode="bilinear")[:, 0, ..., None]
    return edited * m + images * (1.0 - m)


def score_each(classifier: AttributeClassifier, images: torch.Tensor, pairs: list[Pair]) -> list[dict[str, Any]]:
    """For each pair: whether the classifier sees the edit done and the identity kept, PSNR of the background and of the
    whole image against the source image, and SSIM against the true edit."""
    answers = classify(classifier, images)
    rows = []
    for index, (image, pair) in enumerate(zip(images, pairs, strict=True)):
        sees = {head: values[int(answers[head][index])] for head, values in classifier.choices.items()}
        changed = [head for head in sees if getattr(pair.source, head) != getattr(pair.target, head)]
        done = all(sees[head] == getattr(pair.target, head) for head in changed)
        kept = all(sees[head] == getattr(pair.target, head) for head in IDENTITY_OF["figure"])
        rows.append(
            {
                "edit_done": done,
                "identity_kept": kept,
                "edit_done_and_identity_kept": done and kept,
                "background_psnr_db": mean_psnr(image[pair.background], pair.before[pair.background]),
                "psnr_to_source_db": mean_psnr(image, pair.before),
                "ssim_to_true_edit": structural_similarity(
                    image.numpy(), pair.after.numpy(), channel_axis=2, data_range=1
                ),
            }
        )
    return rows


def score_edits(
    images: torch.Tensor,
    pairs: list[Pair],
    prompts: list[str],
    sources: list[str],
    classifier: AttributeClassifier | None = None,
) -> list[dict[str, Any]]:
    """`score_each`, whether an edit of its kind is done, and the papers' own scores.

    Args:
        prompts, sources: for each pair, the target and the source prompt.
        classifier: the demo world's by default.
    """
    seen = score_each(classifier or load_classifier(), images, pairs)
    papers = scores_of_edits(images, torch.stack([pair.before for pair in pairs]), prompts, sources)
    return [
        {**row, f"{pair.edited}_done": row["edit_done"], **scores}
        for row, scores, pair in zip(seen, papers, pairs, strict=True)
    ]


def shown(key: str, value: float) -> str:
    """A figure as a table has it."""
    return f"{value:.1f} dB" if key.endswith("_db") else f"{value:.3f}"


def report_table(report: dict[str, dict[str, float]], columns: dict[str, str]) -> list[str]:
    """A row for each of the report's, columns by their keys with their headings."""
    rows = ((name, *(shown(key, row[key]) for key in columns)) for name, row in report.items())
    return markdown(("", *columns.values()), rows)


def edits_table(report: dict[str, Any], more: dict[str, str]) -> list[str]:
    """Of mean scores by method, with more columns."""
    kinds = [key[:-5] for key in next(iter(report.values())) if key.endswith("_done") and key != "edit_done"]
    rows = []
    for name, row in report.items():
        by_kind = " / ".join(f"{row[f'{kind}_done']:.2f}" for kind in kinds)
        kept = (f"{row[key]:.2f}" for key in ("identity_kept", "edit_done_and_identity_kept"))
        scores = (shown(key, row[key]) for key in ("background_psnr_db", *more, "ssim_to_true_edit"))
        rows.append((name, f"{row['edit_done']:.2f}", by_kind, *kept, *scores))
    titles = "identity kept", "both", "background PSNR", *more.values(), "SSIM to true edit"
    return markdown(("method", "edit done", " / ".join(kinds), *titles), rows)


class Sheet:
    """Images of a table's rows, saved as its cases are measured; a run that goes on leaves the sheet of the first."""

    def __init__(self, cases: Cases) -> None:
        self._path, self._is_whole = RESULTS / f"{cases.name}.jpg", cases.left == cases.units
        self._rows: dict[str, list[torch.Tensor]] = {}

    def add(self, rows: Mapping[str, torch.Tensor]) -> None:
        """The next images [n, H, W, 3] of every row."""
        for row, images in rows.items():
            self._rows.setdefault(row, []).append(images)
        if self._is_whole:
            save_sheet(self._path, [torch.cat(row) for row in self._rows.values()])


def save_sheet(path: Path, rows: list[torch.Tensor], columns: int = 12) -> None:
    """The first pairs of the run, as they came: a row for each method."""
    sheet = torch.cat([torch.cat(list(row[:columns]), dim=1) for row in rows])
    Image.fromarray((sheet.clamp(0, 1) * 255).round().to(torch.uint8).numpy()).save(path, quality=90)
