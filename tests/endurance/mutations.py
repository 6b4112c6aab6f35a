"""Do the tests notice when the code is broken? `python -m benchmarks mutations`.

Each change is made in a temporary copy of the repository, in the one file that holds its text, and the files of tests
named beside it are run there. A change that no test notices is a guarantee that nothing holds: the command then ends
with 1. The text is looked for in the whole pack, so that it may move between files. --names runs the changes whose
names contain one of them; their rows in benchmarks/results/mutations.json are replaced, the others stay, and
mutations.md is made of all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ...benchmarks.harness import ROOT, markdown, read_results, source_commit, write_results

ROOMS = ("attention", "pipelines", "nodes", "demo_world")
NOT_COPIED = (".git", ".venv", ".*_cache", "__pycache__", "demo_output")
PATIENCE = 1200.0
"""Seconds for one change's tests; one that makes them hang is noticed."""


@dataclass(frozen=True)
class Mutation:
    """A change of the code.

    old, new: the text that stands in one place of the pack, and what takes its place.
    tests: names of the files of tests, or their ends, that should notice.
    """

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = [
    # attention/
    Mutation(
        "softmax scale",
        "(q[:, :, rows] * dimension**-0.5) @ k",
        "(q[:, :, rows] * dimension**-1.0) @ k",
        ("test_capture.py",),
    ),
    Mutation(
        "self-attention transposed",
        "mask = self_attention @ mask",
        "mask = self_attention.transpose(1, 2) @ mask",
        ("test_identity_mask.py",),
    ),
    Mutation(
        "union of masks",
        "return torch.maximum(first, second)",
        "return torch.minimum(first, second)",
        ("test_identity_mask.py",),
    ),
    Mutation(
        "recorded style token",
        "probabilities[..., list(attention.columns)].sum(dim=-1)",
        "probabilities[..., 0]",
        ("test_style_cross_attention.py",),
    ),
    Mutation(
        "padding before the image",
        "cursor.pad(of_text.start, multiple)",
        "pass",
        ("test_joint.py",),
    ),
    Mutation(
        "mask of joint attention",
        'bias = _bias(args[0] if args else kwargs.get("mask"), q, k)',
        "bias = None",
        ("test_joint.py",),
    ),
    Mutation(
        "keys and values of a joint source",
        "(key[:, :, attended.image], values[:, :, attended.image])",
        "(values[:, :, attended.image], key[:, :, attended.image])",
        ("test_joint_exchange.py",),
    ),
    Mutation(
        "source prompt of joint control",
        'return engine.conditionings_with_text(own["positive"], own[_KEY])',
        'return own["positive"]',
        ("test_flow_attention_control.py",),
    ),
    Mutation(
        "an embedding cut at its end",
        "if any(templates) else 0",
        "",
        ("test_flow_masks.py",),
    ),
    Mutation(
        "direction of a contrast",
        "standardized((subject - other)",
        "standardized((other - subject)",
        ("test_joint_capture.py",),
    ),
    Mutation(
        "tokens of a text padded at its start",
        'before = entry["model_conds"]["c_crossattn"].cond.shape[1] - count',
        "before = 0",
        ("test_joint_capture.py",),
    ),
    Mutation(
        "a condition that is not trained with",
        "* drops | settings.never_used",
        "* drops",
        ("test_train_mcdm.py",),
    ),
    Mutation(
        "direction of an augmentation",
        "quads * size, (corners * size).expand_as(quads)",
        "(corners * size).expand_as(quads), quads * size",
        ("test_augmentation.py",),
    ),
    Mutation(
        "lambda of the style", "return n + strength * added", "return n + added", ("test_style_cross_attention.py",)
    ),
    Mutation(
        "null style for the prompt",
        "(self.null if is_null else self.tokens).expand",
        "(self.tokens if is_null else self.null).expand",
        ("test_style_cross_attention.py", "pipelines/test_style_attention.py"),
    ),
    Mutation(
        "exchanged tokens",
        "torch.where(self.mapped.to(target.device), source @",
        "torch.where(~self.mapped.to(target.device), source @",
        ("test_prompt_to_prompt.py",),
    ),
    Mutation(
        "values of the source",
        "values.append(source_values.repeat(rows // source_values.shape[0], 1, 1))",
        "values.append(target[1])",
        ("test_mutual_self_attention.py",),
    ),
    Mutation(
        "top and left of an area",
        "given_height, given_width, top, left =",
        "given_height, given_width, left, top =",
        ("test_capture.py", "test_mutual_self_attention.py", "test_style_cross_attention.py"),
    ),
    Mutation(
        "no style once compiled",
        "if style is None:  # lambda 0 is bit-identical to no style",
        "if style is None or torch.compiler.is_compiling():",
        ("test_compiled_models.py",),
    ),
    # pipelines/
    Mutation(
        "offset of DDIM's timesteps",
        "dtype=torch.int64) * ratio + offset",
        "dtype=torch.int64) * ratio",
        ("test_schedule.py",),
    ),
    Mutation(
        "a flow's path",
        "FLOW = NoisePath(lambda sigma: 1.0 - sigma, -1.0,",
        "FLOW = NoisePath(lambda sigma: 1.0, -1.0,",
        ("test_families.py",),
    ),
    Mutation(
        "the noise that a stochastic step keeps",
        "math.sqrt(1.0 - eta + eta * ratio * ratio)",
        "math.sqrt(1.0 - eta * ratio * ratio)",
        ("test_families.py",),
    ),
    Mutation(
        "text twice in joint attention",
        '("c_crossattn", "num_tokens", "y", "clip_text_pooled") if name in made}',
        '()} | {"c_crossattn": comfy.conds.CONDCrossAttn(embedding)}',
        ("test_inversion_methods.py",),
    ),
    Mutation(
        "the level of a fixed point",
        "before, denoised = y, estimate(y, s_next)",
        "before, denoised = y, estimate(y, s)",
        ("test_inversion_methods.py",),
    ),
    Mutation(
        "FlowEdit's latent of the target",
        "z_tar = z + z_src - x_src",
        "z_tar = z_src",
        ("test_flow_editing.py",),
    ),
    Mutation(
        "drift of the source in direct inversion",
        "s, s_next) + deviation",
        "s, s_next)",
        ("test_flow_editing.py",),
    ),
    Mutation(
        "an inversion as noise at full weight",
        "return (x - start(zero.clone(), engine.image_of_run(self.model, latent))) / weight",
        "return x - start(zero.clone(), engine.image_of_run(self.model, latent))",
        ("test_inversion_methods.py",),
    ),
    Mutation(
        "inputs of a recomputed block",
        "_copied if change_inputs else _copy_of_dictionary",
        "_copy_of_dictionary",
        ("test_flow_gradients.py",),
    ),
    Mutation(
        "one noise for all steps",
        "path.noised(z_0, eps[i].to(z_0), sigmas[i])",
        "path.noised(z_0, eps[0].to(z_0), sigmas[i])",
        ("test_edit_friendly_inversion.py",),
    ),
    Mutation(
        "decay of the learning rate",
        "return first * max(1.0 - i / 100.0, 0.01)",
        "return first",
        ("test_null_text.py",),
    ),
    Mutation(
        "eta the wrong way",
        "eta * e_tgt + (1.0 - eta) * e_opt.to(e_tgt))",
        "(1.0 - eta) * e_tgt + eta * e_opt.to(e_tgt))",
        ("test_text_optimization.py", "test_text_injection.py"),
    ),
    Mutation(
        "rounding of the ratio",
        "math.floor(ratio * steps + 0.5 + 1e-9)",
        "math.floor(ratio * steps)",
        ("test_text_injection.py",),
    ),
    Mutation(
        "tolerance of per-step embeddings",
        "(sigmas[1:-1] * (1.0 + SAME_LEVEL) >= sigma)",
        "(sigmas[1:-1] > sigma)",
        ("test_step_embeddings.py",),
    ),
    Mutation(
        "blend inside out",
        "m * x_next + (1 - m) * inversion.trajectory[i + 1].to(x)",
        "(1 - m) * x_next + m * inversion.trajectory[i + 1].to(x)",
        ("test_identity_mask_blend.py",),
    ),
    Mutation(
        "reference outside of the mask",
        "x = torch.where(inside, x_star[i], x)",
        "x = torch.where(inside, x, x_star[i])",
        ("test_reference_guidance.py",),
    ),
    Mutation(
        "estimate that leads to the reference",
        "return x - sigma * (x - x_next) / (sigma - sigma_next)",
        "return x - sigma_next * (x - x_next) / (sigma - sigma_next)",
        ("test_flow_reference_guidance.py",),
    ),
    Mutation(
        "reference guidance with the paper's constant step on flow models",
        "lengths = torch.ones(len(x))",
        "lengths = None",
        ("test_flow_reference_guidance.py",),
    ),
    Mutation(
        "guidance coefficients",
        "NEGATIVE: self.spatial - self.text",
        "NEGATIVE: self.text - self.spatial",
        ("test_mcdm.py", "test_portrait.py"),
    ),
    Mutation("halves of a pair", "m_b = 1.0 - m_a  # [0, 1]", "m_b = m_a", ("test_pair_guidance.py",)),
    Mutation("outliers of the edit mask", "settings.outliers * mean", "mean", ("test_edit_mask.py",)),
    Mutation(
        "gradients not scaled back", "gradient.float() / scale[index]", "gradient.float()", ("test_gradients.py",)
    ),
    Mutation(
        "every process the same batches",
        "range(step * batches + processes.index,",
        "range(step * batches,",
        ("test_processes.py",),
    ),
    Mutation(
        "average forgets its age",
        'average.optimization_step = int(description["steps"])',
        "average.optimization_step = 0",
        ("test_training.py",),
    ),
    Mutation(
        "LoRA without its root",
        "(root[:, None] * v).to(change.dtype)",
        "v.to(change.dtype)",
        ("pipelines/test_identity_prior.py",),
    ),
    Mutation(
        "tie of c_s as a mean",
        "(c_s[name] - self.phi_s[name]).square().sum()",
        "(c_s[name] - self.phi_s[name]).square().mean()",
        ("pipelines/test_train_subject_embedding.py",),
    ),
    Mutation(
        "low rank twice as strong",
        "linear(linear(inputs[0].to(down.dtype), down), up)",
        "linear(linear(inputs[0].to(down.dtype), down), 2 * up)",
        ("pipelines/test_identity_prior.py",),
    ),
    Mutation(
        "W+ codes with their mean",
        "difference = rows - average",
        "difference = rows",
        ("pipelines/test_style_attention.py", "demo_world/test_style_attention.py"),
    ),
    Mutation(
        "center of a face",
        "center = eyes + eye_to_mouth * 0.1",
        "center = eyes + eye_to_mouth * 0.3",
        ("test_face_alignment.py",),
    ),
    Mutation(
        "squared error",
        "error = (edited.double() - source.double()).square().mean(dim=-1)",
        "error = (edited.double() - source.double()).abs().mean(dim=-1)",
        ("test_image_scores.py",),
    ),
    Mutation(
        "directional similarity",
        "images, texts = edited - source, target_texts - source_texts",
        "images, texts = edited, target_texts",
        ("test_clip_scores.py",),
    ),
    Mutation(
        "young files swept away",
        "for each in (path, *within)) < ABANDONED_AFTER",
        "for each in (path, *within)) < 0",
        ("test_kill_while_saving.py",),
    ),
    Mutation(
        "gradients in inference mode",
        "with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:",
        "with torch.enable_grad(), contextlib.ExitStack() as stack:",
        ("test_gradients.py", "pipelines/test_null_text.py"),
    ),
    # nodes/: what the shared checks refuse, that nodes call them, and what a node checks itself
    Mutation(
        "sigmas unchecked",
        '"SIGMAS": lambda value, item, model: check_sigmas(value, item.id),',
        "",
        ("test_sockets.py",),
    ),
    Mutation(
        "numbers without limits",
        "if (least is not None and value < least) or (most is not None and value > most):",
        "if False:",
        ("test_sockets.py",),
    ),
    Mutation("images of NaN", "bad = not_finite(images, name)", "bad = None", ("test_sockets.py",)),
    Mutation(
        "CLIP vision unchecked",
        '"CLIP_VISION": lambda value, item, model: _check_clip_vision(value, item.id),',
        "",
        ("test_sockets.py",),
    ),
    Mutation(
        "a node without its checks",
        "    @checked\n    def execute(cls, detector: str, score: float)",
        "    def execute(cls, detector: str, score: float)",
        ("test_sockets.py",),
    ),
    Mutation(
        "the output folder is left",
        ".startswith(os.path.abspath(output) + os.sep)",
        ".startswith(os.sep)",
        ("test_saved_files.py", "test_bad_inputs.py"),
    ),
    Mutation(
        "seeds beyond the largest", "(seed + number) % (SEED_MAXIMUM + 1)", "seed + number", ("nodes/test_subject.py",)
    ),
    # demo_world/
    Mutation(
        "wrong captions do not compete",
        'logits.masked_fill(same, float("-inf")), target)',
        "logits[:, : len(captions)], target)",
        ("demo_world/test_clip.py",),
    ),
    Mutation(
        "captions without a costume",
        'costume = "" if a.costume == "none" else f"wearing a {a.costume}"',
        'costume = ""',
        ("test_attributes.py",),
    ),
    # pipelines/keep_rest/, nodes/keep_rest/
    Mutation(
        "registration by edited pixels too",
        "weight = (local - 0.3).clip(0.0) ** 2 * structure * inside.numpy()",
        "weight = structure * inside.numpy()",
        ("pipelines/test_keep_rest.py",),
    ),
    Mutation(
        "trust of a large movement",
        "if support * belief < LEAST_SUPPORT:",
        "if support < LEAST_SUPPORT:",
        ("pipelines/test_keep_rest.py",),
    ),
    Mutation(
        "trust of halves",
        "max(distances[:2]) / EXTENDED, length)",
        "length)",
        ("pipelines/test_keep_rest.py",),
    ),
    Mutation(
        "original outside of the change",
        "torch.where(share > 0.0, target + share * (edit - target), target)",
        "edit",
        ("pipelines/test_keep_rest.py",),
    ),
    Mutation(
        "color cast undone",
        "(colors + self.offset + self.gain * colors + bend)",
        "(colors + self.offset)",
        ("pipelines/test_keep_rest.py",),
    ),
    Mutation(
        "best edit",
        "best = max(range(len(scores))",
        "best = min(range(len(scores))",
        ("nodes/test_keep_rest.py",),
    ),
]


