"""Command line of the demo world's training: ``python -m demo_world --help``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo_world", description="Train the demo world's networks.")
    parser.add_argument("--folder", type=Path, default=Path("demo_world/training"), help="where checkpoints go")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    commands = parser.add_subparsers(dest="command", required=True)
    autoencoder = commands.add_parser("autoencoder", help="train the autoencoder")
    autoencoder.add_argument("--steps", type=int, default=2000)
    autoencoder.add_argument("--batch-size", type=int, default=8)
    autoencoder.add_argument("--learning-rate", type=float, default=3e-3)
    autoencoder.add_argument("--decoder-only", action="store_true", help="keep the encoder, refine the decoder")
    encode = commands.add_parser("encode", help="render the training set and keep its latents")
    encode.add_argument("--count", type=int, default=48_000)
    unet = commands.add_parser("unet", help="train the UNet and the text encoder")
    unet.add_argument("--steps", type=int, default=6000)
    unet.add_argument("--batch-size", type=int, default=32)
    unet.add_argument("--learning-rate", type=float, default=3e-3)
    classifier = commands.add_parser("classifier", help="train the attribute classifier")
    classifier.add_argument("--steps", type=int, default=1500)
    classifier.add_argument("--batch-size", type=int, default=32)
    classifier.add_argument("--learning-rate", type=float, default=3e-3)
    clip_vision = commands.add_parser("clip_vision", help="train the CLIP image encoder")
    clip_vision.add_argument("--steps", type=int, default=1400)
    clip_vision.add_argument("--pairs-per-batch", type=int, default=16)
    clip_vision.add_argument("--learning-rate", type=float, default=3e-3)
    clip_vision.add_argument("--probe", action="store_true", help="print the committed encoder's linear-probe accuracy")
    clip = commands.add_parser("clip", help="train the CLIP that scores images, from the committed CLIP vision")
    clip.add_argument("--steps", type=int, default=1000)
    clip.add_argument("--pairs-per-batch", type=int, default=16)
    clip.add_argument("--learning-rate", type=float, default=2e-3)
    control = commands.add_parser("control", help="train the ControlNet for poses on the unpacked checkpoint")
    control.add_argument("--steps", type=int, default=1500)
    control.add_argument("--batch-size", type=int, default=16)
    control.add_argument("--learning-rate", type=float, default=1e-3)
    control.add_argument("--count", type=int, default=6000, help="portraits to train on")
    w_plus = commands.add_parser("w_plus", help="train the encoder of W+ on portraits")
    w_plus.add_argument("--steps", type=int, default=600)
    w_plus.add_argument("--batch-size", type=int, default=24)
    w_plus.add_argument("--learning-rate", type=float, default=5e-3)
    w_plus.add_argument("--count", type=int, default=4000, help="portraits to train on")
    w_plus.add_argument("--probe", action="store_true", help="print what a linear probe reads in the committed encoder")
    style = commands.add_parser("style_attention", help="train the style attention on the committed checkpoint")
    style.add_argument("--steps", type=int, default=2000)
    style.add_argument("--batch-size", type=int, default=8)
    style.add_argument("--learning-rate", type=float, default=1e-3)
    style.add_argument("--count", type=int, default=1200, help="portraits to train on")
    style.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    style.add_argument("--kind", choices=("sequential", "parallel"), default="sequential")
    commands.add_parser("export", help="write the checkpoint that ComfyUI loads")
    commands.add_parser("unpack", help="take the committed checkpoint apart, to train its parts further")
    arguments = parser.parse_args()

    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import torch

    torch.set_num_threads(arguments.threads)
    if not torch.cuda.is_available():
        # ComfyUI asks for a GPU unless it is told that there is none.
        from comfy.cli_args import args

        args.cpu = True
    if arguments.command == "autoencoder":
        from .train_autoencoder import train_autoencoder

        train_autoencoder(
            arguments.folder, arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.decoder_only
        )
    elif arguments.command == "encode":
        from .latents import encode_training_set
        from .networks import make_autoencoder

        trained = make_autoencoder()
        trained.load_state_dict(torch.load(arguments.folder / "autoencoder.pt", weights_only=True))
        encode_training_set(trained, arguments.folder / "latents.safetensors", arguments.count)
    elif arguments.command == "unet":
        from .train_unet import train_unet

        train_unet(arguments.folder, arguments.steps, arguments.batch_size, arguments.learning_rate)
    elif arguments.command == "classifier":
        from .train_classifier import train_classifier

        train_classifier(arguments.folder, arguments.steps, arguments.batch_size, arguments.learning_rate)
    elif arguments.command == "clip_vision":
        from .train_clip_vision import linear_probe, train_clip_vision

        if not arguments.probe:
            train_clip_vision(arguments.folder, arguments.steps, arguments.pairs_per_batch, arguments.learning_rate)
        print(", ".join(f"{name} {share:.3f}" for name, share in linear_probe().items()))
    elif arguments.command == "clip":
        module_of_the_pack("train_clip").train_clip(
            arguments.folder, arguments.steps, arguments.pairs_per_batch, arguments.learning_rate
        )
    elif arguments.command == "control":
        from .train_control import train_control

        train_control(arguments.folder, arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.count)
    elif arguments.command == "w_plus":
        train_or_probe_w_plus(arguments)
    elif arguments.command == "style_attention":
        module_of_the_pack("train_style_attention").train_demo_style_attention(
            arguments.folder,
            arguments.steps,
            arguments.batch_size,
            arguments.learning_rate,
            arguments.count,
            arguments.precision,
            arguments.kind,
        )
    elif arguments.command == "export":
        from .export import export_checkpoint

        print(export_checkpoint(arguments.folder))
    elif arguments.command == "unpack":
        from .export import unpack_checkpoint

        unpack_checkpoint(arguments.folder)


def module_of_the_pack(name: str) -> Any:
    """A module of the demo world that uses the pack's own networks; the pack is imported as ComfyUI does it."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
    load_pack = importlib.import_module("load_pack")
    load_pack.prepare_engine(cpu=not load_pack.cuda_is_available())
    return importlib.import_module(f"{load_pack.load_pack().__name__}.demo_world.{name}")


def train_or_probe_w_plus(arguments: argparse.Namespace) -> None:
    w_plus = module_of_the_pack("train_w_plus")
    if not arguments.probe:
        w_plus.train_w_plus(
            arguments.folder, arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.count
        )
    groups = "rows 1-5 / 6-9 / 10-13 / 14-18"
    probe = w_plus.LinearProbe()
    for noise in (0.0, 0.05, 0.5):
        print(f"accuracy in {groups}, rows with noise of deviation {noise}:")
        for name, shares in probe.accuracy(noise).items():
            print(f"  {name}: " + " / ".join(f"{share:.3f}" for share in shares))


if __name__ == "__main__":
    main()
