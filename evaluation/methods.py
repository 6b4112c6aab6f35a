"""Every way of editing that the benchmarks compare, by name: the pack's, ComfyUI's stock nodes', and other libraries'.

`METHODS[name].edit(checkpoint, case, settings)` gives the edited image. What several methods or cases need, such as
an inversion or a subject's prior, is made once (`settings.work`) and still counts for each that uses it, so that the
time of a method is what it costs alone.
"""

from __future__ import annotations

from . import diffusers_methods as edit_methods_diffusers
from . import generating_methods
from . import pack_methods as edit_methods_pack
from . import stock_methods as edit_methods_stock
from .method import SUBJECT, Checkpoint, Cost, Method, MethodSettings, SharedWork, load_checkpoint, measured

METHODS: dict[str, Method] = {
    **edit_methods_stock.METHODS,
    **edit_methods_pack.METHODS,
    **generating_methods.METHODS,
    **edit_methods_diffusers.METHODS,
}

SAME_ALGORITHM = {
    "img2img": "diffusers-img2img",
    "instruct-pix2pix": "diffusers-instruct-pix2pix",
    "diffedit": "diffusers-diffedit",
    "masactrl": "reference-masactrl",
    "null-text-7.5": "community-null-text",
}
"""Methods of the pack or of ComfyUI, and the other implementation of the same algorithm."""

__all__ = [
    "METHODS",
    "SAME_ALGORITHM",
    "SUBJECT",
    "Checkpoint",
    "Cost",
    "Method",
    "MethodSettings",
    "SharedWork",
    "load_checkpoint",
    "measured",
]
