"""Prompts for the regularization set: part of the editing-oriented data augmentation.

A model that learns one subject forgets its class. Ruiz et al. 2023 prevent this by also training on images of the
class; Liu et al. 2024 (section 2.1) generate these from detailed prompts that GPT-4 writes from two instructions
(tables 4 and 5). Here the prompts come from a local language model, an OpenAI-compatible endpoint, or the shipped list.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..engine.host import stop_if_interrupted
from ..networks.language_models import TEXT, load_language_model
from ..shared.errors import IdentityEditError
from .words import has_word, with_article

KEYWORD = "{keyword}"
"""Placeholder of the class word in an instruction."""

_INTRODUCTION = (
    "You are a master of prompt engineering, it is important to create detailed prompts with as much information "
    "as possible. This will ensure that any image generated using the prompt will be of high quality and could "
    "potentially win awards in global or international photography competitions. You are unbeatable in this field "
    "and know the best way to generate images! "
)
INSTRUCTION_TABLE_4 = _INTRODUCTION + (
    "I will provide you with a keyword, and you will generate 20 different types of prompts with this keyword in "
    "sentence format. Your generated prompts should be realistic and complete. Your prompts should consist of the "
    "style, subject, action, background and quality of an image. Remember all the prompts must include the "
    'keyword. Please note that all prompts must contain the word "keyword". For example, "an eagle" is not allowed '
    "if I give you the keyword \"bird\". My first keyword is '{keyword}'."
)
INSTRUCTION_TABLE_5 = _INTRODUCTION + (
    "I will provide you with a keyword, and you will generate 50 different types of prompts using this keyword. "
    "Your generated prompts should be realistic and complete. Your prompts should consist of the style, subject, "
    'action, background, and quality of an image. Here are two good examples of prompts: "Urban portrait of a '
    'skateboarder in mid-jump, graffiti walls background, high shutter speed.". "Art Nouveau painting of a female '
    'botanist surrounded by exotic plants in a greenhouse." Here are some requirements that you must obey: 1. The '
    "prompts mustn't describe any situation that doesn't exist. For example, \"dog wearing sunglasses and a "
    'bandana." doesn\'t satisfy the requirement. 2. The prompt must include the keyword. For example, "a '
    'retriever" doesn\'t satisfy the requirements if I give you the keyword "dog". 3. Only one subject is included '
    'in every prompt. For example, "a dog and a cat" doesn\'t satisfy the requirements. My first keyword is '
    "'{keyword}'."
)
"""Liu et al. 2024, tables 4 and 5, word for word but for the last one: their keywords are 'boy' and 'dog'."""

KINDS = ("animal", "person", "object")
"""What the class word may name; the shipped list has actions for each."""

MOST_PROMPTS = 2000
MAX_NEW_TOKENS = 4096
"""[choice] Room for the 50 prompts that table 5 asks for."""

URL_VARIABLE = "IDENTITY_EDIT_LLM_URL"
MODEL_VARIABLE = "IDENTITY_EDIT_LLM_MODEL"
KEY_VARIABLE = "IDENTITY_EDIT_LLM_KEY"
CONNECT_TIMEOUT, ANSWER_TIMEOUT = 10.0, 180.0
"""Seconds to wait for the endpoint's connection and for its answer."""

_FRUITLESS_ANSWERS = 3
"""Maximum number of consecutive answers without a new prompt."""

_LIST = Path(__file__).with_suffix(".json")

Ask = Callable[[str, int], str]
"""ask(instruction, seed) gives a language model's answer."""


def shipped_prompts(class_word: str, count: int, seed: int, kind: str = KINDS[0]) -> list[str]:
    """Prompts from the shipped list, each a style, an action, a background, a view and a quality; all different.

    Every entry of a part is used once before any is repeated, so that small sets are varied, too.

    Args:
        class_word: such as "dog".
        count: 1 to 2000.
        seed: the same seed gives the same prompts.
        kind: one of KINDS.

    Raises:
        IdentityEditError: when the class word is empty, the count is out of range, or the kind is unknown.
    """
    class_word = _check(class_word, count)
    if kind not in KINDS:
        raise IdentityEditError(f"kind is '{kind}'; choose one of {', '.join(KINDS)}.")
    parts: dict[str, Any] = json.loads(_LIST.read_text(encoding="utf-8"))
    generator = random.Random(seed)
    styles, actions, backgrounds, views, qualities = (
        _shuffled_rounds(entries, generator)
        for entries in (
            parts["styles"],
            parts["actions"][kind],
            parts["backgrounds"],
            parts["views"],
            parts["qualities"],
        )
    )
    name = with_article(class_word)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompt = f"{next(styles)} of {name} {next(actions)}, {next(backgrounds)}, {next(views)}"
        prompts[f"{prompt}, {next(qualities)}"] = None
    return list(prompts)


