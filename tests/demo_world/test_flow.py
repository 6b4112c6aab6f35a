"""The demo world's flow transformer: its training resumes, and ComfyUI's stock loader reads what it exports."""

import shutil

import comfy.model_base
import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.supported_models
import pytest
import torch
from identity_edit_pack.demo_world import family, networks
from identity_edit_pack.demo_world.export import FLOW_NAME, WEIGHTS_FOLDER, export_checkpoint
from identity_edit_pack.demo_world.latents import WordTokenizer
from identity_edit_pack.demo_world.train_flow import centers, copy_norm_inputs, from_patches, matrices, train_flow
from identity_edit_pack.demo_world.training import MuonAndAdamW
from safetensors import safe_open
from safetensors.torch import save_file

CAPTION = "a smiling orange cat wearing a crown standing on the grass facing left"
STEPS, DECAY = 4, 2


@pytest.fixture(scope="module")
def folder(pack, tmp_path_factory):
    """The parts of an untrained checkpoint and four latents with captions, for a transformer of two blocks."""
    folder = tmp_path_factory.mktemp("flow")
    tokenizer = WordTokenizer()
    tokens = torch.tensor([tokenizer(CAPTION), tokenizer("")], dtype=torch.int32)
    token_ids = torch.unique(tokens).long()
    torch.manual_seed(0)
    state = {
        "latents": torch.randn(4, 4, 16, 16).half(),
        "tokens": tokens[:1].expand(4, 5, -1).contiguous(),
        "empty": tokens[1].clone(),
    }
    save_file(state, folder / "latents_0000.safetensors")
    text_encoder = networks.TextEncoder(token_ids.tolist()).state_dict()
    text_encoder["clip.text_projection.weight"] = torch.eye(128)
    torch.save({"unet": {}, "text_encoder": text_encoder, "token_ids": token_ids}, folder / "unet.pt")
    torch.save(networks.make_autoencoder().state_dict(), folder / "autoencoder.pt")
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """The folder after training with two blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "in_training", False, raising=False)  # the training sets it
        patch.setitem(networks.FLOW_CONFIG, "depth", 1)
        patch.setitem(networks.FLOW_CONFIG, "depth_single_blocks", 1)
        yield train_in(folder)


def train_in(folder):
    train_flow(folder, steps=STEPS, batch_size=2, learning_rate=3e-3, decay_steps=DECAY, patch_size=1)
    return folder


def test_a_resumed_training_equals_an_uninterrupted_one(trained, tmp_path):
    for name in ("latents_0000.safetensors", "unet.pt"):
        shutil.copy(trained / name, tmp_path)
    shutil.copy(trained / "flow_state_constant.pt", tmp_path / "flow_state.pt")
    assert torch.load(tmp_path / "flow_state.pt", weights_only=True)["step"] == STEPS - DECAY
    train_in(tmp_path)
    first, resumed = (torch.load(path / "flow.pt", weights_only=True) for path in (trained, tmp_path))
    assert first.keys() == resumed.keys()
    assert all(torch.equal(first[name], resumed[name]) for name in first)


def test_the_stock_loader_reads_the_exported_file(trained, tmp_path):
    path = export_checkpoint(trained, "flow", tmp_path / "flow.safetensors")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["modelspec.license"] == "Apache-2.0"
    family.register()
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(path))
    assert isinstance(model.model, comfy.model_base.Flux) and isinstance(model.model.model_config, family.DemoWorldFlow)
    assert model.get_model_object("model_sampling").percent_to_sigma(0.25) == 0.75, "a straight path without a shift"
    for name, value in torch.load(trained / "flow.pt", weights_only=True).items():
        assert torch.equal(model.model.diffusion_model.state_dict()[name].float(), value.half().float()), name

    def encode(text):
        embeddings, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
        return [[embeddings, {"pooled_output": pooled}]]

    positive = encode(CAPTION)
    ((embeddings, extra),) = positive
    rows = torch.tensor([WordTokenizer()(CAPTION)])[:, : networks.FLOW_TOKENS]
    end = int((rows == networks.TEXT_CONFIG["eos_token_id"]).int().argmax())
    parts = torch.load(trained / "unet.pt", weights_only=True)
    text_encoder = networks.TextEncoder(parts["token_ids"].tolist())
    text_encoder.load_state_dict(parts["text_encoder"])
    with torch.no_grad():
        in_training = text_encoder(torch.searchsorted(parts["token_ids"], rows))
    assert torch.allclose(embeddings, in_training, atol=2e-2), "in float16 instead of float32"
    assert torch.allclose(extra["pooled_output"], in_training[:, end], atol=2e-2)
    assert encode("crown " * 40)[0][0].shape[1] == 42
    assert encode("crown " * 100)[0][0].shape[1] == 2 * 77

    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latent = comfy.sample.sample(
        model, noise, 2, 3.0, "euler", "simple", positive, encode(""), torch.zeros_like(noise),
        disable_pbar=True, seed=0,
    )  # fmt: skip
    image = vae.decode(latent)
    assert image.shape == (1, 128, 128, 3) and bool(torch.isfinite(image).all())


def test_the_other_families_of_the_loader_are_found_as_before(pack):
    family.register()
    order = [entry.__name__ for entry in comfy.supported_models.models]
    assert order.index("DemoWorldFlow") < order.index("FluxSchnell")
    assert order.count("DemoWorldFlow") == 1
    flux = {"image_model": "flux", "guidance_embed": False, "context_in_dim": 4096, "hidden_size": 3072}
    assert not family.DemoWorldFlow.matches(flux)


def test_muon_gets_the_matrices_of_fused_layers_one_by_one(pack):
    flow = networks.make_flow(depth=1, depth_single_blocks=1)
    optimizer = MuonAndAdamW(flow, 0.01, 0.0, matrices)
    assert {tuple(view.shape) for view in optimizer.views} == {(192, 192), (768, 192), (192, 768), (192, 960)}
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    copy_norm_inputs(flow)
    with torch.no_grad():
        for name, value in flow.named_parameters():
            if ".lin." in name or name.startswith("final_layer."):
                value.normal_(std=0.1)
    x = torch.randn(1, 4, 4, 4)
    flow(x, torch.rand(1), torch.randn(1, 5, 128), y=torch.randn(1, 128)).square().mean().backward()
    optimizer.step()
    unchanged = [name for name, value in flow.state_dict().items() if torch.equal(value, before[name])]
    assert not unchanged


def test_coarse_patches_give_the_same_weights_on_a_constant_image(pack):
    """Weights for 2x2 patches, with each patch at its center, answer a constant latent alike after conversion."""
    torch.manual_seed(0)
    coarse = networks.make_flow(depth=1, depth_single_blocks=1, patch_size=2)
    for name, value in coarse.named_parameters():
        if ".lin." in name or name.startswith("final_layer."):
            torch.nn.init.normal_(value, std=0.1)
    fine = networks.make_flow(depth=1, depth_single_blocks=1)
    fine.load_state_dict(from_patches(coarse.state_dict(), 2))
    image = torch.randn(1, 4, 1, 1).expand(1, 4, 8, 8)
    text, pooled, time = torch.randn(1, 5, 128), torch.randn(1, 128), torch.tensor([0.5])
    with torch.no_grad():
        answers = [
            flow(image, time, text, y=pooled, transformer_options={"rope_options": centers(size)})
            for flow, size in ((coarse, 2), (fine, 1))
        ]
    averages = [torch.nn.functional.avg_pool2d(answer, 2) for answer in answers]
    assert torch.allclose(*averages, atol=0.05)
    assert averages[0].std() > 0.2, "not all alike anyhow"


def test_the_committed_checkpoint_is_small():
    assert (WEIGHTS_FOLDER / FLOW_NAME).stat().st_size <= 40 * 10**6
