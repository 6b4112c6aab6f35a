"""The MCDM's conditions: nothing changes before training, every term of the guidance, files that stock loaders read."""

from __future__ import annotations

import copy
import itertools
import os
import resource
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import pytest
import tiny_models
import tiny_vision
import torch
from identity_edit_pack.demo_world import export, family
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.engine import edit_model
from identity_edit_pack.pipelines.engine.vision import vision_projection, vision_tag, vision_tokens
from identity_edit_pack.pipelines.mcdm import guidance as mcdm_guidance
from identity_edit_pack.pipelines.mcdm import model as mcdm
from identity_edit_pack.pipelines.mcdm.guidance import GuidanceScales, mcdm_estimate
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

SIGMAS = torch.tensor([8.0, 3.0, 1.0, 0.0])
FAMILIES = list(tiny_models.FAMILIES)
POSITIVE, NEGATIVE, IMAGE, UNCONDITIONAL, SOURCE = "positive", "negative", "image", "unconditional", "source"


def image(seed: int, batch: int = 1, size: int = 64) -> torch.Tensor:
    return torch.rand(batch, size, size, 3, generator=torch.Generator().manual_seed(seed))


def untrained(model: Any, vision: Any, image_tokens: int = tiny_models.TOKENS) -> mcdm.MCDM:
    generator = torch.Generator().manual_seed(0)
    embedding = mcdm.new_embedding(model, vision, (4, 8, 8), generator, image_tokens)
    return mcdm.MCDM(embedding, vision_tag(vision), engine.model_tag(model), (4, 8, 8), {"steps": 0})


def with_source_weights(model: Any, seed: int = 4) -> Any:
    """The model as training leaves it: the source image counts."""
    weight = model.model.diffusion_model.input_blocks[0][0].weight
    with torch.no_grad():
        weight[:, 4:] = 0.1 * torch.randn(weight[:, 4:].shape, generator=torch.Generator().manual_seed(seed))
    return model


def sample(guider: Any, latent: torch.Tensor, sigmas: torch.Tensor = SIGMAS, seed: int = 1) -> torch.Tensor:
    noise = comfy.sample.prepare_noise(latent, seed)
    return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=seed)


def stock_guider(model: Any, positive: Any, negative: Any, cfg: float) -> Any:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


@pytest.fixture
def seen() -> tuple[Any, Any, Any, mcdm.SourceImages]:
    """A model, its MCDM, its CLIP vision and a source image as they see it."""
    model = with_source_weights(edit_model.as_edit_model(tiny_models.sd1()))
    vision = tiny_vision.clip_vision()
    made = untrained(model, vision)
    return model, made, vision, mcdm.see_images(made, model, vision, tiny_vision.VAE(), image(1))


# -- nothing changes before training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("inference_mode", [False, True])
def test_with_zero_channels_and_no_image_tokens_the_output_is_the_base_models(name: str, inference_mode: bool):
    with torch.inference_mode(inference_mode):
        base = tiny_models.FAMILIES[name]()
        model = edit_model.as_edit_model(base)
        positive, negative = tiny_models.conditioning(1), tiny_models.conditioning(2)
        spatial = tiny_models.latent(7)
        with_source = [[positive[0][0], {**positive[0][1], "concat_latent_image": spatial}]]
        noise = torch.zeros(1, 4, 8, 8)
        before = sample(stock_guider(base, positive, negative, 4.0), noise)
        after = sample(stock_guider(model, with_source, negative, 4.0), noise)
        changed = sample(stock_guider(with_source_weights(model), with_source, negative, 4.0), noise)
    assert isinstance(model.model, comfy.model_base.IP2P)
    # A convolution over more channels adds in another order on some processors.
    assert tiny_models.relative_error(after, before) < 1e-5
    assert tiny_models.relative_error(changed, before) > 1e-3  # it is the zeros: the image is not left out


def test_a_lora_on_the_model_becomes_part_of_it_and_the_model_itself_stays():
    base = tiny_models.sd1()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    patched = base.clone()
    patched.add_patches({key: ("diff", (torch.ones_like(before[key]),))}, 0.5)
    made = edit_model.as_edit_model(patched).model.state_dict()
    comfy.model_management.unload_all_models()
    assert torch.allclose(made[key], before[key] + 0.5)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert made["diffusion_model.input_blocks.0.0.weight"].data_ptr() not in {v.data_ptr() for v in before.values()}