def own_prompts(text: str, class_word: str, count: int) -> list[str]:
    """The user's prompts, one a line, from the first again where there are fewer than `count`.

    Raises:
        IdentityEditError: when there is none, or one lacks the class word.
    """
    class_word = _check(class_word, count)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if not has_word(line, class_word):
            raise IdentityEditError(
                f"The prompt '{line}' of own_prompts lacks the class word '{class_word}'; write it where it belongs."
            )
    if not lines:
        raise IdentityEditError("own_prompts is empty; write one prompt per line, or choose another source.")
    return [lines[number % len(lines)] for number in range(count)]


def written_prompts(
    ask: Ask,
    class_word: str,
    count: int,
    seed: int,
    instructions: tuple[str, ...] = (INSTRUCTION_TABLE_4, INSTRUCTION_TABLE_5),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[str], list[str]]:
    """Prompts that a language model writes, asked with each instruction in turn until there are enough.

    Args:
        ask: gives the model's answer, see `asked_model` and `ask_endpoint`.
        class_word: the keyword; prompts without it are dropped.
        count: 1 to 2000.
        seed: of the first answer; each further answer has the next one.
        instructions: what to ask, with {keyword} for the class word.
        progress: called as progress(number of prompts, count) after each answer.

    Returns:
        at most `count` different prompts, and notes for the user.

    Raises:
        IdentityEditError: when an instruction lacks {keyword}, or no answer holds a prompt.
    """
    class_word = _check(class_word, count)
    instructions = tuple(instruction for instruction in instructions if instruction.strip())
    if not instructions or any(KEYWORD not in instruction for instruction in instructions):
        raise IdentityEditError(
            f"An instruction lacks {KEYWORD}, which stands for the class word; write it where the keyword belongs."
        )
    prompts: dict[str, None] = {}
    answers = dropped = fruitless = 0
    while len(prompts) < count and fruitless < _FRUITLESS_ANSWERS:
        instruction = instructions[answers % len(instructions)].replace(KEYWORD, class_word)
        reply = ask(instruction, (seed + answers) % 2**64)
        entries = reply_entries(reply)
        found = [entry for entry in entries if has_word(entry, class_word)]
        before = len(prompts)
        prompts.update(dict.fromkeys(found))
        answers, dropped = answers + 1, dropped + len(entries) - len(found)
        fruitless = 0 if len(prompts) > before else fruitless + 1
        if progress is not None:
            progress(min(len(prompts), count), count)
    if not prompts:
        raise IdentityEditError(
            f"None of the language model's {answers} answers contained a prompt with the word '{class_word}'; choose "
            f"another model, or the shipped list."
        )
    notes = [f"{answers} answers of the language model; {dropped} of their prompts lacked '{class_word}'."]
    if len(prompts) < count:
        notes.append(
            f"Only {len(prompts)} different prompts instead of {count}; raise the temperature, or ask for fewer."
        )
    return list(prompts)[:count], notes


def reply_entries(reply: str) -> list[str]:
    """The entries of a list in a language model's answer: its numbered or bulleted lines, or else all of its lines.

    Removes quotation marks, Markdown emphasis, and the thinking of reasoning models.
    """
    reply = reply.rsplit("</think>", maxsplit=1)[-1]
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    marked = [found.group(1) for line in lines if (found := re.match(r"(?:\W*\d+\s*[.):]|[-*•–])\s*(.+)", line))]
    entries = marked or [line for line in lines if not line.endswith(":")]
    return [clean for entry in entries if (clean := entry.strip(" \t\"'“”‘’*_`"))]


def model_prompts(
    path: str,
    class_word: str,
    count: int,
    seed: int,
    instructions: tuple[str, ...] = (INSTRUCTION_TABLE_4, INSTRUCTION_TABLE_5),
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[str], list[str]]:
    """`written_prompts` of a transformers language model in the folder `path`."""
    _check(class_word, count)
    with load_language_model(path, TEXT) as model:

        def ask(instruction: str, answer_seed: int) -> str:
            return model.ask(instruction, max_new_tokens=max_new_tokens, temperature=temperature, seed=answer_seed)

        return written_prompts(ask, class_word, count, seed, instructions, progress)


