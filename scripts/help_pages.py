"""The tables of the nodes' help pages, made of the schemas; everything else on a page is written by hand.

usage (after `python3 scripts/test.py` has made .venv):
  help_pages.py    write the tables under "Inputs" and "Outputs" of every web/docs/NODE_ID.md anew
"""

from __future__ import annotations

import re
import sys
from typing import Any

import environment

PAGES = environment.ROOT / "web" / "docs"
_LONGEST_DEFAULT = 80
_TABLE = r"(?<=\n## {heading}\n\n)\|.*\n(?:\|.*\n)*"


def with_tables(page: str, schema: Any) -> str:
    """A help page with the tables of a node's inputs and outputs.

    Raises:
        ScriptError: when it has no table to replace.
    """
    inputs = [(item.id, _default(item), item.tooltip) for item in schema.inputs]
    outputs = [(item.display_name, item.tooltip) for item in schema.outputs]
    for heading, head, rows in (
        ("Inputs", "| Input | Default | |\n|---|---|---|\n", inputs),
        ("Outputs", "| Output | |\n|---|---|\n", outputs),
    ):
        table = head + "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
        page, count = re.subn(_TABLE.format(heading=heading), table.replace("\\", r"\\"), page)
        if count != bool(rows):
            raise environment.ScriptError(f"{schema.node_id}.md has {count} tables under '## {heading}'; write one.")
    return page


def _default(item: Any) -> str:
    """A widget's default, and of what need not be connected that it is optional."""
    value = getattr(item, "default", None)
    if value is None or value == "":
        return "optional" if item.optional else ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.8f}".rstrip("0") + "0" * value.is_integer()
    text = str(value)
    return "(several lines)" if "\n" in text or len(text) > _LONGEST_DEFAULT else text


def main() -> None:
    environment.enter()

    import load_pack

    load_pack.prepare_engine(cpu=True)
    load_pack.load_pack()
    from identity_edit_pack.nodes import NODE_CLASSES

    for schema in (node.define_schema() for node in NODE_CLASSES):
        path = PAGES / f"{schema.node_id}.md"
        path.write_text(with_tables(path.read_text(encoding="utf-8"), schema), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except environment.ScriptError as error:
        sys.exit(f"error: {error}")
