"""The user's own ComfyUI, inside this process: for the commands that are installed with the pack.

They run in the Python that ComfyUI runs in, start no other process, install nothing and open no socket. Standard
library only, until ComfyUI is asked for.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

PACK = Path(os.path.abspath(__file__)).parents[1]
"""The pack's folder as it was named, so that one that is linked into `custom_nodes` finds the ComfyUI around it."""
PACK_NAME = "identity_edit_pack"
"""The pack's modules have this name here; ComfyUI names them after the folder, whatever that is called."""


class ScriptError(RuntimeError):
    """A failure whose message is one sentence for the user: the scripts print it without a traceback."""


class NodeError(ScriptError):
    """A node of a workflow raised an error."""


def find_comfyui() -> Path:
    """The folder that COMFYUI_PATH names, or the one in whose `custom_nodes` the pack lies."""
    chosen = os.environ.get("COMFYUI_PATH")
    path = Path(chosen).expanduser().resolve() if chosen else PACK.parents[1]
    if (path / "main.py").is_file() and (path / "comfy").is_dir():
        return path
    if chosen:
        raise ScriptError(f"COMFYUI_PATH is '{chosen}', which holds no ComfyUI: it has no main.py and comfy/.")
    raise ScriptError(f"{PACK} is in no ComfyUI's custom_nodes: name your ComfyUI's folder in COMFYUI_PATH.")


def name_pack() -> None:
    """Make the pack's modules importable as `identity_edit_pack`, without its entry point."""
    package = ModuleType(PACK_NAME)
    package.__path__ = [str(PACK)]
    sys.modules.setdefault(PACK_NAME, package)


def declare_torchvision_operators() -> None:
    """Make `import torchvision` work where its compiled operators cannot load (a CUDA build beside a CPU torch).

    torchvision registers fake versions of two operators that its own library declares; without that library the import
    fails. The two schemas are declared only then: beside a working library a second declaration would collide.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import torch

        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def use_comfyui(*options: str) -> None:
    """Put ComfyUI first on `sys.path` and give it command line options; call this before the first `import comfy`."""
    sys.path.insert(0, str(find_comfyui()))
    import torch

    declare_torchvision_operators()
    accelerators = (torch.cuda, torch.backends.mps, getattr(torch, "xpu", None))
    if not any(kind is not None and kind.is_available() for kind in accelerators):
        options = (*options, "--cpu")
    # ComfyUI reads its options from here, and imports modules by the names that these folders must not hide.
    sys.argv = ["main.py", *options]
    import comfy.options

    comfy.options.enable_args_parsing()


class ComfyUI:
    """A ComfyUI that runs workflows in this process, with the user's models and custom nodes; one in a process.

    What it writes goes below a folder of its own. It is started by ComfyUI's own function for programs that embed it,
    whose last result, the one that would listen on a port, is not used.

    Args:
        folder: for output, temporary files and the database.
        options: further ones of ComfyUI's command line.
    """

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.output = folder / "output"
        self.output.mkdir(parents=True, exist_ok=True)
        own = ["--output-directory", str(self.output), "--temp-directory", str(folder), "--disable-api-nodes"]
        use_comfyui(*own, "--database-url", f"sqlite:///{(folder / 'comfyui.db').as_posix()}", *options)
        main, nodes = import_module("main"), import_module("nodes")  # ComfyUI's
        self._loop, self._server, _ = main.start_comfyui()
        if not any(name.startswith("IdentityEdit") for name in nodes.NODE_CLASS_MAPPINGS):  # not in custom_nodes
            self._loop.run_until_complete(nodes.load_custom_node(str(PACK)))

    def run(self, prompt: dict[str, dict[str, Any]]) -> None:
        """Run a workflow in the API form to its end.

        Raises:
            NodeError: when a node fails.
            ScriptError: when ComfyUI refuses the workflow.
        """
        name = uuid.uuid4().hex
        check = import_module("execution").validate_prompt(name, prompt, None)  # ComfyUI's
        valid, error, outputs, faults = self._loop.run_until_complete(check)
        if not valid:
            found = [fault for node in faults.values() for fault in node["errors"]] or [error]
            raise ScriptError(": ".join(filter(None, (found[0]["message"], found[0].get("details")))))
        queue = self._server.prompt_queue
        queue.put((0, name, prompt, {}, outputs, {}))
        while not (done := queue.get_history(name)):
            time.sleep(0.05)
        queue.wipe_history()
        for kind, data in done[name]["status"]["messages"]:
            if kind == "execution_error":
                title = prompt[str(data["node_id"])].get("_meta", {}).get("title") or data["node_type"]
                raise NodeError(f"{title}: {data['exception_message'].strip()}")
            if kind == "execution_interrupted":
                raise ScriptError("interrupted")
