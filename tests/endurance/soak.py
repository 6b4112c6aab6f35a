"""Does a server that runs for long stay as it was: `python -m benchmarks soak --prompts 500`.

All shipped workflows, made cheap, in rounds of random order on one server, with other seeds each time, so that nothing
comes from the cache; those that train, half of the time, take part in every fourth round. After every prompt: memory
(resident and, without what is shared, unique), threads and open files of the server process. After every round the
reference prompt is computed anew, its image compared bit for bit with the one before the first round, and the process
asked what is alive in it (see `soak_probe.py`).

Writes benchmarks/results/soak.md, .json and .png after every round: a run that is stopped leaves what it has measured.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
from api_client import Client
from api_workflows import read_workflow
from engine import Server
from scipy.stats import theilslopes
from tqdm import tqdm

from ...benchmarks.harness import RESULTS, command_line, source_commit, write_results
from . import cheap_workflows

WARM_UP_ROUNDS = 5
"""Rounds in which libraries are loaded and the allocator finds its size; they are shown but not in the slopes."""
TRAININGS_EVERY = 4
"""Rounds from one with trainings to the next."""
MIB = 2**20
UNFINISHED = (".tmp", ".part")


def trains(name: str) -> bool:
    nodes = read_workflow(name).values()
    return any(node["class_type"].startswith("IdentityEditTrain") for node in nodes)


def processes(server: psutil.Process) -> list[psutil.Process]:
    return [server, *server.children(recursive=True)]


def sample(server: psutil.Process) -> dict[str, float]:
    """What the operating system says of the server and of whatever it started."""
    known = processes(server)
    return {
        "rss_mib": sum(process.memory_info().rss for process in known) / MIB,
        "uss_mib": sum(process.memory_full_info().uss for process in known) / MIB,
        "threads": sum(process.num_threads() for process in known),
        "open_files": sum(process.num_fds() for process in known),
        "processes": len(known),
    }


def unfinished_files(base: Path) -> int:
    """Files below the base folder that a writer should have renamed or removed."""
    return sum(path.suffix in UNFINISHED for path in base.rglob("*"))


def clear(base: Path) -> None:
    """Empty the folders that fill by their nature: saved images, trained files and previews."""
    for name in ("output", "temp"):
        for path in (base / name).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def slope(values: list[float]) -> dict[str, float]:
    """Theil and Sen's slope for 100 prompts with its 95 % interval: a median, which one high sample does not move."""
    middle, _, low, high = theilslopes(values)
    return {"slope": 100 * float(middle), "low": 100 * float(low), "high": 100 * float(high)}


def growth_by_workflow(samples: list[dict[str, Any]], rounds: int) -> dict[str, float]:
    """Unique memory after each workflow: mean of the last three rounds less that of the first three after warm-up.

    Prompts differ in what they leave in the cache; the same workflow's samples can be compared.
    """
    by_name: dict[str, list[float]] = defaultdict(list)
    for one in samples:
        if one["round"] >= min(WARM_UP_ROUNDS, rounds - 6):
            by_name[one["workflow"]].append(one["uss_mib"])
    return {name: round(fmean(values[-3:]) - fmean(values[:3]), 1) for name, values in sorted(by_name.items())}


