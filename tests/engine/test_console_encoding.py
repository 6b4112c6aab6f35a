"""The pack's errors on the console of a Chinese Windows, whose encoding has no emoji: the server goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_client import Client, ExecutionError, ValidationError
from engine import Server

CAT = "\N{CAT FACE}"
CHECKPOINT = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "identity-edit-demo.safetensors"}}


def prompt(node: str, output: int, **inputs: Any) -> dict[str, Any]:
    """A node of the pack on the demo checkpoint, and a node that asks for one of its outputs."""
    return {
        "1": CHECKPOINT,
        "2": {"class_type": f"IdentityEdit{node}", "inputs": {"model": ["1", 0], **inputs}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", output]}},
    }


def test_a_quoted_emoji_does_not_end_the_server(tmp_path: Path) -> None:
    words = {"identity_prompt": f"a {CAT} cat", "identity_words": "dog", "layers": "automatic"}
    with Server(tmp_path, environment={"PYTHONIOENCODING": "gbk", "OMP_NUM_THREADS": "1"}) as server:
        client = Client(server.address)
        for _ in range(2):  # the second shows that the thread that runs prompts is alive
            with pytest.raises(ExecutionError, match=r"a \\+U0001f431 cat.*does not contain the word"):
                client.run(prompt("IdentityAttention", 1, clip=["1", 1], **words), timeout=60.0)
        with pytest.raises(ValidationError, match=r"\\+U0001f431.safetensors' no longer exists"):
            client.run(prompt("LoadInversion", 2, file=f"{CAT}.safetensors", steps=0), timeout=60.0)
        assert "UnicodeEncodeError" not in server.log_text()
