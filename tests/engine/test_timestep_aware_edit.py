"""Latent inversion with timestep-aware text injection in a real ComfyUI: routes, files, bad input, interrupts."""

from __future__ import annotations

import copy
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from api_client import ExecutionError, Interrupted, PromptError, ValidationError
from safetensors.torch import load_file, save, save_file

if TYPE_CHECKING:
    from identity_edit_pack.tests.conftest import RunningServer

CHECKPOINT = "identity-edit-demo.safetensors"
WEIGHTS = Path(__file__).resolve().parents[2] / "demo_world" / "weights" / CHECKPOINT
STEPS = 4
IMAGE = {
    "framing": "figure",
    "species": "cat",
    "color": "orange",
    "pattern": "plain",
    "pose": "standing",
    "facing": "right",
    "expression": "neutral",
    "costume": "none",
    "place": "grass",
    "hair_color": "brown",
    "hair_style": "short",
    "eye_color": "brown",
    "skin": "light",
    "face_shape": "round",
    "wording": 0,
    "seed": 1,
}

Prompt = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def inversion_prompt() -> Prompt:
    """Checkpoint, image, both prompts and DDIM inversion; nothing is shown yet."""
    return {
        "model": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "image": node("IdentityEditDrawDemoImage", **IMAGE),
        "latent": node("VAEEncode", pixels=["image", 0], vae=["model", 2]),
        "source": node("CLIPTextEncode", text=["image", 2], clip=["model", 1]),
        "target": node("CLIPTextEncode", text="a smiling orange cat standing on the grass", clip=["model", 1]),
        "empty": node("CLIPTextEncode", text="", clip=["model", 1]),
        "inversion": node(
            "IdentityEditNoiseInversion",
            model=["model", 0],
            source=["source", 0],
            latent=["latent", 0],
            method="DDIM",
            steps=STEPS,
            guidance_scale=1.0,
            end_at_zero=True,
            iterations=5,
            gamma=0.5,
            seed=0,
        ),
    }


def with_null_text(prompt: Prompt, method: str = "null-text optimization", inner_steps: int = 2) -> Prompt:
    prompt["null_text"] = node(
        "IdentityEditNullTextOptimization",
        model=["model", 0],
        inversion=["inversion", 0],
        source=["source", 0],
        negative=["empty", 0],
        method=method,
        guidance_scale=5.0,
        inner_steps=inner_steps,
        learning_rate=0.01,
        early_stop=1e-5,
        checkpointing=False,
    )
    return prompt


def text_optimization(**changes: Any) -> dict[str, Any]:
    """Optimize Text Embedding on the prompt's latent and target."""
    links = {"model": ["model", 0], "latent": ["latent", 0], "target": ["target", 0]}
    settings = {"steps": 1, "learning_rate": 0.001, "seed": 0, "checkpointing": False}
    return node("IdentityEditOptimizeTextEmbedding", **{**links, **settings, **changes})


def with_sampler_node(prompt: Prompt, inversion: list[Any], sampler: str = "ddim") -> Prompt:
    prompt["edited"] = node(
        "IdentityEditTimestepAwareTextInjectionSampler",
        model=["model", 0],
        inversion=inversion,
        source=["source", 0],
        target=["target", 0],
        ratio=0.5,
        eta=0.7,
        guidance_scale=5.0,
        sampler=sampler,
        negative=["empty", 0],
    )
    return with_image(prompt, "edited")


