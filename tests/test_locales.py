"""Chinese and Japanese: complete, faithful where a machine can see it, served to the page (tests/page shows them)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING

import pytest
from comfy_api.latest import io
from identity_edit_pack.nodes import NODE_CLASSES
from translations import LANGUAGES, LOCALES, english_texts, findings, flat, for_page, read, shown

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer

SCHEMAS = [node.define_schema() for node in NODE_CLASSES]
ENGLISH = english_texts(SCHEMAS)
TEXTS = {language: flat(read(LOCALES / language / "nodeDefs.json")) for language in LANGUAGES}
SCRIPTS = {"zh": "[\u4e00-\u9fff]", "ja": "[\u3040-\u30ff]"}
"""A character that a sentence of the language has: a Han character; kana, which a Chinese text would not have."""
QUOTED = {"zh": "“([^”]+)”", "ja": "「([^」]+)」"}
TRANSLATED_BY_COMFYUI = {"text"}
"""Categories that ComfyUI's own translations have."""


def sentences(language: str) -> Iterator[tuple[str, str, str]]:
    """Place, English text and translation of every description and tooltip, as they are shown."""
    english = flat(ENGLISH)
    for place, text in TEXTS[language].items():
        if place in english and place.rpartition(".")[2] in ("description", "tooltip"):
            yield place, english[place], shown(text)


def test_every_text_is_translated_and_nothing_is_left_over() -> None:
    lines = findings(ENGLISH)
    assert not lines, "translate, then run `python3 scripts/translations.py accept`:\n" + "\n".join(lines)


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_in_the_language(language: str) -> None:
    for place, _english, text in sentences(language):
        assert re.search(SCRIPTS[language], text) and text.endswith("。"), f"{place}: {text}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_figures_are_those_of_the_english_text(language: str) -> None:
    number = re.compile(r"\d+(?:\.\d+)*")
    for place, english, text in sentences(language):
        wanted, found = set(number.findall(english)), set(number.findall(text))
        assert wanted <= found, f"{place} lacks {wanted - found}: {text}"
        # What is a word in English ("three to five images") may be a figure here.
        assert all(value.isdigit() and int(value) <= 10 for value in found - wanted), f"{place}: {found - wanted}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_papers_files_and_code_words_stay(language: str) -> None:
    kept = re.compile(
        r"[A-Z][\w-]+ et al\. \d{4}"  # papers
        r"|[\w.-]*[\w{}][_/{}][\w./{}-]*\w|\{\w*\}|\.\w{2,11}\b"  # code words, placeholders, endings of files
        r"|(?<!\w)'([\w ,:.]+)'(?!\w)"  # what is typed
    )
    names = TEXTS[language]
    for place, english, text in sentences(language):
        node = place.split(".")[0]
        for found in kept.finditer(english):
            word = found[1] or found[0]
            name = names.get(f"{node}.inputs.{word}.name", word)  # an input is called what the page calls it
            if "source prompt" not in word:  # words that stand for what is typed are translated
                assert word in text or name in text, f"{place} lacks {word}: {text}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_one_english_text_has_one_translation(language: str) -> None:
    translations: dict[str, str] = {}
    for place, english, text in sentences(language):
        assert translations.setdefault(english, text) == text, place


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_in_quotation_marks_are_names_on_the_page(language: str) -> None:
    """A node or an input that a sentence mentions is called as the page calls it: by these files, or, where it is
    ComfyUI's own, by the translations that ComfyUI's page brings."""
    texts = TEXTS[language]
    nodes = {text for place, text in texts.items() if place.endswith(".display_name")}
    static = resources.files("comfyui_frontend_package") / "static" / "assets"
    files = [path for path in static.iterdir() if path.name.startswith("nodeDefs-") and path.name.endswith(".js")]
    comfyui = "".join(path.read_text(encoding="utf-8") for path in files)
    for place, _english, text in sentences(language):
        node = place.split(".")[0]
        here = {value for key, value in texts.items() if key.startswith(f"{node}.") and key.endswith(".name")}
        for name in re.findall(QUOTED[language], text):
            if name.isascii():  # what is typed, or chosen
                continue
            is_comfyui = any(f"name:{quote}{name}{quote}" in comfyui for quote in "\"'`")  # as it was minified
            assert name in nodes | here or is_comfyui, f"{place} mentions {name}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_differ_within_a_node(language: str) -> None:
    texts = TEXTS[language]
    names = [text for place, text in texts.items() if place.endswith(".display_name")]
    assert len(set(names)) == len(names)
    for node in ENGLISH:
        for side in ("inputs", "outputs"):
            names = [text for place, text in texts.items() if re.fullmatch(rf"{node}\.{side}\.\w+\.name", place)]
            assert len(set(names)) == len(names), f"{node}: {names}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_messages_say_literally_what_they_show(language: str) -> None:
    """Braces and bars have meanings in the page's message syntax: unescaped, {subject} would vanish."""
    for place, message in TEXTS[language].items():
        assert for_page(shown(message)) == message, place


@pytest.mark.parametrize("language", LANGUAGES)
def test_categories_and_sockets_have_names(language: str) -> None:
    main = read(LOCALES / language / "main.json")
    categories = {part for schema in SCHEMAS for part in schema.category.split("/")}
    assert set(main["nodeCategories"]) == categories - TRANSLATED_BY_COMFYUI
    stock = {getattr(kind, "io_type", None) for kind in vars(io).values()}
    sockets = {item.io_type for schema in SCHEMAS for item in (*schema.inputs, *schema.outputs)}
    assert set(main["dataTypes"]) == sockets - stock


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_server_hands_them_to_the_page(language: str, server: RunningServer) -> None:
    served = server.client.get("/i18n").json()[language]
    assert flat(served["nodeDefs"]) == TEXTS[language]
    assert {key: served[key] for key in ("nodeCategories", "dataTypes")} == read(LOCALES / language / "main.json")