def place_of(old: str, root: Path) -> Path:
    """The one file of the pack that holds the text; it must hold it once."""
    found = [path for room in ROOMS for path in (root / room).rglob("*.py") if old in path.read_text(encoding="utf-8")]
    if len(found) != 1 or found[0].read_text(encoding="utf-8").count(old) != 1:
        raise LookupError(f"stands in {len(found)} files" if len(found) != 1 else "stands there more than once")
    return found[0]


def files_of(names: tuple[str, ...], root: Path) -> list[str]:
    tests = sorted((root / "tests").rglob("test_*.py"))
    return [
        str(path) for path in tests if any(f"/{path.relative_to(root).as_posix()}".endswith(f"/{n}") for n in names)
    ]


def copied(folder: Path) -> Path:
    """A copy of the repository with the same .venv; large files are shared where the file system can."""

    def share(source: str, destination: str) -> None:
        if source.endswith(".py"):
            shutil.copy2(source, destination)
        else:
            try:
                os.link(source, destination)
            except OSError:
                shutil.copy2(source, destination)

    root = folder / "copy"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*NOT_COPIED), copy_function=share)
    (root / ".venv").symlink_to((ROOT / ".venv").resolve(), target_is_directory=True)
    return root


def outcome(mutation: Mutation, root: Path) -> str:
    """What became of one change: "caught", "NOT CAUGHT", or why it could not be tried."""
    try:
        path = place_of(mutation.old, root)
    except LookupError as error:
        return f"not tried: the text {error}"
    tests = files_of(mutation.tests, root)
    if not tests:
        return f"not tried: no file of tests is called {' or '.join(mutation.tests)}"
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return "caught (no end)"
    finally:
        path.write_text(before, encoding="utf-8")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 1 and failed:
        return f"caught by `{failed[0].split(' - ')[0].split(' ', 1)[1]}`"
    if done.returncode == 0:
        return "NOT CAUGHT"
    return f"not tried: pytest ended with {done.returncode}: {(failed or done.stdout.splitlines() or ['nothing'])[-1]}"


