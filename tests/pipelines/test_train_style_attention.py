"""Training a style attention: equation 5 by another library in float64, what is dropped and what is left alone."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import tiny_models
import tiny_styles
import tiny_text_encoders
import torch
from identity_edit_pack.attention.style_cross_attention import PARALLEL, SEQUENTIAL
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.pidiff import style_attention as styles
from identity_edit_pack.pipelines.pidiff import train as trained
from identity_edit_pack.pipelines.pidiff.train import StyleSettings, train_style_attention
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.training import images as training_images
from identity_edit_pack.pipelines.training.images import TrainingImages
from identity_edit_pack.pipelines.training.loop import BFLOAT16, FLOAT32, generator_of

SETTINGS = StyleSettings(
    pseudo_word="sks", row_groups=tiny_styles.GROUPS, steps=6, learning_rate=1e-3, batch_size=2, precision=FLOAT32,
    seed=3, checkpoint_every=2, sample_every=3, sample_steps=2,
)  # fmt: skip
CERTAIN = {"templates": ("an image of {}",), "text_drop": 0.0, "style_drop": 0.0, "style_noise": 0.0}
"""Settings without any draw but those of the noise."""
COUNT = 4
W_PLUS = tiny_styles.w_plus(images=COUNT)


def images(masked: bool = False, captions: str = "") -> TrainingImages:
    generator = torch.Generator().manual_seed(1)
    latents = [5.0 * torch.randn(4, 8, 8, generator=generator) for _ in range(COUNT)]
    masks = [(torch.rand(8, 8, generator=generator) > 0.5).float() if masked else None for _ in range(COUNT)]
    return TrainingImages(latents, [captions] * COUNT, masks, f"images {masked}")


def make(family: str = "sd1") -> tuple[Any, Any]:
    return tiny_models.FAMILIES[family](output_gain=0.1), tiny_text_encoders.clip(family)


def train(
    family: str = "sd1", settings: Any = SETTINGS, shown: Any = None, w_plus: Any = W_PLUS, models: Any = None,
    **options: Any,
):  # fmt: skip
    model, clip = models or make(family)
    return train_style_attention(model, clip, shown or images(), w_plus, settings, **options)


@pytest.fixture(scope="module")
def uninterrupted():
    return train()


class Literal(torch.nn.Module):
    """PIDiff on diffusers' UNet in float64: eq. 1 to 5 as they are written, W'_q, W'_k, W'_v copies of the text's."""

    def __init__(self, model: Any, mapping: Any, kind: str) -> None:
        super().__init__()
        self.unet = tiny_models.diffusers_twin(model).double().requires_grad_(False)
        self.mapping = copy.deepcopy(mapping).double()
        self.own = torch.nn.ModuleDict()
        self.tokens: torch.Tensor | None = None
        literal = self

        class Processor:
            def __init__(self, own: Any) -> None:
                self.own = own

            def __call__(self, attention: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
                out = _attend(attention, hidden_states, encoder_hidden_states, attention.heads)
                text = attention.to_out[0](out)
                query = text if kind == SEQUENTIAL else hidden_states
                sca = _attend(self.own, query, literal.tokens, attention.heads)
                return text + sca @ attention.to_out[0].weight.T

        processors = dict(self.unet.attn_processors)
        for name in [name for name in processors if name.endswith("attn2.processor")]:
            text = self.unet.get_submodule(name.removesuffix(".processor"))
            parts = {part: copy.deepcopy(getattr(text, part)) for part in ("to_q", "to_k", "to_v")}
            self.own[name.replace(".", "_")] = torch.nn.ModuleDict(parts).requires_grad_(True)
            processors[name] = Processor(self.own[name.replace(".", "_")])
        self.unet.set_attn_processor(processors)


def _attend(attention: Any, x: torch.Tensor, context: torch.Tensor, heads: int) -> torch.Tensor:
    parts = attention if isinstance(attention, torch.nn.ModuleDict) else None
    to_q, to_k, to_v = (parts[n] if parts is not None else getattr(attention, n) for n in ("to_q", "to_k", "to_v"))
    q, k, v = (linear(given).chunk(heads, dim=-1) for linear, given in ((to_q, x), (to_k, context), (to_v, context)))
    each = [
        torch.softmax(qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5, -1) @ vh
        for qh, kh, vh in zip(q, k, v, strict=True)
    ]
    return torch.cat(each, dim=-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [SEQUENTIAL, PARALLEL])
def test_loss_and_gradient_are_those_of_equation_5(kind: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clip = make()
    settings = dataclasses.replace(
        SETTINGS, kind=kind, masked=masked, steps=1, optimizer="SGD", learning_rate=1.0, **CERTAIN
    )
    monkeypatch.setattr(trained, "in_file_precision", lambda network: network)  # all digits
    start: dict[str, torch.Tensor] = {}
    own_train = trained.train

    def note_start(variables: Any, *arguments: Any, **options: Any) -> Any:
        start.update({name: value.detach().clone() for name, value in variables.items()})
        start_mapping.append(copy.deepcopy(networks[0]))
        return own_train(variables, *arguments, **options)

    networks, start_mapping = [], []
    own_network = trained.StyleNetwork

    class Network(own_network):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            networks.append(self.mapping)

    monkeypatch.setattr(trained, "StyleNetwork", Network)
    monkeypatch.setattr(trained, "train", note_start)
    shown = images(masked)
    style, run = train(settings=settings, shown=shown, models=(model, clip))

    literal = Literal(model, start_mapping[0].requires_grad_(True), kind)
    chosen = training_images.batch_indices(shown, 2, 0, settings.seed, trained._WHAT)
    z_0 = torch.stack([engine.to_model_scale(model, shown.latents[number]) for number in chosen])
    generator = generator_of(settings.seed, 0, trained._WHAT)
    t, eps = torch.randint(1000, (2,), generator=generator), torch.randn(z_0.shape, generator=generator)
    sigma = model.get_model_object("model_sampling").sigmas[t].double().reshape(-1, 1, 1, 1)
    z_t = (z_0.double() + sigma * eps.double()) / (1 + sigma**2) ** 0.5
    text = clip.encode_from_tokens(clip.tokenize("an image of sks")).detach().double().expand(2, -1, -1)
    literal.tokens = literal.mapping(W_PLUS.rows[chosen].double(), W_PLUS.average.double())
    predicted = literal.unet(z_t, t.double(), text).sample
    error = (predicted - eps.double()).square()
    if masked:
        masks = torch.stack([shown.masks[number] for number in chosen])[:, None].double()
        loss = ((error * masks).sum((1, 2, 3)) / (4 * masks.sum((1, 2, 3)))).mean()
    else:
        loss = error.mean()
    assert run.losses[0] == pytest.approx(float(loss.detach()), rel=1e-5)

    loss.backward()
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    names = sorted(literal.own, key=lambda name: (order["_".join(name.split("_")[:2])], name))
    keys = sorted(style.network.attention.sizes, key=lambda key: (["input", "middle", "output"].index(key[0]), key[1:]))
    after = dict(style.network.named_parameters())
    for name, key in zip(names, keys, strict=True):
        for part in ("to_q", "to_k", "to_v"):
            theirs = literal.own[name][part].weight
            ours = f"attention.layers.{'_'.join(map(str, key))}.{part}.weight"
            assert torch.equal(start[ours].double(), theirs.detach()), "begins as the text's own"
            _same_gradient(start[ours] - after[ours].detach(), theirs.grad, ours)
    for name, parameter in literal.mapping.named_parameters():
        _same_gradient(start[f"mapping.{name}"] - after[f"mapping.{name}"].detach(), parameter.grad, name)


def _same_gradient(step: torch.Tensor, gradient: torch.Tensor, name: str) -> None:
    """A step of SGD with learning rate 1; its digits are those that are left of the weight."""
    assert float((step.double() - gradient).abs().max()) < 1e-6 + 1e-3 * float(gradient.abs().max()), name


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, SEQUENTIAL) for family in tiny_models.FAMILIES), ("sd1", PARALLEL)]
)
def test_it_learns_and_leaves_everything_else_alone(family: str, kind: str) -> None:
    with torch.inference_mode():
        model, clip = make(family)
        before = [copy.deepcopy(part.state_dict()) for part in (model.model, clip.cond_stage_model)]
        settings = dataclasses.replace(SETTINGS, kind=kind, steps=30, learning_rate=1e-2, sample_every=0, **CERTAIN)
        style, run = train(settings=settings, models=(model, clip))
    for part, state in zip((model.model, clip.cond_stage_model), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())
        assert not any(parameter.grad is not None for parameter in part.parameters())
    assert not model.model_options["transformer_options"].get("patches")
    assert not any(parameter.requires_grad for parameter in style.network.parameters())
    assert {parameter.device.type for parameter in style.network.parameters()} == {"cpu"}
    assert len(run.losses) == 30 and len(run.samples) == 1 and run.samples[0][1].shape == (1, 4, 8, 8)
    assert (style.kind, style.style_rows, style.style_width) == (kind, tiny_styles.ROWS, tiny_styles.WIDTH)
    assert style.encoder == tiny_styles.ENCODER and style.model is not None and style.pseudo_word == "sks"
    # The same draws once more: what was learned serves the images it was learned from.
    model_again, clip_again = make(family)
    once = dataclasses.replace(settings, steps=1, learning_rate=1e-30)
    again, second = train(family, once, models=(model_again, clip_again))
    assert sum(run.losses[-8:]) < sum(run.losses[:8])
    assert again.training["steps"] == 1 and second.losses[0] == pytest.approx(run.losses[0], rel=1e-5)