def with_stock_sampler(prompt: Prompt, route: str, sampler: str = "ddim") -> Prompt:
    """SamplerCustomAdvanced with the injection as a conditioning or on the model."""
    suffix = "" if route == "conditioning" else "Model"
    # The two MODEL patches stack: negative side from null-text optimization, positive side from the injection.
    prompt["injection"] = node(
        f"IdentityEditTimestepAwareTextInjection{suffix}",
        model=["null_text", 0],
        sigmas=["inversion", 2],
        source=["source", 0],
        target=["target", 0],
        ratio=0.5,
        eta=0.7,
    )
    model, positive = (["null_text", 0], ["injection", 0]) if not suffix else (["injection", 0], ["injection", 1])
    prompt["guider"] = node("CFGGuider", model=model, positive=positive, negative=["null_text", 1], cfg=5.0)
    prompt["no_noise"] = node("DisableNoise")
    prompt["sampler"] = node("KSamplerSelect", sampler_name=sampler)
    prompt["stock"] = node(
        "SamplerCustomAdvanced",
        noise=["no_noise", 0],
        guider=["guider", 0],
        sampler=["sampler", 0],
        sigmas=["inversion", 2],
        latent_image=["inversion", 1],
    )
    return with_image(prompt, "stock")


def with_image(prompt: Prompt, name: str, output: int = 0) -> Prompt:
    prompt[f"{name}_image"] = node("VAEDecode", samples=[name, output], vae=["model", 2])
    prompt[f"{name}_shown"] = node("PreviewImage", images=[f"{name}_image", 0])
    return prompt


def shown(server: RunningServer, prompt: Prompt, name: str) -> np.ndarray:
    run = server.run(prompt)
    return np.asarray(server.images(run, f"{name}_shown")[0].convert("RGB"), dtype=np.int16)


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_the_stock_routes_and_the_node_give_the_same_image(server: RunningServer, sampler: str) -> None:
    base = with_null_text(inversion_prompt())
    by_node = shown(server, with_sampler_node(copy.deepcopy(base), ["null_text", 2], sampler), "edited")
    for route in ("conditioning", "model"):
        by_stock = shown(server, with_stock_sampler(copy.deepcopy(base), route, sampler), "stock")
        assert np.abs(by_stock - by_node).max() <= 2, route
    assert by_node.std() > 10


def test_negative_prompt_inversion_reconstructs_as_ddim_does(server: RunningServer) -> None:
    prompt = with_null_text(inversion_prompt(), "negative-prompt inversion (fast)")
    prompt["guider"] = node("CFGGuider", model=["model", 0], positive=["source", 0], negative=["empty", 0], cfg=1.0)
    prompt["no_noise"], prompt["euler"] = node("DisableNoise"), node("KSamplerSelect", sampler_name="euler")
    prompt["stock"] = node(
        "SamplerCustomAdvanced",
        noise=["no_noise", 0],
        guider=["guider", 0],
        sampler=["euler", 0],
        sigmas=["inversion", 2],
        latent_image=["inversion", 1],
    )
    with_image(prompt, "stock")
    with_image(prompt, "null_text", 3)
    run = server.run(prompt)
    ours, stock = (np.asarray(server.images(run, f"{key}_shown")[0], dtype=np.int16) for key in ("null_text", "stock"))
    assert np.abs(ours - stock).max() <= 2


def test_text_optimization_runs_where_comfyui_forbids_gradients(server: RunningServer) -> None:
    """A prompt runs in inference mode: that there is a gradient at all can only be seen in a server."""
    prompt = inversion_prompt()
    prompt["optimized"] = text_optimization(steps=3, learning_rate=0.05, checkpointing=True)
    with_sampler_node(prompt, ["inversion", 0])
    without = shown(server, prompt, "edited")
    prompt["edited"]["inputs"] |= {"optimized": ["optimized", 0], "eta": 0.0}
    fitted = shown(server, prompt, "edited")
    assert np.abs(fitted - without).max() > 2
    again = copy.deepcopy(prompt)
    again["optimized"]["inputs"]["seed"] = 1
    assert np.abs(shown(server, again, "edited") - fitted).max() > 0
    assert np.array_equal(shown(server, prompt, "edited"), fitted), "the same seed gave another image"


