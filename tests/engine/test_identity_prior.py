"""The identity prior in a real ComfyUI: a training that is canceled or killed goes on, a loaded prior is the trained
one, a bad dataset is refused."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_client import ExecutionError, Interrupted
from safetensors.torch import load_file

from .test_timestep_aware_edit import CHECKPOINT, IMAGE, Prompt, node, with_image

TYPE_OF_SERVER = Any  # conftest's RunningServer
CAPTIONS = "a sks cat standing on the grass facing right\na sks cat lying down on the grass facing right"


def training(steps: int, checkpoint_every: int = 1, captions: str = CAPTIONS) -> Prompt:
    return {
        "model": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "one": node("IdentityEditDrawDemoImage", **IMAGE),
        "two": node("IdentityEditDrawDemoImage", **{**IMAGE, "pose": "lying"}),
        "both": node("ImageBatch", image1=["one", 0], image2=["two", 0]),
        "subject": node(
            "IdentityEditSubjectFromImages",
            images=["both", 0],
            captions=captions,
            class_word="cat",
            token="sks",
            add_token=False,
        ),
        "train": node(
            "IdentityEditTrainIdentityPrior",
            model=["model", 0],
            clip=["model", 1],
            vae=["model", 2],
            subject=["subject", 0],
            steps=steps,
            learning_rate=1e-4,
            regularization_weight=1.0,
            train_text_encoder=True,
            masked_loss=False,
            min_snr_gamma=0.0,
            seed=7,
            filename_prefix="identity_priors/test",
            training_settings=["settings", 0],
        ),
        "settings": node(
            "IdentityEditTrainingSettings",
            learning_rate_schedule="constant",
            warmup_steps=0,
            optimizer="default",
            weight_decay=-1.0,
            ema_decay=-1.0,
            batch_size=1,
            gradient_accumulation=1,
            precision="float32",
            checkpointing=True,
            sample_every=0,
            sample_prompt="",
            checkpoint_every=checkpoint_every,
        ),
        "report": node("PreviewAny", source=["train", 6]),
        "file": node("PreviewAny", source=["train", 5]),
    }


def trained(server: TYPE_OF_SERVER, prompt: Prompt) -> tuple[str, Path]:
    """The report, and the file of the prior."""
    outputs = server.run(prompt).outputs
    return outputs["report"]["text"][0], Path(outputs["file"]["text"][0])


def stop_after(server: TYPE_OF_SERVER, prompt: Prompt, steps: int, stop: Any) -> None:
    """Run a training and call `stop` once it has done so many steps."""
    asked = False

    def listen(kind: str, data: dict[str, Any]) -> None:
        nonlocal asked
        if kind == "progress" and data["node"] == "train" and data["value"] >= steps and not asked:
            asked = True
            stop()

    server.client.run(prompt, listen)


def read_steps(report: str) -> int:
    found = re.search(r"(\d+) of them from a checkpoint", report)
    return int(found[1]) if found else 0


def assert_same_prior(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys() and any(float(value.abs().max()) > 1e-5 for value in first.values())
    for name, value in first.items():
        assert np.allclose(value.float().numpy(), second[name].float().numpy(), atol=1e-5), name


def test_a_canceled_and_a_killed_training_go_on(server: TYPE_OF_SERVER, start_server: Any, tmp_path: Path) -> None:
    report, uninterrupted = trained(server, training(6, checkpoint_every=0))
    assert read_steps(report) == 0

    with pytest.raises(Interrupted):
        stop_after(server, training(6), 2, server.client.interrupt)
    report, resumed = trained(server, training(6))
    assert 2 <= read_steps(report) < 6
    assert_same_prior(uninterrupted, resumed)

    with start_server(tmp_path) as killed, pytest.raises(Exception):  # noqa: B017  (however a lost line shows)
        stop_after(killed, training(6), 3, killed.process.kill)
    with start_server(tmp_path) as again:
        report, resumed = trained(again, training(6))
        assert 2 <= read_steps(report) < 6
        assert_same_prior(uninterrupted, resumed)


def test_a_loaded_prior_samples_what_the_trained_model_samples(server: TYPE_OF_SERVER) -> None:
    prompt = training(3, checkpoint_every=0)
    prompt["train"]["inputs"]["learning_rate"] = 1e-3

    def sampled(model: list[Any], clip: list[Any], extra: Prompt) -> np.ndarray:
        graph = {
            **extra,
            "model": prompt["model"],
            "text": node("CLIPTextEncode", text="a sks cat standing on the grass", clip=clip),
            "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
            "sampled": node(
                "KSampler", model=model, positive=["text", 0], negative=["text", 0], latent_image=["latent", 0], seed=1,
                steps=4, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0,
            ),
        }  # fmt: skip
        run = server.run(with_image(graph, "sampled"))
        return np.asarray(server.images(run, "sampled_shown")[0].convert("RGB"), dtype=np.int16)

    by_training = sampled(["train", 0], ["train", 1], prompt)
    _, path = trained(server, prompt)
    load = node(
        "IdentityEditLoadIdentityPrior",
        model=["model", 0],
        clip=["model", 1],
        file=f"identity_priors/{path.name} [output]",
        strength_model=1.0,
        strength_clip=1.0,
    )
    assert np.abs(sampled(["load", 0], ["load", 1], {"load": load}) - by_training).max() <= 1
    assert np.abs(sampled(["model", 0], ["model", 1], {}) - by_training).max() > 3


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("a cat standing on the grass\na sks cat lying down", "lacks the identity token"),
        ("a sks dog standing on the grass\na sks cat lying down", "class word"),
        ("one\ntwo\nthree", "3 captions"),
    ],
)
def test_a_bad_dataset_is_refused_and_the_next_prompt_served(
    server: TYPE_OF_SERVER, captions: str, message: str
) -> None:
    with pytest.raises(ExecutionError, match=message) as caught:
        server.run(training(1, captions=captions))
    assert caught.value.node_id == "subject"
    time.sleep(0.1)
    assert server.run(training(1, checkpoint_every=0)).outputs