def test_a_model_of_the_family_is_copied_and_an_inpainting_model_refused():
    model = with_source_weights(edit_model.as_edit_model(tiny_models.sd1()))
    again = edit_model.as_edit_model(model)
    for (name, value), other in zip(model.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    with pytest.raises(IdentityEditError, match="9 input channels"):
        edit_model.as_edit_model(tiny_models.sd1(in_channels=9))


# -- MLP(.) ------------------------------------------------------------------------------------------------------------


def test_the_image_embedding_begins_as_dreamposes_adapter():
    """Karras et al. 2023: Linear(54, 50) along the tokens begins as eye(50, 54), on CLIP's 50 and the latent's 4."""
    made = mcdm.ImageEmbedding(50, 768, (4, 64, 64), 768, image_tokens=0)
    made.initialize(50, None, torch.Generator().manual_seed(0))
    assert torch.equal(made.mix.weight, torch.eye(50, 54))
    tokens, latent = torch.randn(2, 50, 768), torch.randn(2, 4, 64, 64)
    assert torch.allclose(made(tokens, latent), tokens, atol=1e-6)
    # As DreamPose pools: by two, each channel a row of 1024.
    with torch.no_grad():
        made.mix.weight.zero_()
        made.mix.weight[:4, 50:] = torch.eye(4)
    pooled = torch.nn.functional.max_pool2d(latent, 2).reshape(2, 4, 1024)
    assert torch.allclose(made(tokens, latent)[:, :4], made.latent_to_token(pooled), atol=1e-6)


@pytest.mark.parametrize(("tokens", "image_tokens"), [(257, 77), (17, 77), (50, 77)])
def test_another_number_of_tokens_begins_with_all_of_clips_in_their_order(tokens: int, image_tokens: int):
    made = mcdm.ImageEmbedding(tokens, 8, (4, 8, 8), 8, image_tokens)
    made.initialize(tokens, None, torch.Generator().manual_seed(0))
    of_clip = made.mix.weight[:, :tokens]
    assert torch.allclose(of_clip.sum(dim=1), torch.ones(image_tokens))
    assert bool((of_clip.sum(dim=0) > 0).all())  # none is left out
    center = (of_clip * torch.arange(tokens)).sum(dim=1)
    assert bool((center.diff() >= 0).all())


def test_clips_own_projection_is_taken_where_it_leads_to_the_texts_width():
    vision = tiny_vision.clip_vision()
    model = edit_model.as_edit_model(tiny_models.sd1())
    made = mcdm.new_embedding(model, vision, (4, 8, 8), torch.Generator().manual_seed(0), 0)
    tokens = vision_tokens(vision, image(3))
    c_im = made(tokens, torch.zeros(1, 4, 8, 8))
    # The class token is then CLIP's own embedding of the image, which it shares with texts.
    assert torch.allclose(c_im[:, 0], vision.encode_image(image(3), crop=False)["image_embeds"], atol=1e-5)
    assert vision_projection(vision).shape == (tiny_models.CONTEXT, tiny_vision.WIDTH)


# -- the conditions at the network -------------------------------------------------------------------------------------


def test_the_network_gets_each_condition_where_it_belongs(seen):
    model, _, _, images = seen
    prompt = tiny_models.conditioning(1)
    arrived: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
        arrived.append((args["c"]["c_concat"].clone(), args["c"]["c_crossattn"].clone()))
        return apply_model(args["input"], args["timestep"], **args["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(record)
    conditioning = mcdm.with_images(prompt, images)
    sample(stock_guider(watched, conditioning, conditioning, 1.0), torch.zeros(1, 4, 8, 8), SIGMAS[-2:])
    spatial, context = arrived[0]
    assert torch.equal(spatial, tiny_vision.VAE().encode(image(1)))  # unscaled
    assert torch.equal(context, torch.cat([prompt[0][0], images.image_embeddings], dim=1))
    assert prompt[0][0].shape[1] == tiny_models.TOKENS and "concat_latent_image" not in prompt[0][1]


def test_conditions_are_taken_away_one_by_one(seen):
    _, _, _, images = seen
    prompt = tiny_models.conditioning(1)
    full = mcdm.with_images(prompt, images)
    no_spatial = mcdm.without_images(full, spatial=True, image=False, name="x")
    nothing = mcdm.without_images(full, spatial=True, image=True, name="x")
    assert "concat_latent_image" not in no_spatial[0][1] and torch.equal(no_spatial[0][0], full[0][0])
    assert torch.equal(nothing[0][0], prompt[0][0]) and "concat_latent_image" not in nothing[0][1]
    assert "concat_latent_image" in full[0][1]
    with pytest.raises(IdentityEditError, match="connect MCDM Conditioner"):
        mcdm.without_images(prompt, spatial=True, image=True, name="positive")


# -- guidance ----------------------------------------------------------------------------------------------------------


def in_float64(e: dict[str, torch.Tensor], s: GuidanceScales, mask: torch.Tensor | None) -> torch.Tensor:
    """Eqs. 1 and 3 as they are printed."""
    e = {name: value.double() for name, value in e.items()}

    def guided(last: torch.Tensor) -> torch.Tensor:
        result = e[UNCONDITIONAL].clone()
        result += s.image * (e[IMAGE] - e[UNCONDITIONAL])
        result += s.spatial * (e[NEGATIVE] - e[IMAGE])
        result += s.text * (last - e[NEGATIVE])
        return result

    if mask is None:
        return guided(e[POSITIVE])
    m = mask.double()[:, None]
    return guided(e[POSITIVE]) * m + guided(e[SOURCE]) * (1 - m)


SCALES = [GuidanceScales(), GuidanceScales(2.5, 1.5, 7.0), GuidanceScales(1.0, 1.0, 1.0), GuidanceScales(4.0, 3.0, 0.0)]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("masked", [False, True])
def test_guidance_is_the_formula_on_random_predictions(scales: GuidanceScales, masked: bool):
    generator = torch.Generator().manual_seed(0)
    names = (POSITIVE, NEGATIVE, IMAGE, UNCONDITIONAL, SOURCE)
    estimates = {name: torch.randn(3, 4, 16, 16, generator=generator) for name in names}
    mask = torch.rand(3, 16, 16, generator=generator) if masked else None
    expected = in_float64(estimates, scales, mask)
    unused = {name for name, value in scales.coefficients().items() if value == 0.0}
    given = {name: value for name, value in estimates.items() if name not in unused}
    assert torch.allclose(mcdm_estimate(given, scales, mask).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_guider_samples_by_the_formula(seen, scales: GuidanceScales, masked: bool):
    """Against five stock guiders without guidance, combined outside of ComfyUI step by step."""
    model, _, _, images = seen
    p_b, p_a, null = (tiny_models.conditioning(seed) for seed in (1, 2, 3))
    full = mcdm.with_images(p_b, images)
    source, negative = mcdm.with_images(p_a, images), mcdm.with_images(null, images)
    mask = (torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(5)) > 0.5).float() if masked else None
    calls: list[int] = []

    def count(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
        calls.append(len(args["cond_or_uncond"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    counted = model.clone()
    counted.set_model_unet_function_wrapper(count)
    guider = mcdm_guidance.mcdm_guider(counted, full, negative, scales, source if masked else None, mask)
    zeros = torch.zeros(1, 4, 8, 8)
    result = sample(guider, zeros)

    sides = {
        POSITIVE: full,
        NEGATIVE: negative,
        SOURCE: source,
        IMAGE: [[negative[0][0], {"pooled_output": null[0][1]["pooled_output"]}]],
        UNCONDITIONAL: null,
    }
    x = comfy.sample.prepare_noise(zeros, 1) * SIGMAS[0]

    def denoised(conditioning: Any, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        out: list[torch.Tensor] = []

        def one_step(inner: Any, at: torch.Tensor, sigmas: torch.Tensor, extra_args: Any, *_: Any, **__: Any):
            out.append(inner(x, sigma.reshape(1), **extra_args))
            return at

        stock = stock_guider(model, conditioning, conditioning, 1.0)
        sampler = comfy.samplers.KSAMPLER(one_step)
        stock.sample(zeros, zeros, sampler, torch.stack([sigma, torch.zeros(())]), disable_pbar=True, seed=1)
        return out[0]

    for sigma, following in itertools.pairwise(SIGMAS):
        estimates = {name: denoised(side, x, sigma) for name, side in sides.items()}
        z_0 = in_float64(estimates, scales, mask).float()
        x = x + (following - sigma) * (x - z_0) / sigma
    expected = model.model.process_latent_out(x)
    assert tiny_models.relative_error(result, expected) < 1e-5
    assert float(result.std()) > 0.5
    assert sum(calls) == guider.evaluations == 3 * scales.evaluations(masked=masked)
    assert len(calls) == 3  # contexts of 8 and of 16 tokens go together


def test_the_papers_scales_cost_three_evaluations_and_four_with_a_mask():
    assert GuidanceScales().evaluations(masked=False) == 3
    assert GuidanceScales().evaluations(masked=True) == 4
    assert GuidanceScales(3.0, 2.0, 5.0).evaluations(masked=True) == 5


def test_a_mask_of_ones_is_the_unmasked_guidance_and_of_zeros_the_sources(seen):
    model, _, _, images = seen
    full, source, negative = (mcdm.with_images(tiny_models.conditioning(seed), images) for seed in (1, 2, 3))
    zeros = torch.zeros(1, 4, 8, 8)

    def masked(value: float) -> torch.Tensor:
        mask = torch.full((64, 64), value)
        return sample(mcdm_guidance.mcdm_guider(model, full, negative, GuidanceScales(), source, mask), zeros)

    plain = sample(mcdm_guidance.mcdm_guider(model, full, negative, GuidanceScales()), zeros)
    of_source = sample(mcdm_guidance.mcdm_guider(model, source, negative, GuidanceScales()), zeros)
    assert tiny_models.relative_error(masked(1.0), plain) < 1e-5
    assert tiny_models.relative_error(masked(0.0), of_source) < 1e-5
    assert tiny_models.relative_error(plain, of_source) > 1e-3


def test_functions_after_the_guidance_run_and_the_guider_leaves_the_model_as_it_was(seen):
    model, _, _, images = seen
    full, negative = (mcdm.with_images(tiny_models.conditioning(seed), images) for seed in (1, 3))
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(lambda args: 0.0 * args["denoised"])
    options = copy.deepcopy(model.model_options)
    guider = mcdm_guidance.mcdm_guider(patched, full, negative, GuidanceScales())
    assert float(sample(guider, torch.zeros(1, 4, 8, 8)).abs().max()) < 1e-5
    assert model.model_options == options and not model.wrappers


def test_a_batch_of_images_is_edited_one_by_one(seen):
    model, made, vision, _ = seen
    images = mcdm.see_images(made, model, vision, tiny_vision.VAE(), torch.cat([image(1), image(2)]))
    full, negative = (mcdm.with_images(tiny_models.conditioning(seed), images) for seed in (1, 3))
    both = sample(mcdm_guidance.mcdm_guider(model, full, negative, GuidanceScales()), torch.zeros(2, 4, 8, 8))
    second = mcdm.SourceImages(images.latent[1:], images.image_embeddings[1:])
    full, negative = (mcdm.with_images(tiny_models.conditioning(seed), second) for seed in (1, 3))
    guider = mcdm_guidance.mcdm_guider(model, full, negative, GuidanceScales())
    noise = comfy.sample.prepare_noise(torch.zeros(2, 4, 8, 8), 1)[1:]
    alone = guider.sample(
        noise, torch.zeros(1, 4, 8, 8), comfy.samplers.sampler_object("euler"), SIGMAS, disable_pbar=True, seed=1
    )
    assert tiny_models.relative_error(both[1:], alone) < 1e-5


# -- clear errors ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_name(seen):
    model, made, vision, images = seen
    full = mcdm.with_images(tiny_models.conditioning(1), images)
    vae = tiny_vision.VAE()
    with pytest.raises(IdentityEditError, match="takes 4 input channels and no source image"):
        mcdm.see_images(made, tiny_models.sd1(), vision, vae, image(1))
    with pytest.raises(IdentityEditError, match="takes 4 input channels"):
        mcdm_guidance.mcdm_guider(tiny_models.sd1(), full, full, GuidanceScales())
    with pytest.raises(IdentityEditError, match="not of the family of this MCDM's file"):
        mcdm.see_images(made, edit_model.as_edit_model(tiny_models.sd2_v()), vision, vae, image(1))
    with pytest.raises(IdentityEditError, match="17 tokens of width 32 instead of 17 of width 16"):
        mcdm.see_images(made, model, tiny_vision.clip_vision(width=32), vae, image(1))
    with pytest.raises(IdentityEditError, match="different weights"):
        mcdm.see_images(made, model, tiny_vision.clip_vision(seed=8), vae, image(1))
    with pytest.raises(IdentityEditError, match="connect MCDM Conditioner"):
        mcdm_guidance.mcdm_guider(model, tiny_models.conditioning(1), full, GuidanceScales())
    with pytest.raises(IdentityEditError, match="needs source"):
        mcdm_guidance.mcdm_guider(model, full, full, GuidanceScales(), None, torch.ones(1, 64, 64))

    class DinoV2:
        def get_sd(self) -> dict[str, torch.Tensor]:
            return {"embeddings.cls_token": torch.zeros(1)}

    with pytest.raises(IdentityEditError, match="not a CLIP image encoder"):
        vision_tag(DinoV2())


def test_other_weights_than_the_files_are_warned_about(seen):
    model, made, _, _ = seen
    assert mcdm.check_mcdm(made, model) is None
    other = edit_model.as_edit_model(tiny_models.sd1(seed=1))
    assert "other weights" in mcdm.check_mcdm(made, other)


@pytest.mark.parametrize("kept_in", ["float16", "bfloat16"])
def test_weights_that_the_file_has_rounded_are_the_files(seen, kept_in: str):
    """The tag in a file is that of the trained float32 weights; on a processor ComfyUI loads the file's as float32."""
    model, made, _, _ = seen
    loaded = edit_model.as_edit_model(model)
    dtype, keys = mcdm.FILE_DTYPES[kept_in], edit_model.unet_keys(loaded)
    edit_model.set_weights(loaded, {key: loaded.model.get_parameter(key).to(dtype) for key in keys})
    assert mcdm.check_mcdm(made, loaded) is None


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(pack):
    """The demo checkpoint: MODEL, CLIP and VAE."""
    family.register()
    path = str(export.WEIGHTS_FOLDER / export.CHECKPOINT_NAME)
    return comfy.sd.load_checkpoint_guess_config(path, model_options={"dtype": torch.float32})[:3]


def test_the_stock_loader_gives_the_same_latent_from_the_saved_file(demo, tmp_path: Path):
    base, clip, vae = demo
    vision = tiny_vision.clip_vision(projection=128)
    model = with_source_weights(edit_model.as_edit_model(base))
    made = untrained(model, vision, 77)
    path = tmp_path / "edit.safetensors"
    mcdm.save_mcdm(made, str(path), model, clip, vae, {}, "float32")
    loaded = comfy.sd.load_checkpoint_guess_config(str(path), model_options={"dtype": torch.float32})
    again = mcdm.load_mcdm(str(path))
    assert isinstance(loaded[0].model.model_config, family.DemoWorldInstructPix2Pix)
    assert isinstance(loaded[0].model, comfy.model_base.SD15_instructpix2pix)

    def edit(parts: tuple[Any, Any, Any], made: mcdm.MCDM) -> torch.Tensor:
        model, clip, vae = parts
        images = mcdm.see_images(made, model, vision, vae, image(1, size=128))
        prompts = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a smiling cat", ""))
        full, negative = (mcdm.with_images(prompt, images) for prompt in prompts)
        guider = mcdm_guidance.mcdm_guider(model, full, negative, GuidanceScales())
        return sample(guider, torch.zeros(1, 4, 16, 16), SIGMAS[1:])

    assert mcdm.check_mcdm(again, loaded[0]) is None
    assert torch.equal(edit((model, clip, vae), made), edit(loaded[:3], again))
    assert again.training == {"steps": 0}
    # The other checkpoint is still what it was.
    assert isinstance(base.model.model_config, family.DemoWorld) and edit_model.input_channels(base) == 4


def test_a_float16_file_of_the_demo_checkpoint_is_small_and_the_unet_alone_is_a_diffusion_model(demo, tmp_path: Path):
    base, clip, vae = demo
    vision = tiny_vision.clip_vision(projection=128)
    model = with_source_weights(edit_model.as_edit_model(base))
    made = untrained(model, vision, 77)
    whole, alone = tmp_path / "whole.safetensors", tmp_path / "unet.safetensors"
    trained = {"diffusion_model.out.2.bias": torch.full((4,), 0.25)}
    mcdm.save_mcdm(made, str(whole), model, clip, vae, trained, "float16")
    mcdm.save_mcdm(made, str(alone), model, None, None, trained, "float16")
    assert whole.stat().st_size <= 60 * 10**6
    loaded = comfy.sd.load_diffusion_model(str(alone))
    assert isinstance(loaded.model, comfy.model_base.SD15_instructpix2pix)
    assert torch.equal(loaded.model.diffusion_model.out[2].bias.float(), torch.full((4,), 0.25))
    assert mcdm.check_mcdm(mcdm.load_mcdm(str(alone)), loaded) is None
    with pytest.raises(IdentityEditError, match="contains no MCDM"):
        mcdm.load_mcdm(str(export.WEIGHTS_FOLDER / export.CHECKPOINT_NAME))


def test_a_full_disk_leaves_no_file(seen, tmp_path: Path):
    model, made, _, _ = seen
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "edit.safetensors"
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(IdentityEditError, match="cannot be written"):
            mcdm.save_mcdm(made, str(path), model, None, None, {}, "float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_a_file_of_other_conventions_or_damaged_is_refused(seen, tmp_path: Path, monkeypatch):
    model, made, _, _ = seen
    path = tmp_path / "edit.safetensors"
    with monkeypatch.context() as patch:
        patch.setitem(mcdm.CONVENTIONS, "null spatial", "the VAE's black image")
        mcdm.save_mcdm(made, str(path), model, None, None, {}, "float32")
    with pytest.raises(IdentityEditError, match="conventions that this version"):
        mcdm.load_mcdm(str(path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(IdentityEditError, match="cannot be read"):
        mcdm.load_mcdm(str(path))


# -- families ----------------------------------------------------------------------------------------------------------


def detected(model_channels: int, context: int, in_channels: int, linear: bool) -> type:
    import comfy.model_detection

    config = {
        "model_channels": model_channels, "context_dim": context, "in_channels": in_channels,
        "use_linear_in_transformer": linear, "adm_in_channels": None, "use_temporal_attention": False,
    }  # fmt: skip
    return type(comfy.model_detection.model_config_from_unet_config(config, {}))


def test_every_family_is_found_by_its_channels_and_none_of_the_others_changes(pack):
    family.register()
    edit_model.register_families()
    edit_model.register_families()
    known = comfy.supported_models
    assert detected(320, 768, 8, False) is known.SD15_instructpix2pix
    assert detected(320, 768, 4, False) is known.SD15 and detected(320, 768, 9, False) is known.SD15
    assert detected(320, 1024, 8, True).__name__ == "SD20InstructPix2Pix"
    assert detected(320, 1024, 4, True) is known.SD20 and detected(320, 1024, 9, True) is known.SD20
    assert detected(128, 128, 8, False).__name__ == "DemoWorldInstructPix2Pix"
    assert detected(128, 128, 4, False).__name__ == "DemoWorld"
    names = [item.__name__ for item in known.models]
    assert names.count("SD20InstructPix2Pix") == 1 and names.count("DemoWorldInstructPix2Pix") == 1


def test_sd2s_family_tells_velocity_from_noise_as_comfyui_does():
    key = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    config = edit_model.SD20InstructPix2Pix({"in_channels": 8})
    of_velocity, of_noise = ({key: scale * torch.tensor([-1.0, 1.0])} for scale in (0.2, 0.01))
    assert config.model_type(of_velocity) == comfy.model_base.ModelType.V_PREDICTION
    assert config.model_type(of_noise) == comfy.model_base.ModelType.EPS