def test_prompts_longer_than_one_block_of_tokens(server: RunningServer) -> None:
    prompt = with_null_text(inversion_prompt(), inner_steps=1)
    prompt["target"]["inputs"]["text"] = "an orange cat jumping on the grass " * 30
    by_conditioning = shown(server, with_stock_sampler(copy.deepcopy(prompt), "conditioning"), "stock")
    by_model = shown(server, with_stock_sampler(copy.deepcopy(prompt), "model"), "stock")
    assert np.abs(by_conditioning - by_model).max() <= 2


def save_inversion(server: RunningServer, name: str, null_text: bool = False) -> str:
    """Saves an inversion and returns the name under which Load Inversion lists it."""
    prompt = inversion_prompt()
    if null_text:
        with_null_text(prompt, inner_steps=1)
    prompt["save"] = node(
        "IdentityEditSaveInversion",
        inversion=["null_text", 2] if null_text else ["inversion", 0],
        filename_prefix=f"inversions/{name}",
    )
    run = server.run(prompt)
    path = Path(run.outputs["save"]["text"][0])
    assert path.is_file()
    return f"inversions/{path.name} [output]"


def load_inversion(file: str, **changes: Any) -> dict[str, Any]:
    return node("IdentityEditLoadInversion", **{"model": ["model", 0], "file": file, "steps": 0, **changes})


def test_a_saved_inversion_gives_the_same_image(server: RunningServer) -> None:
    file = save_inversion(server, "round_trip", null_text=True)
    direct = with_sampler_node(with_null_text(inversion_prompt(), inner_steps=1), ["null_text", 2])
    loaded = inversion_prompt()
    loaded["loaded"] = load_inversion(file, steps=STEPS, latent=["latent", 0])
    with_sampler_node(loaded, ["loaded", 0])
    assert np.array_equal(shown(server, direct, "edited"), shown(server, loaded, "edited"))