def draw(samples: list[dict[str, Any]], probes: list[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.plot([one["rss_mib"] for one in samples], label="resident", color="tab:blue", linewidth=0.8)
    above.plot([one["uss_mib"] for one in samples], label="unique", color="tab:green", linewidth=0.8)
    last_of = {one["round"]: one["prompt"] for one in samples}
    above.plot(
        list(last_of.values()),
        [probe["tensor_bytes"] / MIB for probe in probes[1:]],
        "o-",
        label="live tensors after the reference prompt",
        color="tab:red",
        markersize=3,
    )
    above.plot(
        list(last_of.values()),
        [probe["heap_in_use_bytes"] / MIB for probe in probes[1:]],
        "o-",
        label="given out by the allocator after the reference prompt",
        color="tab:orange",
        markersize=3,
    )
    above.axvline(last_of.get(WARM_UP_ROUNDS - 1, 0) + 0.5, color="gray", linewidth=0.8, linestyle=":")
    above.set_ylabel("memory of the server, MiB")
    above.set_ylim(bottom=0)
    above.legend(loc="center right")
    below.plot([one["threads"] for one in samples], label="threads", color="tab:purple", linewidth=0.8)
    below.plot([one["open_files"] for one in samples], label="open files", color="tab:orange", linewidth=0.8)
    below.set_ylim(bottom=0)
    below.set_xlabel("prompt")
    below.legend(loc="lower right")
    figure.savefig(RESULTS / "soak.png", dpi=110)


def report(arguments: argparse.Namespace, commit: str, digests: list[str], samples: list, probes: list) -> None:
    rounds = len(probes) - 1
    measured = [one for one in samples if one["round"] >= min(WARM_UP_ROUNDS, rounds - 1)]
    few = min(len(measured), len(cheap_workflows.NAMES))
    names = ("rss_mib", "uss_mib", "threads", "open_files", "processes")
    slopes = {name: slope([one[name] for one in measured]) for name in names}
    growth = growth_by_workflow(samples, rounds)
    failures = [one for one in samples if one["error"]]
    figures = {
        "command": command_line(),
        "commit": commit,
        "seed": arguments.seed,
        "prompts": len(samples),
        "rounds": rounds,
        "warm_up_rounds": WARM_UP_ROUNDS,
        "slopes_per_100_prompts": slopes,
        "uss_growth_by_workflow_mib": growth,
        "different_reference_images": len(set(digests)),
        "heap_in_use_mib_by_round": [round(probe["heap_in_use_bytes"] / MIB, 1) for probe in probes],
        "probes": probes,
        "samples": samples,
    }
    first, last = probes[min(WARM_UP_ROUNDS, rounds)], probes[-1]
    lines = [
        f"# {len(samples)} prompts on one server",
        "",
        f"`{figures['command']}` at commit {commit}: {rounds} rounds of the shipped workflows, made cheap and in "
        f"random order (seed {arguments.seed}), those that train in every {TRAININGS_EVERY}th round; every prompt with "
        f"other seeds; one CPU thread.",
        "",
        f"Prompts that failed: {len(failures)}. The reference image, computed anew before the first and after every "
        f"round ({len(digests)} times), was {'always the same' if len(set(digests)) == 1 else 'NOT always the same'}, "
        f"bit for bit.",
        "",
        f"Slopes over the prompts after {WARM_UP_ROUNDS} rounds of warm-up (Theil and Sen; 95 % interval):",
        "",
        "| of the server process | after warm-up | at the end | slope for 100 prompts |",
        "|---|---|---|---|",
    ]
    titles = {
        "rss_mib": "resident memory, MiB",
        "uss_mib": "unique memory, MiB",
        "threads": "threads",
        "open_files": "open files",
        "processes": "processes",
    }
    for name, title in titles.items():
        start, end = (fmean(one[name] for one in part) for part in (measured[:few], measured[-few:]))
        found = slopes[name]
        lines.append(
            f"| {title} (mean of {few} prompts) | {start:.1f} | {end:.1f} | {found['slope']:+.2f} "
            f"({found['low']:+.2f} to {found['high']:+.2f}) |"
        )
    lines += [
        "",
        "| alive inside, after the reference prompt | before all | after warm-up | at the end |",
        "|---|---|---|---|",
    ]
    for name, title, unit in (
        ("loaded_models", "loaded models", 1),
        ("patchers", "model patchers", 1),
        ("tensor_bytes", "tensors, MiB", MIB),
        ("heap_in_use_bytes", "given out by the C library's allocator, MiB", MIB),
        ("objects", "objects, thousands", 1000),
        ("temporary_files", "files in the temporary folder", 1),
        ("unfinished_files", "unfinished files found in its folders so far", 1),
    ):
        values = [f"{probe[name] / unit:.1f}".removesuffix(".0") for probe in (probes[0], first, last)]
        lines.append(f"| {title} | {' | '.join(values)} |")
    in_use = [probe["heap_in_use_bytes"] / MIB for probe in probes[min(WARM_UP_ROUNDS, rounds) :]]
    lines += [
        "",
        "Resident memory counts what the allocator keeps for later; a leak would be in what it has given out, which "
        f"after warm-up was between {min(in_use):.1f} and {max(in_use):.1f} MiB at the end of a round.",
    ]
    lines += ["", "Unique memory after a workflow, last three rounds less first three after warm-up:", ""]
    lines += ["| workflow | MiB |", "|---|---|", *(f"| {name} | {value:+.1f} |" for name, value in growth.items())]
    if failures:
        lines += ["", "| prompt | workflow | error |", "|---|---|---|"]
        lines += [f"| {one['prompt']} | {one['workflow']} | {one['error']} |" for one in failures]
    lines += ["", "![Memory, threads and open files](soak.png)"]
    draw(samples, probes)
    write_results("soak", figures, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=500, help="at least so many, in whole rounds (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of the prompts' seeds (default 0)")


def main(arguments: argparse.Namespace) -> None:

    without_training = [name for name in cheap_workflows.NAMES if not trains(name)]
    draws = random.Random(arguments.seed)
    commit = source_commit()
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="identity-edit-soak-") as folder:
        base, temporary = Path(folder) / "base", Path(folder) / "temporary"
        temporary.mkdir()
        probe_folder = base / "custom_nodes" / "soak_probe"
        probe_folder.mkdir(parents=True)
        shutil.copyfile(Path(__file__).with_name("soak_probe.py"), probe_folder / "__init__.py")
        environment = {"HF_HUB_OFFLINE": "1", "MKL_CBWR": "AUTO,STRICT", "OMP_NUM_THREADS": "1"}
        with Server(base, environment={**environment, "TMPDIR": str(temporary)}) as server:
            client = Client(server.address)
            process = psutil.Process(server.process_id)

            def probe() -> dict[str, Any]:
                unfinished = sum(one["unfinished_files"] for one in samples)
                return {**client.get("/soak_probe").json(), "unfinished_files": unfinished}

            digests = [cheap_workflows.reference_digest(client)]
            probes = [probe()]
            number = 0
            bar = tqdm(total=arguments.prompts, unit="prompt")
            while len(samples) < arguments.prompts:
                names = without_training if number % TRAININGS_EVERY else cheap_workflows.NAMES
                for name in draws.sample(names, len(names)):
                    seed = 1 + len(samples)
                    prompt = cheap_workflows.with_seed(cheap_workflows.cheap(read_workflow(name)), seed)
                    seconds, error = 0.0, ""
                    try:
                        seconds = client.run(prompt, timeout=900).seconds
                    except Exception as failure:
                        error = f"{type(failure).__name__}: {failure}"
                    facts = {"prompt": len(samples), "round": number, "workflow": name, "error": error}
                    facts |= {"seconds": round(seconds, 2), "unfinished_files": unfinished_files(base)}
                    samples.append({**facts, **sample(process)})
                    clear(base)
                    bar.update()
                number += 1
                client.clear_history()  # ComfyUI keeps what 10000 prompts have shown
                digests.append(cheap_workflows.reference_digest(client))
                probes.append(probe())
                report(arguments, commit, digests, samples, probes)
