"""Command line of the demo world's training: ``python -m demo_world --help``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

# Command: help, steps, batch size, learning rate. Each runs ``train_COMMAND.train_COMMAND``.
TRAININGS: dict[str, tuple[str, int, int, float]] = {
    "autoencoder": ("train the autoencoder", 2000, 8, 3e-3),
    "unet": ("train the UNet and the text encoder", 6000, 32, 3e-3),
    "harder": ("train the harder world's low-rank adaptation of the committed checkpoint", 2800, 16, 3e-3),
    "flow": ("train the flow transformer on the unpacked checkpoint's text encoder", 3000, 32, 3e-3),
    "classifier": ("train the attribute classifier", 1500, 32, 3e-3),
    "clip_vision": ("train the CLIP image encoder", 1400, 16, 3e-3),
    "clip": ("train the CLIP that scores images, starting from the committed CLIP vision", 1000, 16, 2e-3),
    "control": ("train the ControlNet for poses on the unpacked checkpoint", 1500, 16, 1e-3),
    "w_plus": ("train the W+ encoder on portraits", 600, 24, 5e-3),
    "style_attention": ("train the style attention on the committed checkpoint", 2000, 8, 1e-3),
}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "autoencoder": {"--decoder-only": {"action": "store_true", "help": "train only the decoder"}},
    "flow": {
        "--decay-steps": {"type": int, "default": 600, "help": "steps of the learning rate's decay to zero"},
        "--patch-size": {
            "type": int,
            "choices": (1, 2),
            "default": 1,
            "help": "latent pixels per token: 2, then 1",
        },
    },
    "classifier": {"--world": {"choices": ("demo", "harder"), "default": "demo", "help": "whose attributes it sees"}},
    "clip_vision": {"--probe": {"action": "store_true", "help": "only print the committed encoder's probe accuracy"}},
    "control": {"--count": {"type": int, "default": 6000, "help": "number of training portraits"}},
    "w_plus": {
        "--count": {"type": int, "default": 4000, "help": "number of training portraits"},
        "--probe": {"action": "store_true", "help": "only print the committed encoder's probe accuracy"},
    },
    "style_attention": {
        "--count": {"type": int, "default": 1200, "help": "number of training portraits"},
        "--precision": {"choices": ("float32", "bfloat16"), "default": "bfloat16"},
        "--kind": {"choices": ("sequential", "parallel"), "default": "sequential"},
    },
}
USE_THE_PACK = ("clip", "w_plus", "style_attention")
"""Trainings that import the pack's own networks."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo_world", description="Train the demo world's networks.")
    parser.add_argument("--folder", type=Path, default=Path("demo_world/training"), help="folder of the checkpoints")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (text, steps, batch_size, learning_rate) in TRAININGS.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--steps", type=int, default=steps)
        batch = "--pairs-per-batch" if name.startswith("clip") else "--batch-size"
        command.add_argument(batch, type=int, default=batch_size)
        command.add_argument("--learning-rate", type=float, default=learning_rate)
        for option, keywords in OPTIONS.get(name, {}).items():
            command.add_argument(option, **keywords)
    encode = commands.add_parser("encode", help="render the training set and encode it")
    encode.add_argument("--count", type=int, default=48_000, help="number of images, in whole shards of 1024")
    encode.add_argument("--world", choices=("demo", "harder"), default="demo", help="which images")
    export = commands.add_parser("export", help="write the checkpoint that ComfyUI loads")
    export.add_argument("--network", choices=("unet", "flow"), default="unet")
    export.add_argument("--destination", type=Path, help="the file (in demo_world/weights by default)")
    commands.add_parser("unpack", help="split the committed checkpoint into its parts, for further training")
    options = vars(parser.parse_args())
    command_name, threads = options.pop("command"), options.pop("threads")

    import torch

    torch.set_num_threads(threads)
    sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
    importlib.import_module("load_pack").prepare_engine(cpu=not torch.cuda.is_available())
    run(command_name, options)


def run(command: str, options: dict[str, Any]) -> None:
    if command == "encode":
        import torch

        from .attributes import random_attributes
        from .harder import draw_training
        from .latents import encode_training_set
        from .networks import make_autoencoder

        folder = options["folder"]
        trained = make_autoencoder()
        trained.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True))
        draw = draw_training if options["world"] == "harder" else random_attributes
        encode_training_set(trained, folder, options["count"], draw=draw)
    elif command == "export":
        from .export import export_checkpoint

        print(export_checkpoint(**options))
    elif command == "unpack":
        from .export import unpack_checkpoint

        unpack_checkpoint(**options)
    else:
        only_probe = options.pop("probe", None)
        load = pack_module if command in USE_THE_PACK else importlib.import_module
        training = load(f"demo_world.train_{command}")
        if not only_probe:
            getattr(training, f"train_{command}")(**options)
        if only_probe is not None:
            training.print_probe()


def pack_module(name: str) -> Any:
    """A module of the pack, imported like ComfyUI does."""
    pack = importlib.import_module("load_pack").load_pack()
    return importlib.import_module(f"{pack.__name__}.{name}")


if __name__ == "__main__":
    main()
