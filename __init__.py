"""ComfyUI-IdentityEdit: ComfyUI's entry point.

An old ComfyUI would fail with a traceback about a missing name. Its version is therefore checked first: it gets one
sentence in its log and no entry point. `extension.py` has the rest.
"""

import logging
import re
from importlib import import_module

OLDEST_COMFYUI = "0.3.60"
"""The first in which the pack's patches can ask for an attention function (benchmarks/results/engines.md)."""


def too_old() -> str | None:
    """The log's sentence if this ComfyUI is older than OLDEST_COMFYUI, else None.

    A version that is not three numbers belongs to no release and is accepted.
    """
    try:
        version = str(import_module("comfyui_version").__version__)
    except ModuleNotFoundError:
        version = "0.0.0"  # before 0.3.12 there was no such file
    ours, theirs = (re.match(r"(\d+)\.(\d+)\.(\d+)", text) for text in (OLDEST_COMFYUI, version))
    if ours is None or theirs is None or [int(n) for n in theirs.groups()] >= [int(n) for n in ours.groups()]:
        return None
    shown = "too old to say its version" if version == "0.0.0" else version
    return f"ComfyUI-IdentityEdit needs ComfyUI {OLDEST_COMFYUI} or newer and this one is {shown}: update ComfyUI."


if message := too_old():
    logging.error(message)
else:
    from .extension import comfy_entrypoint as comfy_entrypoint

    WEB_DIRECTORY = "./web"
