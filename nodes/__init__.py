"""What the user sees: one file for each category of nodes, and the list of them all."""

from __future__ import annotations

from comfy_api.latest import io

from . import demo, inversion, measure, text

NODE_CLASSES: list[type[io.ComfyNode]] = [*inversion.NODES, *text.NODES, *measure.NODES, *demo.NODES]