def test_learned_styles_tell_people_apart(uninterrupted: Any) -> None:
    style, run = uninterrupted
    assert [step for step, _ in run.samples] == [3, 6]
    tokens, null = styles.style_tokens(style, W_PLUS)
    assert tokens.shape == (COUNT, 4, tiny_models.CONTEXT)
    assert float((tokens[0] - tokens[1]).abs().max()) > 0.1 < float((tokens[0] - null[0]).abs().max())
    values = torch.cat([parameter.flatten() for parameter in style.network.parameters()])
    assert torch.equal(values, values.half().float()), "as the file will hold it"


# -- draws -------------------------------------------------------------------------------------------------------------


def draws(settings: Any, monkeypatch: pytest.MonkeyPatch, steps: int = 40) -> tuple[list[str], torch.Tensor]:
    """All captions that were encoded in training and all tokens [steps * 2, 4, C] that were given."""
    captions: list[str] = []
    given: list[torch.Tensor] = []
    own_encode, own_forward = engine.trainable.TrainableNetworks.encode, styles.MappingNetwork.forward

    def encode(self: Any, texts: Any) -> Any:
        captions.extend(texts)
        return own_encode(self, texts)

    def forward(self: Any, *arguments: Any) -> torch.Tensor:
        given.append(own_forward(self, *arguments))
        return given[-1]

    monkeypatch.setattr(engine.trainable.TrainableNetworks, "encode", encode)
    monkeypatch.setattr(styles.MappingNetwork, "forward", forward)
    # So little is learned that equal styles keep giving equal tokens.
    train(settings=dataclasses.replace(settings, steps=steps, learning_rate=1e-12, weight_decay=0.0, sample_every=0))
    return captions[:-2], torch.cat(given[:-1]).detach()  # without the sample's


