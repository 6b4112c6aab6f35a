"""Regularization prompts: the shipped list, a tiny language model, and an endpoint on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.subjects import regularization_prompts as prompts
from identity_edit_pack.tests import tiny_language_models as tiny

SHIPPED = json.loads(Path(prompts.__file__).with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("kind", "class_word"), list(zip(prompts.KINDS, ("dog", "old woman", "umbrella"), strict=True))
)
def test_the_shipped_list_is_varied(kind: str, class_word: str) -> None:
    count = 250
    found = prompts.shipped_prompts(class_word, count, seed=5, kind=kind)
    assert len(set(found)) == count
    article = "a" if class_word == "dog" else "an"
    assert all(f" of {article} {class_word} " in prompt for prompt in found)
    for part in (SHIPPED["styles"], SHIPPED["actions"][kind], SHIPPED["backgrounds"], SHIPPED["views"]):
        # Some entries begin as others do ("lying down"), so an entry is counted where it is followed by a separator.
        used = Counter(entry for prompt in found for entry in part if f"{entry}," in prompt or f"{entry} of" in prompt)
        assert set(used) == set(part), "every style, action, background and view is used"
        assert max(used.values()) <= 1 + count // len(part) + 1, "and as often as the others"
    assert prompts.shipped_prompts(class_word, count, seed=5, kind=kind) == found
    assert prompts.shipped_prompts(class_word, count, seed=6, kind=kind) != found
    assert prompts.shipped_prompts(class_word, 10, seed=5, kind=kind) == found[:10]


def test_the_longest_list_can_be_had() -> None:
    assert len(set(prompts.shipped_prompts("cup", prompts.MOST_PROMPTS, seed=0, kind="object"))) == 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [({"class_word": " "}, "class_word is empty"), ({"count": 0}, "count is 0"), ({"kind": "car"}, "kind is 'car'")],
)
def test_bad_requests_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(IdentityEditError, match=message):
        prompts.shipped_prompts(**{"class_word": "dog", "count": 1, "seed": 0, **change})


@pytest.mark.parametrize(
    ("reply", "entries"),
    [
        (
            "Here are 2 prompts with dog:\n\n1. A dog runs.\n2) A dog sleeps.\nEnjoy the dog!",
            ["A dog runs.", "A dog sleeps."],
        ),
        ('- "A dog runs."\n* **A dog sleeps.**\n• A dog', ["A dog runs.", "A dog sleeps.", "A dog"]),
        ("**1.** A dog runs\n**12.** “A dog sleeps”", ["A dog runs", "A dog sleeps"]),
        ("Prompts:\nA dog runs\nA dog of 3.5 kilograms", ["A dog runs", "A dog of 3.5 kilograms"]),
        ("<think>\n1. not this dog\n</think>\n1. this dog", ["this dog"]),
        ("1. 35mm photo of a dog\n2. 8k dog - no noise", ["35mm photo of a dog", "8k dog - no noise"]),
        ("", []),
    ],
)
def test_lists_are_read_from_answers(reply: str, entries: list[str]) -> None:
    assert prompts.reply_entries(reply) == entries


def test_both_instructions_are_asked_until_there_are_enough() -> None:
    asked: list[tuple[str, int]] = []
    replies = [
        "1. a dog\n2. an eagle\n3. a hotdog",
        "1. a dog\n2. the Dog runs\n3. dog, dog",
        "1. another dog\n2. dog 9",
    ]

    def ask(instruction: str, seed: int) -> str:
        asked.append((instruction, seed))
        return replies[len(asked) - 1]

    found, notes = prompts.written_prompts(ask, "dog", 4, seed=7)
    assert found == ["a dog", "the Dog runs", "dog, dog", "another dog"]
    table_4, table_5 = (
        text.replace("{keyword}", "dog") for text in (prompts.INSTRUCTION_TABLE_4, prompts.INSTRUCTION_TABLE_5)
    )
    assert asked == [(table_4, 7), (table_5, 8), (table_4, 9)]
    assert table_4.endswith("My first keyword is 'dog'.") and table_5.endswith("My first keyword is 'dog'.")
    assert notes == ["3 answers of the language model; 2 of their prompts lacked 'dog'."]


def test_asking_ends() -> None:
    found, notes = prompts.written_prompts(lambda *_: "1. a dog", "dog", 5, seed=0)
    assert found == ["a dog"] and "Only 1 different prompts instead of 5" in notes[1]
    with pytest.raises(IdentityEditError, match="None of the language model's 3 answers"):
        prompts.written_prompts(lambda *_: "1. a cat", "dog", 5, seed=0)
    with pytest.raises(IdentityEditError, match=r"lacks \{keyword\}"):
        prompts.written_prompts(lambda *_: "1. a dog", "dog", 5, 0, ("Write about dogs.", ""))


@pytest.mark.parametrize("template", [tiny.TEXT_TEMPLATE, None], ids=["template", "no template"])
def test_a_local_model_writes(template: str | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2LMHeadModel

    words = ("dog", "runs", "photo")
    tiny.save_gpt2(tmp_path, words=words, template=template)
    instruction = "photo {keyword}"
    state = torch.random.get_rng_state()
    found, _ = prompts.model_prompts(str(tmp_path), "dog", 3, 11, (instruction,), max_new_tokens=20)
    assert torch.equal(torch.random.get_rng_state(), state)

    network = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    asked = "USER: photo dog ASSISTANT:" if template else "photo dog"
    ids = tokenizer(asked, return_tensors="pt")["input_ids"]
    expected: dict[str, None] = {}
    seed = 11
    while len(expected) < 3:
        torch.manual_seed(seed)
        answer = network.generate(ids, max_new_tokens=20, do_sample=True, attention_mask=torch.ones_like(ids))
        text = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        expected.update(dict.fromkeys([text] if "dog" in text else []))
        seed += 1
    assert found == list(expected)


class Endpoint(ThreadingHTTPServer):
    """Answers every POST with `reply` (status, body), after `delay` seconds; keeps what it was sent."""

    reply: tuple[int, str] = (200, json.dumps({"choices": [{"message": {"content": "1. a dog\n2. the dog"}}]}))
    delay = 0.0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        self.server.closing.wait(self.server.delay)
        status, text = self.server.reply
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(prompts.URL_VARIABLE, server.url)
    monkeypatch.setenv(prompts.MODEL_VARIABLE, "writer")
    monkeypatch.setenv(prompts.KEY_VARIABLE, "secret-key")
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_endpoint_is_asked_as_openai_says(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = prompts.endpoint_prompts("dog", 2, seed=2**64 - 1, temperature=0.5)
    assert found == ["a dog", "the dog"]
    ((path, headers, body),) = endpoint.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-key"
    instruction = prompts.INSTRUCTION_TABLE_4.replace("{keyword}", "dog")
    assert body["model"] == "writer" and body["messages"] == [{"role": "user", "content": instruction}]
    assert body["temperature"] == 0.5 and 0 <= body["seed"] < 2**31
    monkeypatch.delenv(prompts.KEY_VARIABLE)
    monkeypatch.setenv(prompts.URL_VARIABLE, endpoint.url + "/chat/completions")
    prompts.endpoint_prompts("dog", 1, seed=0)
    path, headers, _ = endpoint.requests[-1]
    assert path == "/v1/chat/completions" and "Authorization" not in headers


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, "wrong secret-key"), r"status 401 \(wrong \.\.\.\); check"),
        ((500, "x" * 1000), "status 500"),
        ((302, ""), "status 302"),
        ((200, "<html>"), "did not answer with a chat completion"),
        ((200, '{"choices": []}'), "did not answer with a chat completion"),
        ((200, '{"choices": [{"message": {"content": null}}]}'), "None of the language model's 3 answers"),
    ],
)
def test_bad_answers_are_named(endpoint: Endpoint, reply: tuple[int, str], message: str) -> None:
    endpoint.reply = reply
    with pytest.raises(IdentityEditError, match=message) as caught:
        prompts.endpoint_prompts("dog", 1, seed=0)
    assert "secret-key" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_slow_endpoint_is_given_up(endpoint: Endpoint) -> None:
    endpoint.delay = 30.0
    began = time.monotonic()
    with pytest.raises(IdentityEditError, match=r"did not answer within 0\.2 seconds"):
        prompts.endpoint_prompts("dog", 1, seed=0, timeout=(5.0, 0.2))
    assert time.monotonic() - began < 20.0, "it must not wait for the answer"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (prompts.URL_VARIABLE, "", "IDENTITY_EDIT_LLM_URL is not set"),
        (prompts.MODEL_VARIABLE, "", "IDENTITY_EDIT_LLM_MODEL is not set"),
        (prompts.URL_VARIABLE, "file:///etc/passwd", "is no address of an endpoint"),
        (prompts.URL_VARIABLE, "http://user:word@127.0.0.1/v1", "is no address of an endpoint"),
        (prompts.URL_VARIABLE, "http://127.0.0.1:1/v1", "cannot be reached"),
    ],
)
def test_a_wrong_environment_is_named(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(IdentityEditError, match=message):
        prompts.endpoint_prompts("dog", 1, seed=0)
    assert endpoint.requests == []


def test_own_prompts_are_taken_in_turn() -> None:
    text = "a dog on the grass\n\n  a sitting dog  \n"
    assert prompts.own_prompts(text, "dog", 3) == ["a dog on the grass", "a sitting dog", "a dog on the grass"]
    with pytest.raises(IdentityEditError, match="'a cat' of own_prompts lacks the class word 'dog'"):
        prompts.own_prompts("a dog\na cat", "dog", 2)
    with pytest.raises(IdentityEditError, match="own_prompts is empty"):
        prompts.own_prompts(" \n", "dog", 2)
