"""What the user reads of every node: ids, names, tooltips, defaults and help pages."""

from __future__ import annotations

import asyncio
import inspect
import re
from typing import Any

import pytest
from comfy_api.latest import io
from help_pages import PAGES, with_tables
from identity_edit_pack.nodes import NODE_CLASSES

SCHEMAS = [node.define_schema() for node in NODE_CLASSES]
NOT_NOUNS = {
    "From", "On", "Off", "Computes", "Also", "Which", "How", "Connect", "Of", "In", "What", "Whether", "Save", "Keeps",
}  # fmt: skip
SMALL_WORDS = {"a", "and", "as", "by", "from", "of", "the", "to", "with"}
CATEGORIES = (
    "inversion", "editing without inversion", "text", "masks", "subject", "attention control", "portrait", "face",
    "keep the rest", "evaluation",
    "demo",
)  # fmt: skip


def test_ids_are_unique_and_prefixed() -> None:
    ids = [schema.node_id for schema in SCHEMAS]
    assert len(set(ids)) == len(ids)
    assert all(node_id.startswith("IdentityEdit") and node_id.isalnum() for node_id in ids)


def test_names_are_in_title_case_and_unique() -> None:
    names = [schema.display_name for schema in SCHEMAS]
    assert len(set(names)) == len(names)
    for name in names:
        words = [word.strip("()") for word in name.replace("-", " ").split()]
        assert all(word[0].isupper() or word in SMALL_WORDS for word in words), name


def test_categories_are_those_of_the_pack() -> None:
    categories = {schema.category for schema in SCHEMAS}
    assert categories <= {f"identity edit/{name}" for name in CATEGORIES}


def test_everything_is_explained_in_sentences() -> None:
    for schema in SCHEMAS:
        texts = {"description": schema.description}
        texts |= {f"input {item.id}": item.tooltip for item in schema.inputs}
        texts |= {f"output {item.id}": item.tooltip for item in schema.outputs}
        for what, text in texts.items():
            assert text and text[0] == text[0].upper() and text.endswith("."), f"{schema.node_id}: {what}: {text}"
            if what != "description":  # the thing's noun comes first
                assert text.replace(":", " ").split()[0] not in NOT_NOUNS, f"{schema.node_id}: {what}: {text}"


def test_input_and_output_ids_are_all_different() -> None:
    for schema in SCHEMAS:
        schema.validate()
        outputs = [item.id for item in schema.outputs]
        assert all(outputs), f"{schema.node_id} has an output without an id"
        assert all(item.display_name for item in schema.outputs), schema.node_id


def test_defaults_can_be_chosen() -> None:
    for schema in SCHEMAS:
        for item in schema.inputs:
            default: Any = getattr(item, "default", None)
            if isinstance(item, (io.Int.Input, io.Float.Input)):
                assert item.min <= default <= item.max, f"{schema.node_id}: {item.id}"
                # The page rounds to multiples of `round`, or else of `step`: the default must survive that.
                grid = getattr(item, "round", None) or item.step or 1
                assert abs(default / grid - round(default / grid)) < 1e-6, f"{schema.node_id}: {item.id}"
            elif isinstance(item, io.Combo.Input) and item.options and default is not None:
                assert default in item.options, f"{schema.node_id}: {item.id}"


def test_an_optional_input_has_one_default() -> None:
    """An API prompt that leaves it out gets the signature's, the page the schema's."""
    for node, schema in zip(NODE_CLASSES, SCHEMAS, strict=True):
        parameters = inspect.signature(node.execute).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for item in schema.inputs:
            default = getattr(item, "default", None)
            if item.optional and not (open_ended and item.id not in parameters):
                own = parameters[item.id].default
                assert own == default, f"{schema.node_id}: {item.id} is {own!r} in execute and {default!r} on the page"


@pytest.mark.parametrize("left_out", ["seed", "guidance_scale", "conditions", "settings"])
def test_prompts_may_leave_out_optional_inputs_and_no_others(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CONTRIBUTING.md says: ComfyUI itself asks for every required input, with a default or without."""
    import execution

    import nodes

    node = next(node for node in NODE_CLASSES if node.define_schema().node_id == "IdentityEditGeneratePairs")
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Pairs", node)
    inputs = {item.id: item.default for item in node.define_schema().inputs if hasattr(item, "default")}
    prompt = {
        "1": {"class_type": "Pairs", "inputs": {name: value for name, value in inputs.items() if name != left_out}}
    }
    _, errors, _ = asyncio.run(execution.validate_inputs("id", prompt, "1", {}))
    missing = [error["extra_info"]["input_name"] for error in errors if error["type"] == "required_input_missing"]
    assert (left_out in missing) == (left_out in ("seed", "guidance_scale"))


def test_seeds_can_be_fixed_or_drawn_anew() -> None:
    seeds = [item for schema in SCHEMAS for item in schema.inputs if item.id == "seed"]
    assert seeds and all(item.control_after_generate for item in seeds)


def test_advanced_widgets_have_a_default_and_reach_the_page() -> None:
    marked = {}
    for node in NODE_CLASSES:
        for group in node.GET_NODE_INFO_V1()["input"].values():
            options = {name: specification[-1] for name, specification in group.items()}
            marked |= {(node, name): each for name, each in options.items() if "advanced" in each}
    assert marked and all("default" in options and options["advanced"] is True for options in marked.values())


def test_help_pages_have_the_schemas_tables() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == {schema.node_id for schema in SCHEMAS}
    for schema in SCHEMAS:
        page = (PAGES / f"{schema.node_id}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}\n")
        assert with_tables(page, schema) == page, f"{schema.node_id}: run `python3 scripts/help_pages.py`"
        first = schema.inputs[0].id if schema.inputs else schema.outputs[0].display_name
        assert f"\n| {first} |" in page, schema.node_id


def test_the_images_of_help_pages_are_there_small_and_shown() -> None:
    shown = [name for path in PAGES.glob("*.md") for name in re.findall(r"!\[.+\]\((.+)\)", path.read_text("utf-8"))]
    assert len(shown) >= 10 and set(shown) == {path.name for path in PAGES.glob("*.webp")}
    assert all((PAGES / name).stat().st_size <= 40_000 for name in shown)


def test_search_aliases_are_set_where_comfyui_has_them(monkeypatch: Any) -> None:
    import dataclasses

    from identity_edit_pack.nodes import sockets

    newer = dataclasses.make_dataclass(
        "Schema", [("search_aliases", list, dataclasses.field(default=None))], bases=(io.Schema,)
    )
    monkeypatch.setattr(sockets.io, "Schema", newer)
    schema = sockets.schema(node_id="Any", category="text", search_aliases=["imagic"])
    assert schema.search_aliases == ["imagic"] and schema.category == "identity edit/text"