def endpoint_prompts(
    class_word: str,
    count: int,
    seed: int,
    instructions: tuple[str, ...] = (INSTRUCTION_TABLE_4, INSTRUCTION_TABLE_5),
    *,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    timeout: tuple[float, float] = (CONNECT_TIMEOUT, ANSWER_TIMEOUT),
) -> tuple[list[str], list[str]]:
    """`written_prompts` of the OpenAI-compatible endpoint that the environment variables name.

    IDENTITY_EDIT_LLM_URL is its base, such as http://localhost:11434/v1, IDENTITY_EDIT_LLM_MODEL the model's name, and
    IDENTITY_EDIT_LLM_KEY the key, where it asks for one. Only the instructions are sent.
    """

    def ask(instruction: str, answer_seed: int) -> str:
        stop_if_interrupted()
        return ask_endpoint(instruction, answer_seed, temperature, timeout)

    return written_prompts(ask, class_word, count, seed, instructions, progress)


def ask_endpoint(instruction: str, seed: int, temperature: float, timeout: tuple[float, float]) -> str:
    """The answer of the endpoint's model, by one POST to its chat/completions.

    Raises:
        IdentityEditError: when a variable is missing, the endpoint cannot be reached, takes too long, or answers
            something else than a chat completion; the key is in no message.
    """
    import requests  # ComfyUI's own choice, for its front end's updates

    url, model, key = _endpoint()
    body = {
        "model": model,
        "messages": [{"role": "user", "content": instruction}],
        "temperature": temperature,
        "seed": seed % 2**31,
    }

    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        # As `auth`, because requests lets a .netrc entry replace an Authorization header given as `headers`.
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    try:
        response = requests.post(url, json=body, auth=authorize, timeout=timeout, allow_redirects=False)
    except requests.Timeout as error:
        raise IdentityEditError(
            f"The endpoint {url} did not answer within {timeout[1]:g} seconds; check that it is running, or choose a "
            f"smaller model."
        ) from error
    except requests.RequestException as error:
        raise IdentityEditError(
            f"The endpoint {url} cannot be reached ({type(error).__name__}); check that it is running and that "
            f"{URL_VARIABLE} is right."
        ) from error
    if response.status_code != 200:
        said = " ".join(response.text.split())[:200]
        said = said.replace(key, "...") if key else said
        raise IdentityEditError(
            f"The endpoint {url} refused the request with status {response.status_code} ({said}); check "
            f"{URL_VARIABLE}, {MODEL_VARIABLE} and {KEY_VARIABLE}."
        )
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise IdentityEditError(
            f"The endpoint {url} did not answer with a chat completion; {URL_VARIABLE} must be the base of an "
            f"OpenAI-compatible interface, such as http://localhost:11434/v1."
        ) from error
    return content if isinstance(content, str) else ""


def _endpoint() -> tuple[str, str, str]:
    """The address of chat/completions, the model's name and the key, from the environment."""
    url, model, key = (os.environ.get(name, "").strip() for name in (URL_VARIABLE, MODEL_VARIABLE, KEY_VARIABLE))
    for name, value, example in ((URL_VARIABLE, url, "http://localhost:11434/v1"), (MODEL_VARIABLE, model, "llama3.1")):
        if not value:
            raise IdentityEditError(
                f"The environment variable {name} is not set; set it (such as {example}) and start ComfyUI again, or "
                f"choose the shipped list."
            )
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
        raise IdentityEditError(
            f"{URL_VARIABLE} is no address of an endpoint; set it to one such as http://localhost:11434/v1, and "
            f"the key in {KEY_VARIABLE}."
        )
    url = url.rstrip("/")
    return (url if url.endswith("/chat/completions") else f"{url}/chat/completions"), model, key


def _check(class_word: str, count: int) -> str:
    """The class word without spaces around it."""
    class_word = " ".join(class_word.split())
    if not class_word:
        raise IdentityEditError("class_word is empty; write what the subject is, such as 'dog'.")
    if not 1 <= count <= MOST_PROMPTS:
        raise IdentityEditError(f"count is {count}; choose a number from 1 to {MOST_PROMPTS}.")
    return class_word


def _shuffled_rounds(entries: list[str], generator: random.Random) -> Iterator[str]:
    """An endless stream of the entries in random order; each occurs once before any is repeated."""
    while True:
        yield from generator.sample(entries, len(entries))
