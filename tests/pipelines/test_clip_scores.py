"""CLIP's scores against transformers' own logits and torchmetrics, from folders and from ComfyUI's sockets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from identity_edit_pack.pipelines.scores import clip as clip_scores
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_models, tiny_scorers, tiny_text_encoders, tiny_vision

IMAGES = [torch.rand(40, size, 3, generator=torch.Generator().manual_seed(size)) for size in (40, 56)]
PROMPTS = ["a sks dog (standing) on the grass", "a cat"]


def test_clip_t_is_transformers_own(tmp_path: Path) -> None:
    from transformers import CLIPProcessor

    folder = tmp_path / "clip 重"
    network = tiny_scorers.save_clip(folder)
    prepared = CLIPProcessor.from_pretrained(folder)(
        text=PROMPTS,
        images=[(image * 255).round().byte().numpy() for image in IMAGES],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        logits = network(**prepared).logits_per_image / network.logit_scale.exp()
    with clip_scores.open_clip_folder(str(folder)) as clip:
        assert clip.name == "clip 重"
        images, texts = clip.images(IMAGES), clip.texts(PROMPTS)
    assert images.dtype == texts.dtype == torch.float64
    torch.testing.assert_close(images.norm(dim=1), torch.ones(2, dtype=torch.float64))
    found = clip_scores.text_similarity(images, texts)
    torch.testing.assert_close(found, logits.diagonal().double(), rtol=1e-4, atol=1e-5)


def test_a_hundred_times_clip_t_is_the_clip_similarity_of_pie_bench(tmp_path: Path) -> None:
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPProcessor

    network = tiny_scorers.save_clip(tmp_path)
    metric = CLIPScore(model_name_or_path=lambda: (network, CLIPProcessor.from_pretrained(tmp_path)))
    with clip_scores.open_clip_folder(str(tmp_path)) as clip:
        for image in IMAGES:
            for prompt in PROMPTS:
                wanted = metric((image * 255).round().byte().movedim(-1, 0), prompt)
                found = clip_scores.text_similarity(clip.images([image]), clip.texts([prompt]))
                assert max(0.0, 100 * float(found)) == pytest.approx(float(wanted), abs=1e-3)


def test_prompts_longer_than_clip_reads_are_cut(tmp_path: Path) -> None:
    tiny_scorers.save_clip(tmp_path)
    with clip_scores.open_clip_folder(str(tmp_path)) as clip:
        long = clip.texts([" ".join(["cat"] * 75), " ".join(["cat"] * 75) + " dog"])
    torch.testing.assert_close(long[0], long[1])


def test_clip_d_is_the_cosine_of_the_two_changes() -> None:
    generator = np.random.default_rng(0)
    edited, source, target, origin = generator.standard_normal((4, 3, 8))
    found = clip_scores.direction_similarity(*map(torch.tensor, (edited, source, target, origin)))
    for number in range(3):
        image, text = edited[number] - source[number], target[number] - origin[number]
        wanted = image @ text / np.sqrt((image @ image) * (text @ text))
        assert float(found[number]) == pytest.approx(wanted)
    same = torch.tensor(source)
    assert bool(clip_scores.direction_similarity(same, same, torch.tensor(target), torch.tensor(origin)).isnan().all())


def test_other_folders_are_refused(tmp_path: Path) -> None:
    def opened(folder: Path) -> None:
        with clip_scores.open_clip_folder(str(folder)):
            pass

    with pytest.raises(IdentityEditError, match="does not exist; create it with config.json"):
        opened(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(IdentityEditError, match="is 'vit', and CLIP scores need a CLIP with both encoders"):
        opened(tmp_path)
    tiny_scorers.save_clip(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    (tmp_path / "clip" / "processor_config.json").unlink(missing_ok=True)
    with pytest.raises(IdentityEditError, match="has no preprocessor_config.json"):
        opened(tmp_path / "clip")


# -- ComfyUI's sockets -------------------------------------------------------------------------------------------------


def test_sdxls_text_encoder_gives_the_projected_embedding() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizerFast

    made = tiny_text_encoders.clip("sdxl")
    config = CLIPTextConfig(**tiny_text_encoders._config(tiny_models.POOLED), bos_token_id=49406)
    twin = CLIPTextModelWithProjection(config).eval()
    weights = {key: value.clone() for key, value in made.cond_stage_model.clip_g.transformer.state_dict().items()}
    twin.load_state_dict(weights, strict=False)
    tokenizer = CLIPTokenizerFast.from_pretrained(
        str(Path(tiny_scorers.comfy.sd1_clip.__file__).parent / "sd1_tokenizer")
    )
    vision = tiny_vision.clip_vision(projection=tiny_models.POOLED)
    clip = clip_scores.SocketClip(made, vision)
    with torch.no_grad():
        wanted = [twin(**tokenizer([prompt], return_tensors="pt")).text_embeds for prompt in PROMPTS]
        found = clip.texts(PROMPTS)
        images = clip.images(IMAGES)
    torch.testing.assert_close(
        found, torch.nn.functional.normalize(torch.cat(wanted).double(), dim=1), rtol=1e-3, atol=1e-4
    )
    with torch.no_grad():
        image = vision.encode_image(IMAGES[1][None], crop=True)["image_embeds"].double()
    torch.testing.assert_close(images[1:], torch.nn.functional.normalize(image, dim=1))
    clip_scores.check_sizes(images, found, clip.name)


def test_encoders_that_do_not_belong_together_are_named() -> None:
    with pytest.raises(IdentityEditError, match="no text projection, without which prompts cannot be compared"):
        clip_scores.SocketClip(tiny_text_encoders.clip("sd15"), tiny_vision.clip_vision())
    with pytest.raises(IdentityEditError, match="image encoder has 8 channels and the text encoder 16; use two"):
        clip_scores.check_sizes(torch.zeros(1, 8), torch.zeros(1, 16), "inputs")