def test_progress_and_previews_are_shown(server: RunningServer) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def listen(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress":
            seen.setdefault(data["node"], []).append((data["value"], data["max"]))

    prompt = with_sampler_node(with_null_text(inversion_prompt()), ["null_text", 2])
    prompt["inversion"]["inputs"]["steps"] = 3  # not in the cache
    server.client.run(prompt, listen)
    assert seen["inversion"] == [(1, 3), (2, 3), (3, 3)]
    assert seen["null_text"][-1] == (9, 9) and len(seen["null_text"]) > 3
    assert seen["edited"][-1] == (3, 3)


# Bad input: one sentence on the node at fault, the server alive, the next prompt served.


def refused(
    server: RunningServer, prompt: Prompt, at: str, message: str, kind: type[PromptError] = ExecutionError
) -> None:
    with pytest.raises(kind) as caught:
        server.run(prompt)
    assert caught.value.node_id == at
    said = caught.value.message
    assert re.search(message, said), said
    assert "\n" not in said and ". " not in said.replace("e.g. ", "").replace("1. ", ""), f"not one sentence: {said}"
    next_one = {"1": node("EmptyImage", width=8, height=8, batch_size=1, color=0)}
    next_one["2"] = node("PreviewImage", images=["1", 0])
    assert server.images(server.run(next_one), "2")[0].size == (8, 8)


def upload_latent(server: RunningServer, name: str, samples: torch.Tensor) -> dict[str, Any]:
    """Puts a .latent file into the input folder; the stock LoadLatent node hands it on as it is."""
    data = save({"latent_tensor": samples, "latent_format_version_0": torch.tensor([])})
    server.client.upload(f"{name}.latent", data)
    return node("LoadLatent", latent=f"{name}.latent")


@pytest.mark.parametrize(
    ("name", "samples", "message"),
    [
        ("empty", torch.zeros(0, 4, 16, 16), "is empty"),
        ("many", torch.zeros(65, 4, 8, 8), "65 latents, more than 64"),
        ("nan", torch.full((1, 4, 16, 16), torch.nan), "NaN or infinite"),
        ("sixteen", torch.zeros(1, 16, 16, 16), "16 channels but the model takes 4"),
        ("video", torch.zeros(1, 4, 2, 16, 16), "must be a batch of image latents"),
    ],
)
def test_bad_latents_are_refused(server: RunningServer, name: str, samples: torch.Tensor, message: str) -> None:
    prompt = inversion_prompt()
    prompt["latent"] = upload_latent(server, name, samples)
    inverting = with_image(copy.deepcopy(prompt), "inversion", 1)
    refused(server, inverting, "inversion", message)
    optimizing = prompt
    optimizing["optimized"] = text_optimization()
    optimizing["shown"] = node("PreviewAny", source=["optimized", 1])
    refused(server, optimizing, "optimized", message)


@pytest.mark.parametrize("at", ["optimized", "null_text"])
def test_other_families_of_models_are_refused(server: RunningServer, at: str) -> None:
    prompt = with_null_text(inversion_prompt())
    prompt["flow"] = node("ModelSamplingSD3", model=["model", 0], shift=3.0)
    prompt["optimized"] = text_optimization()
    prompt[at]["inputs"]["model"] = ["flow", 0]
    prompt["shown"] = node("PreviewAny", source=[at, 1])
    refused(server, prompt, at, "is of an architecture whose gradients are not supported; load a Stable Diffusion")


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_step_counts_out_of_range_are_refused(server: RunningServer, steps: int) -> None:
    prompt = with_image(inversion_prompt(), "inversion", 1)
    prompt["inversion"]["inputs"]["steps"] = steps
    with pytest.raises(ValidationError, match="steps") as caught:
        server.run(prompt)
    assert caught.value.node_id == "inversion"
    # A linked number passes the server's check of the widget: the node itself must refuse it.
    prompt["number"] = node("PrimitiveInt", value=steps)
    prompt["inversion"]["inputs"]["steps"] = ["number", 0]
    refused(server, prompt, "inversion", f"steps is {steps}; choose a number from 1 to 1000")


def other_checkpoint(server: RunningServer) -> str:
    """A checkpoint of the same shape with other weights, in the server's own checkpoint folder."""
    path = server.process.base / "models" / "checkpoints" / "other.safetensors"
    if not path.is_file():
        weights = load_file(WEIGHTS)
        key = "model.diffusion_model.input_blocks.0.0.weight"
        weights[key] = weights[key] * 1.5
        save_file(weights, path)
    return path.name


def test_an_inversion_of_another_model_is_refused(server: RunningServer) -> None:
    file = save_inversion(server, "of_the_demo")
    prompt = inversion_prompt()
    prompt["other"] = node("CheckpointLoaderSimple", ckpt_name=other_checkpoint(server))
    prompt["loaded"] = load_inversion(file, model=["other", 0])
    refused(server, with_image(prompt, "loaded", 1), "loaded", "made with another model .*different weights")
    prompt = inversion_prompt()
    prompt["other"] = node("CheckpointLoaderSimple", ckpt_name=other_checkpoint(server))
    with_sampler_node(prompt, ["inversion", 0])
    prompt["edited"]["inputs"]["model"] = ["other", 0]
    refused(server, prompt, "edited", "made with another model")


def test_an_inversion_of_another_size_or_step_count_is_refused(server: RunningServer) -> None:
    file = save_inversion(server, "sizes")
    prompt = inversion_prompt()
    prompt["small"] = node("EmptyLatentImage", width=64, height=128, batch_size=1)
    prompt["loaded"] = load_inversion(file, latent=["small", 0])
    refused(server, with_image(prompt, "loaded", 1), "loaded", r"the latent is \(1, 4, 16, 8\)")
    prompt["loaded"] = load_inversion(file, steps=STEPS + 1)
    refused(server, prompt, "loaded", f"has {STEPS} steps but steps is {STEPS + 1}")


def test_damaged_and_missing_files_are_refused(server: RunningServer) -> None:
    file = save_inversion(server, "damaged")
    path = server.process.base / "output" / file.removesuffix(" [output]")
    path.write_bytes(path.read_bytes()[:1000])
    prompt = inversion_prompt()
    prompt["loaded"] = load_inversion(file)
    with_image(prompt, "loaded", 1)
    refused(server, prompt, "loaded", "cannot be read")
    path.unlink()
    refused(server, prompt, "loaded", "no longer exists", ValidationError)
    server.client.upload("checkpoint.safetensors", save({"weight": torch.zeros(2)}))
    prompt["loaded"] = load_inversion("checkpoint.safetensors")
    refused(server, prompt, "loaded", "contains no inversion")


def test_an_output_that_cannot_be_written_is_refused_and_leaves_nothing(server: RunningServer) -> None:
    output = server.process.base / "output"
    (output / "blocked").write_text("a file where a folder should be")
    before = sorted(path for path in output.rglob("*"))
    prompt = inversion_prompt()
    prompt["save"] = node("IdentityEditSaveInversion", inversion=["inversion", 0], filename_prefix="blocked/cat")
    refused(server, prompt, "save", "filename_prefix 'blocked/cat' cannot be written")
    prompt["save"]["inputs"]["filename_prefix"] = "../cat"
    refused(server, prompt, "save", "points outside the output folder")
    assert sorted(path for path in output.rglob("*")) == before


def test_an_embedding_of_another_prompt_is_refused(server: RunningServer) -> None:
    prompt = with_sampler_node(inversion_prompt(), ["inversion", 0])
    prompt["long"] = node("CLIPTextEncode", text="an orange cat " * 40, clip=["model", 1])
    prompt["edited"]["inputs"]["optimized"] = ["long", 0]
    refused(server, prompt, "edited", "differ in tokens or channels")
    prompt["two"] = node("ConditioningCombine", conditioning_1=["target", 0], conditioning_2=["source", 0])
    prompt["edited"]["inputs"]["optimized"] = ["two", 0]
    refused(server, prompt, "edited", "has 2 entries")


def test_guidance_without_a_negative_is_refused(server: RunningServer) -> None:
    prompt = with_sampler_node(inversion_prompt(), ["inversion", 0])
    del prompt["edited"]["inputs"]["negative"]
    refused(server, prompt, "edited", "needs a negative conditioning")


def test_images_of_different_sizes_are_refused(server: RunningServer) -> None:
    prompt = inversion_prompt()
    prompt["small"] = node(
        "ImageScale", image=["image", 0], upscale_method="area", width=64, height=64, crop="disabled"
    )
    prompt["check"] = node(
        "IdentityEditReconstructionCheck", image=["image", 0], reconstruction=["small", 0], lowest_psnr=20.0
    )
    refused(server, prompt, "check", "128x128 pixels and reconstruction 64x64")


@pytest.mark.parametrize("at", ["null_text", "optimized"])
def test_an_interrupt_stops_a_long_optimization(server: RunningServer, at: str) -> None:
    prompt = with_null_text(inversion_prompt(), inner_steps=1000)
    prompt["null_text"]["inputs"]["early_stop"] = 0.0
    prompt["optimized"] = text_optimization(steps=10000)
    prompt["shown"] = node("PreviewAny", source=[at, 4 if at == "null_text" else 1])
    values: list[int] = []
    asked = False

    def listen(kind: str, data: dict[str, Any]) -> None:
        nonlocal asked
        if kind == "progress" and data["node"] == at:
            values.append(data["value"])
            if data["value"] >= 3 and not asked:
                asked = True
                server.client.interrupt()

    with pytest.raises(Interrupted) as caught:
        server.client.run(prompt, listen)
    assert caught.value.node_id == at
    assert max(values) < 200, "it went on for long"
    time.sleep(0.1)
    assert server.run(with_image(inversion_prompt(), "inversion", 1)).outputs
