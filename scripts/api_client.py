"""A client of ComfyUI's API: queue a prompt, follow it over the websocket, read its outputs and images.

Used by demo.py, the engine tests and the page tool; it knows nothing of the pack.
"""

from __future__ import annotations

import io
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests
import websocket
from api_workflows import Prompt, node_title
from PIL import Image
from user_comfyui import ScriptError

Listener = Callable[[str, dict[str, Any]], None]
"""Called with the type and the data of every message about the running prompt."""


class PromptError(ScriptError):
    """A prompt was refused or failed; `str(error)` is one sentence with the node's title.

    message: what the server said.
    node_id: the node at fault, None when the server named none.
    """

    def __init__(self, message: str, node_id: str | None = None, title: str | None = None) -> None:
        super().__init__(f"{title}: {message}" if title else message)
        self.message = message
        self.node_id = node_id


class ValidationError(PromptError):
    """The server refused the prompt before running anything."""


class ExecutionError(PromptError):
    """A node raised an error while the prompt ran."""


class Interrupted(PromptError):
    """The prompt was interrupted."""


@dataclass
class Run:
    """A finished prompt.

    outputs: node id -> what the node showed on the page, e.g. {"images": [...], "text": [...]}.
    node_seconds: node id -> seconds from the node's start to the next one's; nodes taken from the cache are missing.
    seconds: the whole prompt, from queueing to its end.
    """

    prompt_id: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    node_seconds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Client:
    """One client of the server at `address` ("host:port")."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.client_id = uuid.uuid4().hex
        self._http = requests.Session()

    def get(self, path: str, **parameters: Any) -> requests.Response:
        """GET `path`; raises requests.HTTPError for any answer but a good one."""
        response = self._http.get(f"http://{self.address}{path}", params=parameters, timeout=60)
        response.raise_for_status()
        return response

    def object_info(self) -> dict[str, Any]:
        """The server's description of every node class it knows."""
        return self.get("/object_info").json()

    def interrupt(self) -> None:
        """Ask the server to interrupt the running prompt."""
        self._http.post(f"http://{self.address}/interrupt", timeout=60).raise_for_status()

    def clear_history(self) -> None:
        """Make the server forget what finished prompts have shown."""
        self._http.post(f"http://{self.address}/history", json={"clear": True}, timeout=60).raise_for_status()

    def upload(self, name: str, data: bytes) -> None:
        """Put a file into the server's input folder, over one of the same name."""
        files = {"image": (name, data)}
        url = f"http://{self.address}/upload/image"
        self._http.post(url, files=files, data={"overwrite": "true"}, timeout=60).raise_for_status()

    def queue(self, prompt: Prompt) -> str:
        """Queue a prompt and return its id; raises ValidationError when the server refuses it."""
        body = {"prompt": prompt, "client_id": self.client_id}
        response = self._http.post(f"http://{self.address}/prompt", json=body, timeout=60)
        if response.status_code == 400:
            raise _validation_error(response.json(), prompt)
        response.raise_for_status()
        return response.json()["prompt_id"]

    def run(self, prompt: Prompt, listener: Listener | None = None, timeout: float = 3600.0) -> Run:
        """Queue a prompt, wait for its end and return its outputs.

        timeout: seconds without any message from the server after which TimeoutError is raised.
        Raises ValidationError, ExecutionError or Interrupted, each with the node at fault, and ScriptError when the
        server has ended.
        """
        url = f"ws://{self.address}/ws?clientId={self.client_id}"
        socket = websocket.create_connection(url, timeout=timeout)
        try:
            start = time.perf_counter()
            run = Run(self.queue(prompt))
            self._follow(socket, run, prompt, listener)
            run.seconds = time.perf_counter() - start
        except websocket.WebSocketTimeoutException:
            raise TimeoutError(f"the server sent nothing for {timeout:.0f} seconds") from None
        except (websocket.WebSocketConnectionClosedException, ConnectionError):
            raise ScriptError(
                "ComfyUI ended before the workflow did; its log says why, or the system ended it for lack of memory."
            ) from None
        finally:
            socket.close()
        run.outputs = self.get(f"/history/{run.prompt_id}").json()[run.prompt_id]["outputs"]
        return run

    def images(self, run: Run, node_id: str) -> list[Image.Image]:
        """The images that an output node of the run saved or previewed."""
        return [self._view(image) for image in run.outputs.get(node_id, {}).get("images", [])]

    def _view(self, entry: dict[str, str]) -> Image.Image:
        image = Image.open(io.BytesIO(self.get("/view", **entry).content))
        image.load()
        return image

    @staticmethod
    def _follow(socket: websocket.WebSocket, run: Run, prompt: Prompt, listener: Listener | None) -> None:
        """Read messages until the run has ended; fills in `run.node_seconds`."""
        current: str | None = None
        since = time.perf_counter()
        while True:
            text = socket.recv()
            if not isinstance(text, str) or not text:
                continue  # previews are binary
            message = json.loads(text)
            kind, data = message["type"], message.get("data", {})
            if data.get("prompt_id") != run.prompt_id:
                continue
            if listener is not None:
                listener(kind, data)
            if kind == "executing":
                now = time.perf_counter()
                if current is not None:
                    run.node_seconds[current] = run.node_seconds.get(current, 0.0) + now - since
                current, since = data["node"], now
                if current is None:
                    return
            elif kind == "execution_error":
                node_id = str(data["node_id"])
                raise ExecutionError(data["exception_message"].strip(), node_id, node_title(prompt, node_id))
            elif kind == "execution_interrupted":
                node_id = str(data["node_id"])
                raise Interrupted("interrupted", node_id, node_title(prompt, node_id))


def _validation_error(answer: dict[str, Any], prompt: Prompt) -> ValidationError:
    """The first fault that the server names, in one sentence."""
    for node_id, node in (answer.get("node_errors") or {}).items():
        for error in node["errors"]:
            message = ": ".join(part for part in (error["message"], error.get("details")) if part)
            return ValidationError(message, node_id, node_title(prompt, node_id))
    error = answer.get("error", answer)
    if isinstance(error, str):
        return ValidationError(error)
    return ValidationError(": ".join(part for part in (error["message"], error.get("details")) if part))