def write_table(rows: dict[str, dict[str, object]]) -> None:
    caught = sum(is_caught(row) for row in rows.values())
    lines = [
        "# Do the tests notice when the code is broken?",
        "",
        "`python -m benchmarks mutations`; each change alone, with the files of tests that should notice it, and the "
        f"first test that failed. {caught} of {len(rows)} changes are caught.",
        "",
        *markdown(
            ["change", "what the tests do", "commit"],
            ([name, row["outcome"], row["commit"]] for name, row in rows.items()),
        ),
    ]
    write_results("mutations", {"rows": rows}, lines)


def is_caught(row: dict[str, object]) -> bool:
    return str(row["outcome"]).startswith("caught")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", nargs="+", default=[""], metavar="NAME", help="only changes whose names contain one")


def main(arguments: argparse.Namespace) -> None:
    rows, commit = read_results("mutations").get("rows", {}), source_commit()
    chosen = [each for each in MUTATIONS if any(name in each.name for name in arguments.names)]
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = copied(Path(folder))
        try:
            for mutation in chosen:
                start = time.perf_counter()
                found = outcome(mutation, root)
                print(f"{mutation.name}: {found} ({time.perf_counter() - start:.0f} s)", flush=True)
                rows[mutation.name] = {"outcome": found, "commit": commit}
        finally:  # what is done stays when the run is interrupted
            write_table({each.name: rows[each.name] for each in MUTATIONS if each.name in rows})
    if not all(is_caught(rows[mutation.name]) for mutation in chosen):
        sys.exit(1)