def test_templates_and_both_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SETTINGS, style_noise=0.0)
    captions, tokens = draws(settings, monkeypatch)
    assert len(captions) == len(tokens) == 80
    named = {settings.caption(template) for template in trained.TEMPLATES}
    assert set(captions) == {"", *named} and "a cropped photo of sks" in named
    different = torch.unique(tokens.flatten(1).round(decimals=4), dim=0, return_counts=True)
    assert len(different[0]) == COUNT + 1
    null = [row for row, count in zip(*different, strict=True) if count == different[1].max()]
    without_style = (tokens.flatten(1).round(decimals=4) == null[0]).all(dim=1).tolist()
    without_text = [caption == "" for caption in captions]
    for dropped in (without_style, without_text):
        assert 0.3 < sum(dropped) / 80 < 0.7
    both = sum(a and b for a, b in zip(without_style, without_text, strict=True)) / 80
    assert 0.1 < both < 0.4, "each is drawn on its own"


def test_noise_on_the_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SETTINGS, **{**CERTAIN, "style_noise": 0.2})
    _, tokens = draws(settings, monkeypatch, steps=4)
    assert len(torch.unique(tokens.flatten(1).round(decimals=5), dim=0)) == 8, "no two are alike"
    monkeypatch.undo()
    _, all_dropped = draws(dataclasses.replace(settings, style_drop=1.0), monkeypatch, steps=4)
    assert len(torch.unique(all_dropped.flatten(1).round(decimals=5), dim=0)) == 1, "the null style has no noise"


def test_own_captions_instead_of_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = images(captions="a smiling sks person")
    seen: list[str] = []
    own = engine.trainable.TrainableNetworks.encode

    def encode(self: Any, texts: Any) -> Any:
        seen.extend(texts)
        return own(self, texts)

    monkeypatch.setattr(engine.trainable.TrainableNetworks, "encode", encode)
    train(settings=dataclasses.replace(SETTINGS, templates=(), text_drop=0.0), shown=shown)
    assert set(seen) == {"a smiling sks person", ""} and seen.count("") == 2, "only the samples have none"


