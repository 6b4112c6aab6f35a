"""Training an identity prior against a plain loop: `.venv/bin/python benchmarks/identity_prior_training.py`.

Both train the same attention weights of the demo checkpoint on the same batches with the same draws: the pack's
`train_identity_prior`, and a loop as diffusers' DreamBooth script has it, which calls the same UNet and text encoder
modules directly, with `requires_grad` on the same weights, and torch's AdamW. That both do the same work is checked:
their losses must agree. The runs alternate, each two of them a pair; given are medians over the pairs, of the median
step of each run and of the two's ratio (what else a machine does changes slower than pairs do), and the highest memory
of a process that does one run of one of them alone. Writes benchmarks/results/identity_prior_training.json and .md.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

import load_pack  # noqa: E402  (found on the path that was extended just above)

load_pack.prepare_engine(cpu=not load_pack.cuda_is_available())
load_pack.load_pack()

import comfy.model_management  # noqa: E402  (ComfyUI and the pack, found now that they are prepared)
import comfy.sd  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from identity_edit_pack.demo_world import family  # noqa: E402
from identity_edit_pack.demo_world.attributes import Attributes, caption, random_attributes  # noqa: E402
from identity_edit_pack.demo_world.renderer import render  # noqa: E402
from identity_edit_pack.pipelines import engine, identity_prior, training_pictures  # noqa: E402
from identity_edit_pack.pipelines.training import TrainingSettings, generator_of  # noqa: E402
from identity_edit_pack.pipelines.training_pictures import TrainingPictures  # noqa: E402
from report import write_results  # noqa: E402
from tqdm import tqdm  # noqa: E402

PACK, PLAIN = "Train Identity Prior", "plain loop"
GOAL = 1.0
"""Steps a second of the pack relative to the plain loop's."""
WARM_UP = 2
"""Steps of every run that are not counted."""
SETTINGS = identity_prior.PriorSettings(token="sks", class_word="cat", precision="float32", file_dtype="float32")

Sets = tuple[TrainingPictures, TrainingPictures]
Outcome = tuple[list[float], list[float]]
"""Seconds and loss of every step."""


def draw_sets(vae: Any, seed: int) -> Sets:
    """Four pictures of one held-out cat, sixteen of other cats."""
    generator = random.Random(seed)
    subject = random_attributes(generator, "figure", held_out=True)
    while subject.species != SETTINGS.class_word:
        subject = random_attributes(generator, "figure", held_out=True)
    poses = ("standing", "sitting", "lying", "standing")
    places = ("grass", "room", "snow", "night")
    of_subject = [subject.replace(pose=pose, place=place) for pose, place in zip(poses, places, strict=True)]
    others = [random_attributes(generator, "figure").replace(species=SETTINGS.class_word) for _ in range(16)]

    def encode(pictures: list[Attributes], captions: list[str]) -> TrainingPictures:
        drawn = [torch.from_numpy(np.array(render(one, seed + i)[0])) for i, one in enumerate(pictures)]
        return training_pictures.encode_pictures(vae, [picture.float() / 255 for picture in drawn], captions)

    name = caption(subject).split(f" {SETTINGS.class_word}")[0]
    called = [caption(one).replace(name, "a sks") for one in of_subject]
    return encode(of_subject, called), encode(others, [caption(one) for one in others])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def by_pack(model: Any, clip: Any, sets: Sets, settings: TrainingSettings) -> Outcome:
    ends: list[float] = []

    def progress(*_: Any) -> None:
        synchronize()
        ends.append(time.perf_counter())

    with torch.inference_mode():  # as in ComfyUI
        _, run = identity_prior.train_identity_prior(model, clip, *sets, SETTINGS, settings, progress=progress)
    return np.diff(ends).tolist(), run.losses


def by_plain_loop(model: Any, clip: Any, sets: Sets, settings: TrainingSettings) -> Outcome:
    """The loop of diffusers' train_dreambooth.py with the networks called directly."""
    comfy.model_management.load_models_gpu([model, clip.patcher], force_full_load=True)
    sampling = engine.require_noise_prediction_model(model)
    device = model.load_device
    unet, text_encoder = model.model.diffusion_model, clip.cond_stage_model.clip_l.transformer
    alphas_cumprod = (1.0 / (1.0 + sampling.sigmas.double() ** 2)).float().to(device)
    keys = identity_prior.attention_keys(model, clip)
    states = (dict(model.model.named_parameters()), dict(clip.cond_stage_model.named_parameters()))
    weights = [state[key] for state, part in zip(states, keys, strict=True) for key in part]
    before = [weight.detach().clone() for weight in weights]
    for module in (unet, text_encoder):
        module.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    # ComfyUI's text encoder adds in place to what its normalisations keep for the backward pass.
    norms = [module for module in text_encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),)) for norm in norms]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    losses, ends = [], []
    for step in range(settings.steps):
        latents, captions, timesteps, noises = [], [], [], []
        for what, pictures in zip(("identity", "regularisation"), sets, strict=True):
            chosen = training_pictures.batch_indices(pictures, SETTINGS.batch_size, step, settings.seed, what)
            latents += [engine.to_model_scale(model, pictures.latents[number]) for number in chosen]
            captions += [pictures.captions[number] for number in chosen]
            generator = generator_of(settings.seed, step, f"noise of {what}")
            timesteps.append(torch.randint(sampling.sigmas.shape[0], (len(chosen),), generator=generator))
            noises.append(torch.randn((len(chosen), *latents[-1].shape), generator=generator))
        z_0, t, noise = torch.stack(latents).to(device), torch.cat(timesteps).to(device), torch.cat(noises).to(device)
        alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
        z = alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * noise
        tokens = [[token for token, _ in clip.tokenize(text)["l"][0]] for text in captions]
        context = text_encoder(torch.tensor(tokens, device=device))[0]
        predicted = unet(z, t.float(), context=context, transformer_options={})
        of_identity, of_class = predicted.chunk(2)
        noise_of_identity, noise_of_class = noise.chunk(2)
        mse = torch.nn.functional.mse_loss
        loss = mse(of_identity, noise_of_identity) + SETTINGS.regularisation_weight * mse(of_class, noise_of_class)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        synchronize()
        ends.append(time.perf_counter())
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=True):
            weight.requires_grad_(False).copy_(value)
    return np.diff(ends).tolist(), losses


