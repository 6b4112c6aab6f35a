"""The texts of the nodes in other languages: what ComfyUI's page needs of them, and what is missing or out of date.

`locales/LANGUAGE/nodeDefs.json` holds what the page shows, in the form of ComfyUI's own translations.
`locales/english.json` holds the English texts that were translated, in the same form: where a node's text differs from
it, the translations are out of date. The page does not read it.

usage (after `python3 scripts/test.py` has made .venv):
  translations.py check     say which texts are missing, out of date or left over
  translations.py accept    after translating: write english.json anew, put every language into the nodes' order
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import environment

LOCALES = environment.ROOT / "locales"
ENGLISH = LOCALES / "english.json"
LANGUAGES = ("zh", "ja")

Texts = dict[str, str]
"""A text for each place, such as "IdentityEditDiffEdit.inputs.mask.tooltip"."""


def english_texts(schemas: list[Any]) -> dict[str, Any]:
    """What the page shows of the nodes, in the form of nodeDefs.json: `{node id: {display_name, description, inputs:
    {input id: {name, tooltip}}, outputs: {number: {name, tooltip}}}}`."""
    return {
        schema.node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {item.id: {"name": item.id, "tooltip": item.tooltip} for item in schema.inputs},
            "outputs": {
                str(number): {"name": item.display_name, "tooltip": item.tooltip}
                for number, item in enumerate(schema.outputs)
            },
        }
        for schema in schemas
    }


def flat(nested: dict[str, Any], before: str = "") -> Texts:
    """Every text of a nodeDefs.json by its place. Node and input ids have no dots."""
    texts: Texts = {}
    for key, value in nested.items():
        texts |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return texts


def in_order_of(pattern: dict[str, Any], nested: dict[str, Any]) -> dict[str, Any]:
    """The entries that `pattern` has too, in its order."""
    return {
        key: in_order_of(value, nested[key]) if isinstance(value, dict) else nested[key]
        for key, value in pattern.items()
        if key in nested
    }


def for_page(text: str) -> str:
    """A text in the message syntax of the page (vue-i18n), in which these characters have meanings of their own."""
    return re.sub(r"[{}@|]", lambda found: f"{{'{found[0]}'}}", text)


def shown(message: str) -> str:
    """What the page shows of a message: `for_page` undone."""
    return re.sub(r"\{'([{}@|])'\}", r"\1", message)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, nested: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(nested, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def findings(english: dict[str, Any]) -> list[str]:
    """A line for each text that a language lacks, has too much, or has of another English text than the nodes' own."""
    now, then = flat(english), flat(read(ENGLISH))
    lines = [f"translated from another English text: {place}" for place in now if now[place] != then.get(place)]
    for language in LANGUAGES:
        texts = flat(read(LOCALES / language / "nodeDefs.json"))
        lines += [f"{language} lacks {place}: {now[place]}" for place in now if not texts.get(place)]
        lines += [f"{language} has left over {place}" for place in texts if place not in now]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "accept"])
    command = parser.parse_args().command
    environment.enter()

    import load_pack

    load_pack.prepare_engine(cpu=True)
    load_pack.load_pack()
    from identity_edit_pack.nodes import NODE_CLASSES

    english = english_texts([node.define_schema() for node in NODE_CLASSES])
    if command == "accept":
        write(ENGLISH, english)
        for language in LANGUAGES:
            path = LOCALES / language / "nodeDefs.json"
            write(path, in_order_of(english, read(path)))
    lines = findings(english)
    print("\n".join(lines) or "Every text is translated.")
    return 1 if lines else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except environment.ScriptError as error:
        sys.exit(f"error: {error}")
