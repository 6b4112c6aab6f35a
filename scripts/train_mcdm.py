"""Trains an MCDM as the Train MCDM node does, on one accelerator or on several.

    python scripts/train_mcdm.py --checkpoint sd15.safetensors --clip-vision clip-vit-l.safetensors \\
        --pairs output/pairs --output output/checkpoints/mcdm.safetensors
    accelerate launch --num_processes 4 scripts/train_mcdm.py ...        # needs pip install accelerate

To be run by the Python that ComfyUI runs in. The ComfyUI is the one in whose custom_nodes the pack lies, or the one
that COMFYUI_PATH names.

P processes with an accumulation of A do what one does with P A, each with its own accelerator: accelerate starts them
and averages their gradients (see pipelines/training/processes.py). A run that was stopped or killed goes on when the
same command is given again, also with another number of processes as long as P A stays the same.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from user_comfyui import PACK, ScriptError, name_pack, use_comfyui

DEMO = "demo"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = PACK / "demo_world" / "weights" / "identity-edit-demo.safetensors"
    parser.add_argument(
        "--checkpoint", type=Path, default=demo, help="of the model that made the pairs (default: demo)"
    )
    parser.add_argument(
        "--clip-vision", default=DEMO, help="CLIP's image encoder, a file; 'demo' is the demo world's (default)"
    )
    parser.add_argument("--pairs", type=Path, required=True, help="the folder of the pairs, with its index")
    parser.add_argument("--output", type=Path, required=True, help="the file to write, .safetensors")
    parser.add_argument("--run-folder", type=Path, help="checkpoint and encoded pairs (default: beside the output)")
    parser.add_argument("--unet-alone", action="store_true", help="without text encoders and VAE")
    parser.add_argument("--file-dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of a batch of one process (default 4)")
    parser.add_argument("--accumulation", type=int, default=1, help="batches of one process for a step (default 1)")
    parser.add_argument("--identity-share", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--mirror", action="store_true", help="train on every pair mirrored as well")
    parser.add_argument("--start", type=Path, help="an MCDM's file whose image embedding training goes on from")
    parser.add_argument("--image-tokens", type=int, default=77)
    parser.add_argument(
        "--conditions", choices=("image and spatial", "image only", "spatial only"), default="image and spatial"
    )
    parser.add_argument("--ema-decay", type=float, default=0.9999)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations: faster, more memory")
    parser.add_argument("--checkpoint-every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0 leaves torch's number")
    return parser.parse_args()


def load_clip_vision(name: str) -> Any:
    if name == DEMO:
        from identity_edit_pack.demo_world.clip_vision import load_clip_vision as load_demo

        return load_demo()
    import comfy.clip_vision

    found = comfy.clip_vision.load(name)
    if found is None:
        raise ScriptError(f"{name} holds no CLIP vision that ComfyUI knows.")
    return found


def main() -> int:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if torch.cuda.is_available():  # ComfyUI takes the current one
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    use_comfyui()
    name_pack()

    import comfy.sd
    from identity_edit_pack.demo_world import family
    from identity_edit_pack.pipelines.engine.edit_model import register_families
    from identity_edit_pack.pipelines.mcdm import model as mcdm
    from identity_edit_pack.pipelines.mcdm import train as train_mcdm
    from identity_edit_pack.pipelines.mcdm.encoded_pairs import pairs_in_folder, remove_encoded, with_mirrored
    from identity_edit_pack.pipelines.shared.errors import IdentityEditError
    from identity_edit_pack.pipelines.training.processes import launched_processes
    from tqdm import tqdm

    family.register()
    register_families()
    try:
        processes = launched_processes()
        pairs, held_out = pairs_in_folder(arguments.pairs)
        if arguments.mirror:
            pairs = with_mirrored(pairs)
        run_folder = arguments.run_folder or arguments.output.with_suffix(".run")
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(arguments.checkpoint))
        with tqdm(total=arguments.steps, unit="step", disable=processes.index > 0) as bar:

            def progress(done: int, _total: int, loss: float, _sample: torch.Tensor | None) -> None:
                bar.update(done - bar.n)
                bar.set_postfix(loss=f"{loss:.4f}")

            trained, run = train_mcdm.train_mcdm(
                model,
                clip,
                vae,
                load_clip_vision(arguments.clip_vision),
                pairs,
                train_mcdm.MCDMSettings(
                    steps=arguments.steps,
                    learning_rate=arguments.learning_rate,
                    batch_size=arguments.batch_size,
                    accumulation=arguments.accumulation,
                    identity_share=arguments.identity_share,
                    dropout=arguments.dropout,
                    image_tokens=arguments.image_tokens,
                    conditions=arguments.conditions,
                    ema_decay=arguments.ema_decay,
                    precision=arguments.precision,
                    checkpointing=not arguments.no_checkpointing,
                    seed=arguments.seed,
                    checkpoint_every=arguments.checkpoint_every,
                ),
                str(run_folder),
                start=mcdm.load_mcdm(str(arguments.start)) if arguments.start else None,
                sample_pair=held_out[0] if held_out else None,
                progress=progress,
                processes=processes,
            )
        if processes.index == 0:
            path = str(arguments.output)
            of_clip, of_vae = (None, None) if arguments.unet_alone else (clip, vae)
            mcdm.save_mcdm(trained.mcdm, path, trained.model, of_clip, of_vae, trained.weights, arguments.file_dtype)
            with contextlib.suppress(OSError):  # the file holds its result now
                os.remove(train_mcdm.checkpoint_path(str(run_folder), trained))
            remove_encoded(trained.encoded)
            few = max(1, min(50, len(run.losses) // 2))
            first, last = (sum(part) / len(part) for part in (run.losses[:few], run.losses[-few:]))
            print(f"{len(run.losses)} steps; loss {first:.4f} over the first {few}, {last:.4f} over the last.")
            print(f"Saved as {path}")
        processes.wait()
    except IdentityEditError as error:
        raise ScriptError(str(error)) from error
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except ScriptError as error:
        sys.exit(f"error: {error}")
