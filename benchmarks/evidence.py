"""Each paper's published tables beside ours in small: `python -m benchmarks evidence` writes docs/evidence.md.

The page is made of the tables in the benchmarks of the papers' claims and of the figures in benchmarks/results; measure
those again first.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from . import hifi_tuner, lipe_edit, portrait_edit, style_identity, timestep_aware_edit
from .harness import ROOT, markdown, read_results
from .orders import FEWEST, Published, orders_table

PAGE = ROOT / "docs" / "evidence.md"


@dataclass(frozen=True)
class Paper:
    """A paper's part of the page.

    Attributes:
        title: authors, year and method.
        module: the benchmark.
        result: the name of its results.
        notes: reasons that were found, and what is left out.
        harder: the name of its results in the harder world, if it was measured there; the benchmark's `HARDER_CLAIMS`.
    """

    title: str
    module: ModuleType
    result: str
    notes: tuple[str, ...]
    harder: str = ""


NO_DREAMBOOTH = (
    '{} here changes the attention layers, in the paper all weights: those fit the caption "a sks cat" and draw '
    "another cat for prompts that say more (tried on one subject, learning rates 1e-5 to 3e-4)."
)
PAPERS = (
    Paper(
        "Liu et al. 2024 (LIPE)",
        lipe_edit,
        "lipe_edit",
        (
            "The user study of table 1 stands beside what the attribute classifier and the true background say.",
            "MyStyle is not measured: it is no diffusion model.",
            "Every method but Imagic does nearly every edit here, so orders of *editing* cannot show. Imagic leaves "
            "most edits of pose and facing undone, and an image that has not changed has the source's features.",
            "In the harder world the editing scores stand in the paper's order, with Imagic last; the differences "
            "between the others are within what chance explains.",
            NO_DREAMBOOTH.format("DreamCtrl"),
        ),
        harder="lipe_edit_harder",
    ),
    Paper(
        "Wang et al. 2023 (HiFi Tuner)",
        hifi_tuner,
        "hifi_tuner",
        (
            "*+ regularization* also turns word vectors into rows of the text embedding, with another learning rate, "
            "so its row shows more than the regularization, which has its default weight of 1e-6. "
            "[embedding_tie.md](../benchmarks/results/embedding_tie.md) has the regularization alone, "
            "[embedding_tie_harder.md](../benchmarks/results/embedding_tie_harder.md) in the harder world: it changes "
            "nothing there either, for subjects are learned without their place with and without it.",
            "The classifier sees nearly all that the prompts ask in every row, so that score cannot show what a "
            "technique does to prompt fidelity. Nor can CLIP-T: the renderer's images show exactly what the prompts "
            "ask and have less of it (0.699) than every row, so a row that falls toward them is not worse.",
            "In the harder world no row follows more than 23 % of the prompts whole. Its text orders are those of the "
            "paper's CLIP-T, by the share of what a prompt asks.",
            NO_DREAMBOOTH.format("DreamBooth"),
            "Algorithm 3 has its own table: "
            "[subject_replacement.md](../benchmarks/results/subject_replacement.md).",
        ),
        harder="hifi_tuner_harder",
    ),
    Paper(
        "Jung et al. 2024 (timestep-aware sampling)",
        timestep_aware_edit,
        "timestep_aware_edit",
        (
            "The paper prints no table: the orders are those of its figures. Figure 6 compares at equal LPIPS over "
            "many settings; here each method has one setting, and both scores. Of Imagic the paper says that its CLIP "
            "score is the lowest at every LPIPS; injection at 40 % has about its feature distance here. The aesthetic "
            "score has no counterpart.",
            "DDIM is sampled with guidance scale 1, as in the paper. The demo checkpoint follows captions at that "
            "scale except for poses, so null-text inversion has little to add in this world.",
            "Injection is not meant to raise *edit done*: its rows say how many edits it costs.",
            "DDS is not measured.",
        ),
    ),
    Paper(
        "Chen et al. 2024 (MCDM)",
        portrait_edit,
        "portrait_edit",
        (
            "The paper has one column for each of its two sets of pairs, costumes and expressions; ours holds both "
            "kinds of edit and stands beside both. Scales 3, 3, 4, kernel 3 and threshold 0.2 here, 3, 3, 5, kernel 5 "
            "and thresholds 0.2 and 0.35 in the paper.",
            "*Pasted* rows have the source's pixels outside the mask, which is the pack's addition; the paper's rows "
            "are those without.",
            "Without pasting, prompt-to-prompt keeps more of the portrait here, and DiffEdit has a higher SSIM but "
            "keeps the identity less often: both begin from an almost exact inversion, while MCDM draws the whole "
            "portrait anew, learned from 486 pairs in 2,200 steps (69,900 pairs and 200,000 steps in the paper). "
            "Pasted, it is ahead of DiffEdit and SDEdit and level with prompt-to-prompt by SSIM and feature distance.",
            "An MCDM trained without the image embedding does as well here: 16x16 latent pixels of the spatial "
            "condition say all that a drawn face has. Without the spatial condition it keeps fewer identities.",
            "MCDM *without* a condition has the condition's null value, by weights trained with it; *trained without* "
            "is the paper's. Training from scratch, pix2pix-zero, SPADE and BBDM are not measured.",
            "FID's counterpart, the Fréchet distance of the classifier's features, belongs to a whole row and has no "
            "interval.",
        ),
    ),
    Paper(
        "Gu et al. 2025 (PIDiff)",
        style_identity,
        "style_identity",
        (
            "The paper's DreamBooth stands beside the identity prior, which trains attention layers alone.",
            "Lambda 0.4 keeps nobody in the demo world; the person appears from 0.6 and is kept best at 1, where the "
            "text is still followed.",
            "CLIP-T cannot show here what a method does to prompt fidelity: the renderer's images show exactly what "
            "the prompts ask and have 0.595, as much as style cross-attention and less than the other rows, and it is "
            "highest where the person is lost. By the classifier all rows follow the text (0.97 to 1.00).",
            "People that no attention was trained on, and mixes of two, have their own table: "
            "[style_mixing.md](../benchmarks/results/style_mixing.md).",
            "Custom Diffusion, BLIP-Diffusion, ViCo, IP-Adapter and W+ adapter are not part of the pack.",
        ),
    ),
)  # fmt: skip


def beside(table: Published, rows: dict[str, Any]) -> list[str]:
    """A published table with our figure beside each of its own."""
    headings = [cell for title in table.scores for cell in (title, "here")]
    lines = []
    for row, values in table.values.items():
        here = [rows.get(row, {}).get(score) for score in table.scores.values()]
        pairs = zip(values, here, strict=True)
        cells = [
            cell
            for published, own in pairs
            for cell in ("-" if published is None else f"{published:g}", "-" if own is None else f"{own:.3f}")
        ]
        lines.append((row, *cells))
    return markdown(("", *headings), lines)


def part_of(paper: Paper) -> list[str]:
    figures, module = read_results(paper.result), paper.module
    lines = [
        "",
        f"## {paper.title}",
        "",
        f"[{paper.result}.md](../benchmarks/results/{paper.result}.md) by `{figures['command']}` at commit "
        f"{figures['commit']}.",
    ]
    for table in module.PUBLISHED:
        lines += ["", f"{table.name}:", "", *beside(table, figures["rows"])]
    claims = [*(claim for table in module.PUBLISHED for claim in table.claims()), *module.CLAIMS]
    lines += ["", "Order by order:", "", *orders_table(claims, figures)]
    if paper.harder:
        lines += in_the_harder_world(paper)
    return [*lines, "", *(f"- {note}" for note in paper.notes)]


def in_the_harder_world(paper: Paper) -> list[str]:
    figures = read_results(paper.harder)
    return [
        "",
        f"In the harder world, [{paper.harder}.md](../benchmarks/results/{paper.harder}.md) by `{figures['command']}` "
        f"at commit {figures['commit']}:",
        "",
        *orders_table(paper.module.HARDER_CLAIMS, figures),
    ]


def page() -> str:
    """The text of docs/evidence.md."""
    lines = [
        "# The papers' tables, order by order",
        "",
        "`python -m benchmarks evidence` writes this page from `benchmarks/results`. The papers measure photographs "
        "with published networks. The demo world is measured with its own networks, so its figures are not comparable "
        "with the papers'; only orders are. CLIP-I, CLIP-T and CLIP-D are those of the demo world's CLIP; *feature "
        "similarity* (in place of DINO's) and *feature distance* (in place of LPIPS) are those of its attribute "
        "classifier, which also decides *edit done* and *identity kept*. CLIP-T of a perfect image is that of the "
        "renderer's row in each table, not 1.",
        "",
        f"Where fewer than {FEWEST} independent groups differ, an order is *open*. Otherwise it is *seen* where the "
        "95 % bootstrap interval of the paired difference lies above 0 in the paper's direction, *not seen* where it "
        "lies below 0 or below a gain that counts as none (0.1 dB, 0.002 of CLIP's scores, 0.005 of features, 0.01 of "
        "all others), and *open* else. Images whose subject shares a training are one group.",
        "",
        "The demo checkpoint does nearly all that prompts and edits ask, whatever the method. In the "
        "[harder world](demo-world.md#the-harder-world) it does not: subjects may be small and stand beside an object, "
        "some words are rare, prompts name everything at once and half of them compose what was never trained, and an "
        "edit also puts a rare costume on. Its own attribute classifier scores it; the other encoders do not know it.",
    ]
    for paper in PAPERS:
        lines += part_of(paper)
    return "\n".join(lines) + "\n"


def main(arguments: argparse.Namespace) -> None:
    PAGE.write_text(page(), encoding="utf-8")
