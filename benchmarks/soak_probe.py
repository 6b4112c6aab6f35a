"""A custom node pack for one route: what is alive inside a ComfyUI. `soak.py` links it into its own server.

`GET /soak_probe` collects the garbage and answers with the loaded models, the live model patchers, the bytes of all
tensors that Python can reach, and the number of objects.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, Any] = {}


def _count() -> dict[str, int]:
    gc.collect()
    patchers = objects = 0
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        objects += 1
        # By type: isinstance would ask lazy modules and proxies, and make them load.
        kind = type(found)
        if issubclass(kind, comfy.model_patcher.ModelPatcher):
            patchers += 1
        elif issubclass(kind, torch.Tensor) and found.layout == torch.strided and found.device.type != "meta":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return {
        "loaded_models": len(comfy.model_management.current_loaded_models),
        "patchers": patchers,
        "tensor_bytes": sum(storages.values()),
        "objects": objects,
        "temporary_files": sum(path.is_file() for path in Path(tempfile.gettempdir()).rglob("*")),
    }


@PromptServer.instance.routes.get("/soak_probe")
async def _answer(request: web.Request) -> web.Response:
    return web.json_response(_count())
