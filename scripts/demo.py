"""Runs a shipped workflow on a real, headless ComfyUI and shows what came out: `python3 scripts/demo.py`.

The first call makes `.venv` and fetches the engine; later ones start at once. Standard library only until then.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import environment
from api_workflows import (
    Prompt,
    change_inputs,
    demo_values,
    node_title,
    read_workflow,
    with_demo_values,
    workflow_names,
)
from engine import Server
from environment import ROOT, VENV, ScriptError

if TYPE_CHECKING:
    from api_client import Client, Run
    from PIL import Image

DEFAULT_WORKFLOW = "timestep_aware_edit_fast"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a shipped workflow on a headless ComfyUI.")
    parser.add_argument(
        "--workflow", default=DEFAULT_WORKFLOW, metavar="NAME", help="a workflow of --list, or the path of an API JSON"
    )
    parser.add_argument("--list", action="store_true", help="list the shipped workflows")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="change an input; NODE is the node's id or title (may be repeated)",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output", help="the folder for the images")
    parser.add_argument("--serve", action="store_true", help="start the page and leave it running")
    return parser.parse_args()


def run_with_progress(client: Client, prompt: Prompt) -> Run:
    """Run the prompt with one progress bar for the nodes and one for the loop inside the current node."""
    from tqdm import tqdm

    with tqdm(total=len(prompt), unit="node", leave=False) as nodes, tqdm(unit="step", leave=False) as steps:
        finished: set[str] = set()

        def show(kind: str, data: dict[str, Any]) -> None:
            if kind == "executing" and data["node"] is not None:
                nodes.n = len(finished)
                nodes.set_description(node_title(prompt, data["node"]))
                finished.add(data["node"])
                steps.reset(total=1)
            elif kind == "execution_cached":
                finished.update(data["nodes"])
            elif kind == "progress":
                steps.total = data["max"]
                steps.n = data["value"]
                steps.refresh()

        return client.run(prompt, show)


def save_images(client: Client, prompt: Prompt, run: Run, folder: Path) -> list[Path]:
    """Save every output image, and all nodes' first images side by side under their titles."""
    folder.mkdir(parents=True, exist_ok=True)
    saved: list[Path] = []
    columns: list[tuple[str, Image.Image]] = []
    for node_id in sorted(run.outputs, key=lambda key: [int(part) for part in re.findall(r"\d+", key)]):
        title = node_title(prompt, node_id)
        images = client.images(run, node_id)
        if images:
            columns.append((title, images[0]))
        for number, image in enumerate(images):
            name = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")
            path = folder / (f"{node_id.replace(':', '_')}_{name}" + (f"_{number}" if number else "") + ".png")
            image.save(path)
            saved.append(path)
    if columns:
        path = folder / "side_by_side.png"
        side_by_side(columns).save(path)
        saved.insert(0, path)
    return saved


def side_by_side(columns: list[tuple[str, Image.Image]], height: int = 384) -> Image.Image:
    """The images in a row, scaled to one height, each under its title."""
    from PIL import Image, ImageDraw, ImageFont

    margin, header = 12, 36
    font = ImageFont.load_default(size=18)
    resized = [
        (title, image.convert("RGB").resize((round(image.width * height / image.height), height)))
        for title, image in columns
    ]
    widths = [max(image.width, round(font.getlength(title))) for title, image in resized]
    sheet = Image.new("RGB", (sum(widths) + margin * (len(widths) + 1), height + header + margin), "white")
    draw = ImageDraw.Draw(sheet)
    left = margin
    for (title, image), width in zip(resized, widths, strict=True):
        draw.text((left, 8), title, fill="black", font=font)
        sheet.paste(image, (left, header))
        left += width + margin
    return sheet


def print_run(prompt: Prompt, run: Run, saved: list[Path]) -> None:
    for node_id, output in run.outputs.items():
        for text in output.get("text", []):
            print(f"{node_title(prompt, node_id)}: {text}")
    print("\nseconds  node")
    for node_id, seconds in run.node_seconds.items():
        print(f"{seconds:7.1f}  {node_title(prompt, node_id)}")
    print(f"{run.seconds:7.1f}  the whole workflow\n")
    for path in saved:
        print(path)


def main() -> None:
    arguments = read_arguments()
    if arguments.list:
        print("\n".join(workflow_names()))
        return
    environment.enter()
    prompt = {} if arguments.serve else with_demo_values(arguments.workflow, read_workflow(arguments.workflow))
    change_inputs(prompt, arguments.set)
    # A polite end of this process must end the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    from api_client import Client

    server = Server(VENV / "comfyui-base")
    needs_photos = demo_values().get(arguments.workflow)
    if needs_photos is not None:
        from demo_photos import draw_photos

        draw_photos(server.base / "input")
        if "needs" in needs_photos:
            print(f"It loads files that {' and '.join(needs_photos['needs'])} saves; run that first.", flush=True)
    print(f"Starting ComfyUI (log: {server.log}) ...", flush=True)
    with server:
        if server.pack_failure():
            raise ScriptError(f"ComfyUI could not load the pack: {server.pack_failure()}")
        if arguments.serve:
            print(f"ComfyUI is running at {server.url}; the workflows are in its template browser.", flush=True)
            print("Ctrl-C ends it.", flush=True)
            server.wait()
            return
        client = Client(server.address)
        run = run_with_progress(client, prompt)
        saved = save_images(client, prompt, run, arguments.output / Path(arguments.workflow).stem)
        print_run(prompt, run, saved)
        print("\nOther workflows: --list names them, --workflow NAME runs one; the README says what each is for.")
        print("ComfyUI's page: --serve.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except ScriptError as error:
        sys.exit(f"error: {error}")
