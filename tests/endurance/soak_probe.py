"""A custom node pack for one route: what is alive inside a ComfyUI. `soak.py` links it into its own server.

`GET /soak_probe` collects the garbage and answers with the loaded models, the live model patchers, the bytes of all
tensors that Python can reach, the number of objects, and the bytes that the C library's allocator has given out and not
got back. The latter tells a leak from an allocator that keeps freed memory for later.
"""

from __future__ import annotations

import ctypes
import gc
import tempfile
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, Any] = {}


def _heap_in_use() -> int:
    """Bytes in use by glibc's `malloc_info`: of all arenas less what is free in them, and of what is mapped alone.

    0 where the C library is another one.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_info"):
        return 0
    libc.fopen.restype = ctypes.c_void_p
    libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.fclose.argtypes = [ctypes.c_void_p]
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        stream = libc.fopen(file.name.encode(), b"w")
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        root = xml.etree.ElementTree.parse(file.name).getroot()
    sizes = {each.get("type"): int(each.get("size", 0)) for each in root.findall("total")}
    (system,) = [int(each.get("size", 0)) for each in root.findall("system") if each.get("type") == "current"]
    return system - sizes["fast"] - sizes["rest"] + sizes["mmap"]


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
        "heap_in_use_bytes": _heap_in_use(),
        "temporary_files": sum(path.is_file() for path in Path(tempfile.gettempdir()).rglob("*")),
    }


@PromptServer.instance.routes.get("/soak_probe")
async def _answer(request: web.Request) -> web.Response:
    return web.json_response(_count())