# -- the run -----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one(uninterrupted: Any, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, *_: Any) -> None:
        if done == 3:
            raise Stopped

    def path(run: str) -> str:
        return str(tmp_path / f"{run}.safetensors")

    with pytest.raises(Stopped):
        train(checkpoint=path, progress=stop)
    assert len(list(tmp_path.iterdir())) == 1
    style, run = train(checkpoint=path)
    expected, whole = uninterrupted
    assert run.resumed_at == 3 and run.losses == pytest.approx(whole.losses, rel=1e-6)
    for name, value in style.network.state_dict().items():
        assert torch.allclose(value, expected.network.state_dict()[name], atol=1e-4), name
    # Other styles are another run.
    moved = dataclasses.replace(W_PLUS, rows=W_PLUS.rows + 0.1)
    assert train(checkpoint=path, w_plus=moved)[1].resumed_at == 0


@pytest.mark.parametrize("kind", [SEQUENTIAL, PARALLEL])
def test_checkpointing_gives_the_same(kind: str) -> None:
    settings = dataclasses.replace(SETTINGS, kind=kind)
    plain, checkpointed = (
        train(settings=dataclasses.replace(settings, checkpointing=checkpointing))[1] for checkpointing in (False, True)
    )
    assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-5)


def test_bfloat16_stays_near(uninterrupted: Any) -> None:
    style, run = train(settings=dataclasses.replace(SETTINGS, precision=BFLOAT16))
    assert run.losses == pytest.approx(uninterrupted[1].losses, rel=0.1)
    assert all(torch.isfinite(parameter).all() for parameter in style.network.parameters())


def test_on_a_model_with_a_lora_it_begins_as_the_changed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clip = make()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
    generator = torch.Generator().manual_seed(4)
    plain = model.model.state_dict()[f"{key}.weight"].clone()
    shape = plain.shape
    name = "lora_unet_" + key.removeprefix("diffusion_model.").replace(".", "_")
    up, down = torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator)
    changed, _ = comfy.sd.load_lora_for_models(
        model, None, {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, 1.0, 1.0
    )
    monkeypatch.setattr(trained, "in_file_precision", lambda network: network)
    once = dataclasses.replace(SETTINGS, steps=1, learning_rate=1e-12, weight_decay=0.0)
    style, _ = train(models=(changed, clip), settings=once)
    begun = style.network.attention["middle", 0, 0].to_q.weight
    assert torch.allclose(begun, plain + up @ down, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_beside_a_patch_that_writes_in_place(checkpointing: bool) -> None:
    """FreeU multiplies a part of the hidden state in place, of which the backward pass needs what it was."""

    def in_place(hidden: torch.Tensor, skip: torch.Tensor, options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        half = hidden.shape[1] // 2
        hidden[:, :half] = hidden[:, :half] * hidden.mean(1, keepdim=True)
        return hidden, skip

    model, clip = make()
    patched = model.clone()
    patched.set_model_output_block_patch(in_place)
    _, record = train(
        models=(patched, clip), settings=dataclasses.replace(SETTINGS, checkpointing=checkpointing, steps=2)
    )
    assert len(record.losses) == 2 and all(loss > 0.0 for loss in record.losses)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "both"}, "kind is 'both'; choose one of sequential, parallel"),
        ({"precision": "float8"}, "precision is 'float8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"text_drop": 1.5}, "text_drop is 1.5"),
        ({"style_drop": float("nan")}, "style_drop is nan"),
        ({"style_noise": -1.0}, "style_noise is -1"),
        ({"pseudo_word": " "}, "The placeholder token is empty"),
        ({"templates": ("a photo",)}, "The template 'a photo' has no place"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(IdentityEditError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_images_and_styles_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(IdentityEditError, match="4 images and W\\+ codes of 1"):
        train(w_plus=tiny_styles.w_plus())
    with pytest.raises(IdentityEditError, match="have 7 rows.*such as '1-2, 3-4, 5, 6-7'"):
        train(settings=dataclasses.replace(SETTINGS, row_groups=styles.ROW_GROUPS))
    with pytest.raises(IdentityEditError, match="no image has a mask"):
        train(settings=dataclasses.replace(SETTINGS, masked=True))
    with pytest.raises(IdentityEditError, match="Image 1 has no caption and there are no templates"):
        train(settings=dataclasses.replace(SETTINGS, templates=()))


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    shown = images()
    shown.latents[0][0, 0, 0] = float("nan")
    with pytest.raises(IdentityEditError, match="not finite"):
        train(shown=shown)
