"""Does timestep-aware injection keep more and still edit? `.venv/bin/python benchmarks/timestep_aware_edit.py`.

Non-rigid edits (pose, expression, costume) of pictures of subjects that the demo checkpoint has never seen, by every
stage of Jung et al. 2024: DDIM inversion with the target prompt, null-text inversion with the target prompt, text
optimisation added, and timestep-aware injection at 10, 20 and 40 % added. The renderer knows the true edit, so that the
background is what lies outside the subject in both pictures. Scores: share of edits that the attribute classifier sees,
share of pictures whose species, color and pattern it all sees kept, PSNR of the background and of the whole picture
against the source picture, SSIM against the true edit.
Writes benchmarks/results/timestep_aware_edit.json, .md, .png (the trade-off) and .jpg (the first pairs, as they came).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

import load_pack  # noqa: E402  (found on the path that was extended just above)

RESULTS = ROOT / "benchmarks" / "results"
RATIOS = (0.1, 0.2, 0.4)
EDITED = ("pose", "expression", "costume")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=102, help="(picture, edit) pairs, a third of each kind")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default 50)")
    parser.add_argument("--guidance-scale", type=float, default=7.5, help="of null-text and sampling (default 7.5)")
    parser.add_argument("--eta", type=float, default=0.7, help="interpolation towards the target prompt (default 0.7)")
    parser.add_argument("--batch", type=int, default=17, help="pictures at once")
    parser.add_argument("--seed", type=int, default=0, help="draws the pairs")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "demo_world/weights/identity-edit-demo.safetensors")
    arguments = parser.parse_args()

    load_pack.prepare_engine(cpu=not load_pack.cuda_is_available())
    load_pack.load_pack()
    import comfy.sd
    import numpy as np
    import torch
    from identity_edit_pack.demo_world import family
    from identity_edit_pack.demo_world.attributes import (
        ATTRIBUTES_OF,
        IDENTITY_OF,
        Attributes,
        caption,
        random_attributes,
    )
    from identity_edit_pack.demo_world.classifier import classify, load_classifier
    from identity_edit_pack.demo_world.pictures import EVALUATION_SEED, HEADS
    from identity_edit_pack.demo_world.renderer import render
    from identity_edit_pack.pipelines.inversion import ddim_inversion, ddim_sampling
    from identity_edit_pack.pipelines.null_text import null_text_optimization
    from identity_edit_pack.pipelines.text_injection import edit_conditioning, timestep_aware_sampling
    from identity_edit_pack.pipelines.text_optimization import optimize_text_embedding
    from matplotlib import pyplot
    from PIL import Image
    from skimage.metrics import structural_similarity
    from tqdm import tqdm

    family.register()
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(arguments.checkpoint))
    classifier = load_classifier()

    def draw_pair(index: int) -> tuple[Attributes, Attributes, str, int]:
        """Source, true edit, the attribute that changes, render seed."""
        generator = random.Random(f"pair {arguments.seed} {index}")
        source = random_attributes(generator, "figure", held_out=True)
        edited = EDITED[index % len(EDITED)]
        if edited == "costume":
            source = source.replace(costume="none")
        others = [choice for choice in ATTRIBUTES_OF["figure"][edited] if choice != getattr(source, edited)]
        return source, source.replace(**{edited: generator.choice(others)}), edited, EVALUATION_SEED + 7_000_000 + index

    def picture(attributes: Attributes, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        shown, mask = render(attributes, seed)
        return torch.from_numpy(np.array(shown)).float() / 255, torch.from_numpy(np.array(mask)) > 0

    @torch.no_grad()
    def embed(texts: list[str]) -> list:
        return [[torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in texts]), {}]]

    pairs = [draw_pair(index) for index in range(arguments.pairs)]
    made: dict[str, list[torch.Tensor]] = {}
    begin = time.perf_counter()
    for start in tqdm(range(0, len(pairs), arguments.batch), unit="batch"):
        chosen = pairs[start : start + arguments.batch]
        sources = torch.stack([picture(source, seed)[0] for source, _, _, seed in chosen])
        with torch.no_grad():
            latent = vae.encode(sources)
        source = embed([caption(pair[0]) for pair in chosen])
        target = embed([caption(pair[1]) for pair in chosen])
        empty = embed([""])
        scale = arguments.guidance_scale

        inversion = ddim_inversion(model, latent, source, steps=arguments.steps)
        null_text = null_text_optimization(model, inversion, source, empty, guidance_scale=scale)
        pivot = inversion.with_embeddings(null_text.embeddings)
        optimized = [[optimize_text_embedding(model, latent, target).embedding, {}]]
        edit = edit_conditioning(target, optimized, arguments.eta)
        latents = {
            "source picture, autoencoder only": latent,
            "null-text reconstruction": null_text.reconstruction,
            "DDIM + target": ddim_sampling(model, inversion.start_latent(model), inversion.schedule, target),
            "null-text + target": timestep_aware_sampling(model, pivot, source, target, None, 0.0, scale).latent,
            "+ text optimisation": timestep_aware_sampling(model, pivot, source, edit, None, 0.0, scale).latent,
        }
        for ratio in RATIOS:
            name = f"+ injection {ratio:.0%}".replace("%", " %")
            latents[name] = timestep_aware_sampling(model, pivot, source, edit, None, ratio, scale).latent
        for name, value in latents.items():
            with torch.no_grad():
                made.setdefault(name, []).append(vae.decode(value).cpu())
    seconds = time.perf_counter() - begin

    truth = [picture(target, seed) for _, target, _, seed in pairs]
    before = [picture(source, seed) for source, _, _, seed in pairs]
    columns = {name: torch.cat(parts) for name, parts in made.items()}
    columns["true edit (renderer)"] = torch.stack([shown for shown, _ in truth])

    def mean_psnr(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(-10 * torch.log10(((a - b) ** 2).mean().clamp(min=1e-10)))

    report: dict[str, dict[str, Any]] = {}
    for name, shown in columns.items():
        answers = classify(classifier, shown)
        done, kept, background, whole, similar = [], [], [], [], []
        for index, (_, wanted, edited, _) in enumerate(pairs):
            sees = {head: HEADS[head][int(answers[head][index])] for head in HEADS}
            done.append(sees[edited] == getattr(wanted, edited))
            kept.append(all(sees[head] == getattr(wanted, head) for head in IDENTITY_OF["figure"]))
            outside = ~(truth[index][1] | before[index][1])
            background.append(mean_psnr(shown[index][outside], before[index][0][outside]))
            whole.append(mean_psnr(shown[index], before[index][0]))
            similar.append(
                structural_similarity(shown[index].numpy(), truth[index][0].numpy(), channel_axis=2, data_range=1)
            )
        by_kind = {
            kind: float(np.mean([d for d, pair in zip(done, pairs, strict=True) if pair[2] == kind])) for kind in EDITED
        }
        report[name] = {
            "edit_done": float(np.mean(done)),
            "edit_done_by_kind": by_kind,
            "identity_kept": float(np.mean(kept)),
            "edit_done_and_identity_kept": float(np.mean([d and k for d, k in zip(done, kept, strict=True)])),
            "background_psnr_db": float(np.mean(background)),
            "psnr_to_source_db": float(np.mean(whole)),
            "ssim_to_true_edit": float(np.mean(similar)),
        }

    commit = load_pack.source_commit()
    command = "benchmarks/timestep_aware_edit.py " + " ".join(sys.argv[1:])
    lines = [
        "# Timestep-aware text injection on unseen subjects of the demo world",
        "",
        f"`{command.strip()}` at commit {commit}: {len(pairs)} pairs, DDIM {arguments.steps} steps, guidance scale "
        f"{arguments.guidance_scale}, eta {arguments.eta}, 200 steps of text optimisation, seed {arguments.seed}; "
        f"{seconds / 60:.0f} minutes. DDIM + target is sampled with guidance scale 1, as in the paper.",
        "",
        "| method | edit done | pose / expression / costume | identity kept | both | background PSNR | "
        "PSNR to source | SSIM to true edit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report.items():
        kinds = " / ".join(f"{row['edit_done_by_kind'][kind]:.2f}" for kind in EDITED)
        lines.append(
            f"| {name} | {row['edit_done']:.2f} | {kinds} | {row['identity_kept']:.2f} | "
            f"{row['edit_done_and_identity_kept']:.2f} | {row['background_psnr_db']:.1f} dB | "
            f"{row['psnr_to_source_db']:.1f} dB | {row['ssim_to_true_edit']:.3f} |"
        )

    RESULTS.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, row in report.items():
        if "+" in name:
            axes.scatter(row["background_psnr_db"], row["edit_done"])
            axes.annotate(
                name, (row["background_psnr_db"], row["edit_done"]), xytext=(5, 4), textcoords="offset points"
            )
    axes.set_xlabel("background PSNR against the source picture [dB]")
    axes.set_ylabel("share of edits done")
    axes.set_title(f"{len(pairs)} edits of unseen subjects")
    axes.margins(0.2)
    figure.tight_layout()
    figure.savefig(RESULTS / "timestep_aware_edit.png", dpi=120)
    rows = [torch.cat([shown for shown, _ in before[:12]], dim=1)]
    rows += [torch.cat(list(shown[:12]), dim=1) for shown in columns.values()]
    sheet = (torch.cat(rows).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(sheet).save(RESULTS / "timestep_aware_edit.jpg", quality=90)
    everything = {"command": command, "commit": commit, "pairs": len(pairs), "seconds": seconds, "methods": report}
    texts = {"timestep_aware_edit.json": json.dumps(everything, indent=2), "timestep_aware_edit.md": "\n".join(lines)}
    for name, text in texts.items():
        temporary = RESULTS / (name + ".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, RESULTS / name)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
