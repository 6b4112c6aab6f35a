"""How good the demo world is: `.venv/bin/python benchmarks/demo_world.py`.

Scores, by the committed attribute classifier, clean renders (how far it can be trusted), the autoencoder's
reconstructions of them (the ceiling of everything the demo checkpoint makes) and pictures sampled for captions drawn at
random, with DDIM and the best of a few guidance scales. The checkpoint is loaded and sampled by ComfyUI's own code.
Writes benchmarks/results/demo_world.json, demo_world.md and two sheets of pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

import load_pack  # noqa: E402  (found on the path that was extended just above)

RESULTS = ROOT / "benchmarks" / "results"
GUIDANCE_SCALES = (2.0, 3.5, 5.0, 7.5)
# What issue-free use of the demo world needs, as shares of right answers.
GOALS = {
    "place": 0.95,
    "pose": 0.95,
    "species": 0.90,
    "color": 0.90,
    "costume": 0.90,
    "facing": 0.80,
    "pattern": 0.80,
    "expression": 0.80,
}
RENDER_GOAL = 0.97
PSNR_GOAL = 26.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=500, help="captions to sample (default 500)")
    parser.add_argument("--tuning", type=int, default=100, help="captions on which the guidance scale is chosen")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default 50)")
    parser.add_argument("--batch", type=int, default=20, help="pictures sampled at once (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="draws the captions and the noise (default 0)")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "demo_world/weights/identity-edit-demo.safetensors")
    arguments = parser.parse_args()

    load_pack.prepare_engine(cpu=not load_pack.cuda_is_available())
    load_pack.load_pack()
    import comfy.sample
    import comfy.sd
    import numpy as np
    import torch
    from identity_edit_pack.demo_world import family
    from identity_edit_pack.demo_world.attributes import CAPTION_TEMPLATES, Attributes, caption
    from identity_edit_pack.demo_world.classifier import classify, load_classifier
    from identity_edit_pack.demo_world.pictures import HEADS, evaluation_set, labels_of
    from identity_edit_pack.demo_world.renderer import render
    from PIL import Image
    from skimage.metrics import peak_signal_noise_ratio
    from tqdm import tqdm

    family.register()
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(arguments.checkpoint))
    classifier = load_classifier()

    def shares(pictures: torch.Tensor, truth: list[Attributes]) -> dict[str, float]:
        """Share of right answers for every attribute, over the pictures whose framing shows it."""
        answers = classify(classifier, pictures)
        labels = torch.tensor([labels_of(attributes) for attributes in truth])
        result = {}
        for index, name in enumerate(HEADS):
            shown = labels[:, index] >= 0
            result[name] = float((answers[name].cpu() == labels[:, index])[shown].float().mean())
        return result

    @torch.no_grad()
    def embed(texts: list[str]) -> torch.Tensor:
        return torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in texts])

    @torch.no_grad()
    def sample(pairs: list[tuple[Attributes, int]], guidance_scale: float) -> torch.Tensor:
        """One picture [128, 128, 3] for each caption; its noise is drawn from its own seed."""
        made = []
        for start in tqdm(range(0, len(pairs), arguments.batch), desc=f"guidance {guidance_scale}", unit="batch"):
            chosen = pairs[start : start + arguments.batch]
            texts = [caption(attributes, seed % CAPTION_TEMPLATES) for attributes, seed in chosen]
            latents = torch.zeros(len(chosen), 4, 16, 16)
            noise = torch.stack(
                [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for _, seed in chosen]
            )
            latents = comfy.sample.sample(
                model,
                noise,
                arguments.steps,
                guidance_scale,
                "ddim",
                "ddim_uniform",
                [[embed(texts), {}]],
                [[embed([""]), {}]],
                latents,
                disable_pbar=True,
            )
            made.append(vae.decode(latents).cpu())
        return torch.cat(made)

    pairs = evaluation_set(arguments.captions, seed=arguments.seed)
    truth = [attributes for attributes, _ in pairs]
    renders = torch.stack([torch.from_numpy(np.array(render(*pair)[0])) for pair in pairs]).float() / 255
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(chunk)).cpu() for chunk in renders.split(arguments.batch)])
    quality = [
        peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1) for a, b in zip(renders, decoded, strict=True)
    ]

    tuning = evaluation_set(arguments.tuning, seed=arguments.seed + 1)
    tuning_truth = [attributes for attributes, _ in tuning]
    tried = {
        scale: sum(shares(sample(tuning, scale), tuning_truth)[name] for name in GOALS) / len(GOALS)
        for scale in GUIDANCE_SCALES
    }
    best = max(tried, key=lambda scale: tried[scale])
    samples = sample(pairs, best)

    columns = {
        "renders": shares(renders, truth),
        "reconstructions": shares(decoded, truth),
        "samples": shares(samples, truth),
    }
    commit = load_pack.source_commit()
    report = {
        "command": "benchmarks/demo_world.py " + " ".join(sys.argv[1:]),
        "commit": commit,
        "seed": arguments.seed,
        "captions": arguments.captions,
        "steps": arguments.steps,
        "guidance_scale": best,
        "mean_share_by_guidance_scale": tried,
        "autoencoder_psnr_db": sum(quality) / len(quality),
        "shares": columns,
    }
    lines = [
        "# The demo world, scored by its attribute classifier",
        "",
        f"`{report['command'].strip()}` at commit {commit}: {arguments.captions} captions drawn at random (seed "
        f"{arguments.seed}), DDIM {arguments.steps} steps, guidance scale {best} (the best of "
        f"{', '.join(str(scale) for scale in GUIDANCE_SCALES)} on {arguments.tuning} other captions).",
        "",
        f"Autoencoder: {report['autoencoder_psnr_db']:.2f} dB on the renders (goal {PSNR_GOAL} dB).",
        "",
        f"| attribute | renders (goal {RENDER_GOAL:.2f}) | reconstructions | samples | goal for samples | reached |",
        "|---|---|---|---|---|---|",
    ]
    for name in HEADS:
        goal = GOALS.get(name)
        reached = "" if goal is None else "yes" if columns["samples"][name] >= goal else "no"
        cells = " | ".join(f"{columns[column][name]:.3f}" for column in columns)
        lines.append(f"| {name.replace('_', ' ')} | {cells} | {'' if goal is None else f'{goal:.2f}'} | {reached} |")

    def sheet(name: str, rows: list[torch.Tensor]) -> None:
        """The first pictures of the run, as they came."""
        strips = [torch.cat(list(row[:12]), dim=1) for row in rows]
        picture = (torch.cat(strips) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(picture).save(RESULTS / name, quality=90)

    RESULTS.mkdir(parents=True, exist_ok=True)
    sheet("demo_world_reconstructions.jpg", [renders[:12], decoded[:12], renders[12:24], decoded[12:24]])
    sheet("demo_world_samples.jpg", [samples[start : start + 12] for start in range(0, 48, 12)])
    for name, text in (("demo_world.json", json.dumps(report, indent=2)), ("demo_world.md", "\n".join(lines))):
        temporary = RESULTS / (name + ".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, RESULTS / name)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
