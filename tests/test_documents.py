"""What the documents and the release say of the repository is so."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import load_pack
import pytest
from page_workflows import pack_release
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "LICENSES.md", "CHANGELOG.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
)  # fmt: skip
REQUIREMENT = re.compile(r"^([A-Za-z0-9_.-]+)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def required(name: str) -> list[str]:
    """The requirements in a list, without comments."""
    lines = [line.split("#")[0].strip() for line in read(name).splitlines()]
    return [line for line in lines if line]


def pyproject() -> str:
    return read("pyproject.toml")


def test_architecture_names_every_file_of_the_rooms_once() -> None:
    sections = re.split(r"^## ", read("ARCHITECTURE.md"), flags=re.MULTILINE)
    for room in ("attention", "pipelines", "nodes", "demo_world"):
        section = next(part for part in sections if part.startswith(f"{room}/"))
        named = Counter(re.findall(r"`([a-z0-9_]+\.py)`", section))
        files = Counter(path.name for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py")
        assert named == files, room
        if room in ("attention", "pipelines"):  # each with a few words on what it holds
            assert set(re.findall(r"`([a-z0-9_]+\.py)`(?:: | \(| \| )\w", section)) == set(files), room


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_files_in_documents_exist(name: str) -> None:
    text = read(name)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    paths = re.findall(
        r"`((?:scripts|tests|benchmarks|evaluation|workflows|locales|web|nodes|pipelines|attention)/[\w./-]+)`", text
    )
    paths = [path for path in paths if not re.search(r"NAME|NODE_ID", path)]
    folder = (ROOT / name).parent
    missing = [link for link in links if link and not (folder / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_every_workflow_is_in_the_documents_and_the_changelog() -> None:
    for path in (ROOT / "workflows").glob("*.json"):
        for document in ("docs/workflows.md", "CHANGELOG.md"):
            assert f"`{path.stem}`" in read(document), f"{path.stem}, {document}"


def test_every_node_is_in_the_documents_under_its_category(node_classes: dict[str, type]) -> None:
    table = {}
    for line in read("docs/nodes.md").splitlines():
        if line.startswith("| ") and " · " in line or line.startswith(("| evaluation", "| demo")):
            category, names = [cell.strip() for cell in line.strip("|").split("|")]
            table[category] = [name.strip() for name in names.split(" · ")]
    expected: dict[str, list[str]] = {}
    for node in node_classes.values():
        schema = node.GET_SCHEMA()  # type: ignore[attr-defined]
        expected.setdefault(schema.category.removeprefix("identity edit/"), []).append(schema.display_name)
    assert {key: sorted(value) for key, value in table.items()} == {k: sorted(v) for k, v in expected.items()}


def test_every_library_has_its_license_listed() -> None:
    optional = re.findall(
        r'"([a-zA-Z0-9_.-]+)"', pyproject().split("[project.optional-dependencies]")[1].split("\n\n")[0]
    )
    assert optional
    listed = read("LICENSES.md")
    for line in (*required("requirements.txt"), *required("scripts/requirements.txt"), *optional):
        name = REQUIREMENT.match(line)
        assert name and re.search(rf"[| ,]{re.escape(name.group(1))}[ ,|]", listed), line


def test_the_registry_reads_the_release_as_it_is_meant() -> None:
    """By ComfyUI's own reader of pyproject.toml, which the registry shares."""
    from comfy_config.config_parser import extract_node_configuration

    oldest = sys.modules[load_pack.PACK_NAME].OLDEST_COMFYUI
    found = extract_node_configuration(str(ROOT))
    assert found is not None
    assert found.project.name == pack_release()["id"] and "comfyui" not in found.project.name.lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", found.project.version)
    assert sorted(found.project.dependencies) == sorted(required("requirements.txt"))
    assert found.project.supported_os == ["OS Independent"] and found.project.supported_comfyui_version == f">={oldest}"
    assert (ROOT / found.project.license.file).is_file()
    assert found.tool_comfy.publisher_id and found.tool_comfy.display_name
    assert re.search(rf"^## {re.escape(found.project.version)}\b", read("CHANGELOG.md"), re.MULTILINE)


def test_workflows_say_which_version_they_were_made_with() -> None:
    release = pack_release()
    for path in (ROOT / "workflows").glob("*.json"):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        assert workflow["extra"]["identityEdit"] == {"version": release["version"]}, path.name
        for node in workflow["nodes"]:
            if node["type"].startswith("IdentityEdit"):
                assert node["properties"]["cnr_id"] == release["id"], path.name
                assert node["properties"]["ver"] == release["version"], path.name


def test_the_registry_finds_the_repository_and_its_images() -> None:
    fields = dict(re.findall(r'^(Repository|Icon|Banner) = "(.+)"$', pyproject(), re.MULTILINE))
    assert set(fields) == {"Repository", "Icon", "Banner"}
    sizes = {}
    for name in ("Icon", "Banner"):
        address, path = fields[name].split("/raw/HEAD/")
        assert address == fields["Repository"]
        with Image.open(ROOT / path) as image:
            sizes[name] = image.size
    width, height = sizes["Icon"]
    assert width == height <= 400
    width, height = sizes["Banner"]
    assert width * 9 == height * 21