METHODS: dict[str, Callable[[Any, Any, Sets, TrainingSettings], Outcome]] = {PLAIN: by_plain_loop, PACK: by_pack}


def peak_memory(name: str, arguments: argparse.Namespace) -> int:
    """Highest memory of a process of its own that does one run, in MiB."""
    command = [sys.executable, __file__, "--only", name, "--steps", str(arguments.steps), "--seed", str(arguments.seed)]
    command += ["--checkpoint", str(arguments.checkpoint), "--threads", str(arguments.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_memory_mib"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "demo_world/weights/identity-edit-demo.safetensors")
    parser.add_argument("--runs", type=int, default=9, help="runs of each loop, alternating (default 9)")
    parser.add_argument("--steps", type=int, default=8, help="training steps of a run (default 8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0, help="draws the pictures and all batches (default 0)")
    parser.add_argument("--only", choices=METHODS, help="do one run by one loop and print its memory use")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    family.register()
    options = {"dtype": torch.float32}
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(arguments.checkpoint), model_options=options)
    with torch.no_grad():
        sets = draw_sets(vae, arguments.seed)
    names = [arguments.only] if arguments.only else list(METHODS)
    settings = TrainingSettings(
        steps=arguments.steps + WARM_UP + 1,
        learning_rate=1e-4,
        weight_decay=identity_prior.WEIGHT_DECAY,
        seed=arguments.seed,
    )
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {}
    for run in tqdm(range(1 if arguments.only else arguments.runs), unit="run", disable=bool(arguments.only)):
        for name in names if run % 2 == 0 else names[::-1]:
            times, losses[name] = METHODS[name](model, clip, sets, settings)
            seconds[name].append(times[WARM_UP:])
    if arguments.only:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else kilobytes / 1024
        print(json.dumps({"peak_memory_mib": round(memory)}))
        return

    difference = max(abs(a - b) / b for a, b in zip(losses[PACK], losses[PLAIN], strict=True))
    if difference > 0.02:
        raise SystemExit(f"The loops do not do the same work: their losses differ by up to {difference:.1%}.")
    rates_of_runs = {name: [1.0 / statistics.median(run) for run in runs] for name, runs in seconds.items()}
    rates = {name: statistics.median(values) for name, values in rates_of_runs.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates_of_runs[PACK], rates_of_runs[PLAIN], strict=True)]
    relative = statistics.median(ratios)
    memories = {name: peak_memory(name, arguments) for name in names}
    commit, command = load_pack.source_commit(), " ".join(["benchmarks/identity_prior_training.py", *sys.argv[1:]])
    trained = sum(
        state[key].numel()
        for state, part in zip(
            (model.model.state_dict(), clip.cond_stage_model.state_dict()),
            identity_prior.attention_keys(model, clip),
            strict=True,
        )
        for key in part
    )
    lines = [
        "# Training an identity prior: speed and memory",
        "",
        f"`{command}` at commit {commit}: medians of {arguments.runs} pairs of runs of {arguments.steps} steps, "
        f"{trained / 1e6:.2f} million weights, one picture of each set a step, {arguments.threads} threads, float32. "
        f"The losses of both loops agree to {difference:.1e}. The ratio of a pair is from {min(ratios):.2f} to "
        f"{max(ratios):.2f}.",
        "",
        "| loop | steps a second | relative | peak memory (MiB) |",
        "|---|---|---|---|",
        f"| {PLAIN} | {rates[PLAIN]:.2f} | 1.00 | {memories[PLAIN]} |",
        f"| {PACK} | {rates[PACK]:.2f} | {relative:.2f} | {memories[PACK]} |",
        "",
        f"The goal, at least {GOAL:.1f} of the plain loop's steps a second, is "
        + ("reached." if relative >= GOAL else "not reached."),
    ]
    everything = {
        "command": command,
        "commit": commit,
        "threads": arguments.threads,
        "trained_weights": trained,
        "largest_relative_difference_of_losses": difference,
        "seconds_by_step": seconds,
        "steps_a_second": rates,
        "ratios": ratios,
        "relative": relative,
        "peak_memory_mib": memories,
    }
    write_results("identity_prior_training", everything, lines)


if __name__ == "__main__":
    main()
