"""The rules of the house: imports, start-up, requirements and the files of the shipped workflows.

The one-way imports between the rooms are contracts of import-linter (pyproject.toml); here is what it cannot see.
"""

from __future__ import annotations

import ast
import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from page_workflows import read_layout

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("nodes", "pipelines", "attention", "demo_world")
PACK_FILES = [
    *(ROOT / "__init__.py", ROOT / "extension.py"),
    *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))),
]
SCRIPTS_BEFORE_VENV = (  # fmt: skip
    "demo.py",
    "test.py",
    "engine.py",
    "environment.py",
    "page_workflows.py",
    "api_workflows.py",
    "user_comfyui.py",
)
WORKFLOWS = ROOT / "workflows"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))


def imported(path: Path, *, only_at_start: bool = False) -> Iterator[str]:
    """The modules that a file imports absolutely; with only_at_start those alone that importing the file imports."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        is_type_checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if only_at_start and (is_function or is_type_checking):
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PACK_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_pack_imports_itself_relatively(path: Path) -> None:
    # `import nodes` would be ComfyUI's own module, or ours for whoever asks ComfyUI's.
    ours = {*ROOMS, "scripts", "tests", "benchmarks", "evaluation", "identity_edit_pack"}
    assert ours.isdisjoint(name.split(".")[0] for name in imported(path))


def test_the_entry_point_imports_no_torch() -> None:
    # A ComfyUI that is too old is told so before anything of it is imported.
    libraries = {name.split(".")[0] for name in imported(ROOT / "__init__.py")}
    assert libraries <= set(sys.stdlib_module_names)
    assert "torch" not in {name.split(".")[0] for name in imported(ROOT / "extension.py")}


OLD_ENGINE = """
import sys, types
if {version!r}:
    sys.modules["comfyui_version"] = types.SimpleNamespace(__version__={version!r})
