"""The shipped workflows made cheap, and a reference prompt: what tests run on a server.

Standard library only, so that the process which watches a server stays small.
"""

from __future__ import annotations

import copy
import hashlib
import uuid
from typing import TYPE_CHECKING, Any

from api_workflows import demo_values, workflow_names

if TYPE_CHECKING:
    from api_client import Client, Prompt

WITH_PHOTOS = demo_values()
"""Workflows that begin with the user's photos, and what they need for the demo world."""
NAMES = [name for name in workflow_names() if name not in WITH_PHOTOS]
"""Workflows that run unmodified."""
CHECKPOINT = "identity-edit-demo.safetensors"

MOST = {
    "steps": 2,
    "inner_steps": 1,
    "noise_steps": 2,
    "sampling_steps": 2,
    "updates_per_step": 1,
    "seeds": 2,
    "count": 2,
    "batch_size": 2,
    "gradient_accumulation": 1,
}
"""The largest value of an input, by the input's name. An `inner_steps` of 0 means many and becomes 1."""

SEEDS = ("seed", "noise_seed")
REFERENCE_IMAGE = "image"


def cheap(prompt: Prompt, most: dict[str, int] = MOST) -> Prompt:
    """The prompt with every number that decides about its time cut down to `most`."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if name in most and isinstance(value, int | float) and not isinstance(value, bool):
                node["inputs"][name] = min(value or most[name], most[name])
    return prompt


def with_seed(prompt: Prompt, seed: int) -> Prompt:
    """The prompt with every seed moved by `seed`, so that nothing of an earlier run can be taken from the cache."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        for name in SEEDS:
            if isinstance(node["inputs"].get(name), int):
                node["inputs"][name] += seed
    return prompt


def reference() -> Prompt:
    """A plain image by stock nodes alone, four steps of the demo checkpoint: equal bit for bit on a sound server."""

    def node(class_type: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": class_type, "inputs": inputs}

    return {
        "model": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "positive": node("CLIPTextEncode", text="an orange cat standing on the grass", clip=["model", 1]),
        "negative": node("CLIPTextEncode", text="", clip=["model", 1]),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "sampled": node(
            "KSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=7,
            steps=4,
            cfg=3.0,
            sampler_name="ddim",
            scheduler="ddim_uniform",
            denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampled", 0], vae=["model", 2]),
        REFERENCE_IMAGE: node("PreviewImage", images=["decoded", 0]),
    }


def anew(prompt: Prompt) -> Prompt:
    """The prompt with a mark in every node that no node reads but the server's cache does: everything is computed."""
    mark = uuid.uuid4().hex
    return {key: {**node, "inputs": {**node["inputs"], "computed_anew": mark}} for key, node in prompt.items()}


def reference_digest(client: Client, timeout: float = 600.0) -> str:
    """The SHA-256 of the reference image's pixels, computed anew.

    From the cache, a server that now draws wrong images would show the right one of before.
    """
    run = client.run(anew(reference()), timeout=timeout)
    return hashlib.sha256(client.images(run, REFERENCE_IMAGE)[0].convert("RGB").tobytes()).hexdigest()