import load_pack
before = set(sys.modules)
pack = load_pack.load_pack()
new = {{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
print("OFFERS", hasattr(pack, "comfy_entrypoint"), *new)
"""


@pytest.mark.parametrize("version", ["", "0.3.59", "0.2.9"])
def test_an_old_comfyui_is_told_in_one_sentence(version: str) -> None:
    code = OLD_ENGINE.format(version=version)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["OFFERS", "False", "identity_edit_pack"]
    (line,) = done.stderr.splitlines()
    said = version or "too old to say its version"
    assert line.endswith(f"ComfyUI-IdentityEdit needs ComfyUI 0.3.60 or newer and this one is {said}: update ComfyUI.")


@pytest.mark.parametrize("version", ["0.3.60", "0.3.100", "0.33.0", "1.0.0", "nightly"])
def test_a_newer_comfyui_is_let_through(version: str, pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfyui_version", SimpleNamespace(__version__=version))
    assert pack.too_old() is None


def test_no_comfyui_that_is_asked_for_is_turned_away(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r'requires-comfyui = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert found is not None
    monkeypatch.setitem(sys.modules, "comfyui_version", SimpleNamespace(__version__=found[1]))
    assert pack.too_old() is None


def test_the_console_names_the_versions_in_one_line(pack: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    import comfyui_version
    import torch

    with caplog.at_level("INFO"):
        asyncio.run(pack.comfy_entrypoint())
    (line,) = [record.getMessage() for record in caplog.records if "torch" in record.getMessage()]
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    versions = f"ComfyUI {comfyui_version.__version__}, torch {torch.__version__}"
    assert line == f"ComfyUI-IdentityEdit {found[1]} on {versions}" and line.isascii()


@pytest.mark.parametrize("name", SCRIPTS_BEFORE_VENV)
def test_scripts_start_with_the_standard_library(name: str) -> None:
    siblings = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    names = {name.split(".")[0] for name in imported(ROOT / "scripts" / name, only_at_start=True)}
    assert names - siblings <= set(sys.stdlib_module_names)
    # And so do the scripts that they import.
    assert names & siblings <= {Path(other).stem for other in SCRIPTS_BEFORE_VENV}


@pytest.mark.slow
def test_loading_the_pack_imports_no_further_library() -> None:
    """What ComfyUI has not loaded itself is imported when a node runs, so that ComfyUI starts no slower."""
    code = """
import asyncio, sys
import load_pack
load_pack.prepare_engine()
import nodes
asyncio.run(nodes.init_builtin_extra_nodes())
before = set(sys.modules)
pack = load_pack.load_pack()
extension = asyncio.run(pack.comfy_entrypoint())
assert asyncio.run(extension.get_node_list())
new = {name.split(".")[0] for name in set(sys.modules) - before}
print("NEW", *sorted(new - set(sys.stdlib_module_names) - {load_pack.PACK_NAME}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("NEW"))
    assert line.split()[1:] == []


def test_requirements_leave_the_users_torch_alone() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    for line in filter(None, lines):
        assert not line.startswith(("torch", "xformers", "insightface", "open_clip", "segment")), line
        assert "==" not in line and "<" not in line, f"{line} could replace what the user has"


def test_files_can_be_read_in_a_sitting() -> None:
    rooms = (*ROOMS, "scripts", "tests", "benchmarks", "evaluation")
    sizes = {path: path.stat().st_size for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > 40_000} == {}


def test_every_node_is_in_a_workflow() -> None:
    used = {node["class_type"] for name in NAMES for node in read_api(name).values()}
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} - used == set()


def test_captions_can_come_from_a_captioner_alone() -> None:
    """Images before Caption Images are loaded without caption files, which its notes call optional."""
    loaded = {}
    for name in NAMES:
        prompt = read_api(name)
        for node in prompt.values():
            if node["class_type"] == "IdentityEditCaptionImages":
                loaded[name] = prompt[node["inputs"]["subject"][0]]["inputs"].get("captions")
    assert len(loaded) >= 4 and "caption files" not in loaded.values(), loaded


def read_api(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def test_every_workflow_has_both_forms_a_layout_and_a_thumbnail() -> None:
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES
    assert sorted(path.stem for path in WORKFLOWS.glob("*.jpg")) == NAMES
    assert sorted(path.stem for path in (WORKFLOWS / "layout").glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_two_forms_of_a_workflow_have_the_same_nodes(name: str) -> None:
    """The exact comparison is made on the real page (tests/page); this one needs no browser."""
    prompt = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    page = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    read_layout(name, prompt)  # raises when it misses a node
    nodes, links = unfolded(page)
    on_page = {str(node["id"]): node["type"] for node in nodes if node["type"] != "MarkdownNote"}
    assert on_page == {key: node["class_type"] for key, node in prompt.items()}
    assert links == links_of_prompt(prompt)


def unfolded(page: dict[str, Any]) -> tuple[list[dict[str, Any]], set[tuple[str, int, str]]]:
    """The nodes, and (source node, its output number, target node) of every link, without subgraphs.

    A link in a subgraph begins at -10, its inputs, or ends at -20, its outputs.
    """
    subgraphs = {part["id"]: part for part in page.get("definitions", {}).get("subgraphs", [])}
    nodes = [node for node in page["nodes"] if node["type"] not in subgraphs]
    links = [(link[1], link[2], link[3], link[4]) for link in page["links"]]
    for folded in (node for node in page["nodes"] if node["type"] in subgraphs):
        part = subgraphs[folded["type"]]
        nodes += part["nodes"]
        inner = [
            [link[f"{end}_{what}"] for end in ("origin", "target") for what in ("id", "slot")] for link in part["links"]
        ]
        entering = {slot: source for *source, target, slot in links if target == folded["id"]}
        leaving = {slot: source for *source, target, slot in inner if target == -20}
        inside = [
            (*(entering[source_slot] if source == -10 else (source, source_slot)), target, slot)
            for source, source_slot, target, slot in inner
            if target != -20 and (source != -10 or source_slot in entering)
        ]
        outside = [
            (*(leaving[source_slot] if source == folded["id"] else (source, source_slot)), target, slot)
            for source, source_slot, target, slot in links
            if target != folded["id"]
        ]
        links = inside + outside
    return nodes, {(str(source), slot, str(target)) for source, slot, target, _ in links}


def links_of_prompt(prompt: dict[str, Any]) -> set[tuple[str, int, str]]:
    return {
        (value[0], value[1], key)
        for key, node in prompt.items()
        for value in node["inputs"].values()
        if isinstance(value, list)
    }
