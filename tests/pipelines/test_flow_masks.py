"""Subject masks of flow models: tokens of every text encoder, Segment Subject and Identity-Aware Mask Blend against
literal loops."""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.aura_t5
import comfy.text_encoders.flux
import comfy.text_encoders.hidream
import comfy.text_encoders.pixart_t5
import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.z_image
import pytest
import tiny_flow_models
import tiny_models
import tiny_text_encoders
import torch
from identity_edit_pack.attention.identity_mask import identity_mask
from identity_edit_pack.attention.joint_capture import capture_joint_attention
from identity_edit_pack.pipelines import engine
from identity_edit_pack.pipelines.inversion.inversion import invert_image, sampling_step
from identity_edit_pack.pipelines.lipe import attention_segmentation
from identity_edit_pack.pipelines.lipe.attention_segmentation import MaskSettings
from identity_edit_pack.pipelines.lipe.identity_mask_blend import BlendSettings, identity_mask_blend
from identity_edit_pack.pipelines.lipe.identity_prompt import (
    IdentityPrompt,
    capture_identity,
    contrast_for,
    encode_identity_prompt,
    identity_in_caption,
)
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.text.prompt_tokens import embedded_tokens, embedded_words

encoders = comfy.text_encoders
CUT = 34  # tokens of Qwen-Image's template that its encoder cuts off
TOKENIZERS = {
    "flux": (encoders.flux.FluxTokenizer, ("t5xxl",), 0),
    "sd3": (encoders.sd3_clip.SD3Tokenizer, ("clip_l", "t5xxl"), 0),
    "chroma": (encoders.pixart_t5.PixArtTokenizer, ("clip_t5xxl",), 0),
    "auraflow": (encoders.aura_t5.AuraT5Tokenizer, ("clip_pile_t5xl",), 0),
    "hidream": (encoders.hidream.HiDreamTokenizer, ("t5xxl",), 0),
    "qwen": (encoders.qwen_image.QwenImageTokenizer, ("qwen25_7b",), CUT),
    "z_image": (encoders.z_image.ZImageTokenizer, ("qwen3_4b",), 0),
}
"""Tokenizer, the attributes with the tokenizers whose tokens are in the embedding, and tokens cut off at its start."""
PROMPT = "a photo of a red cat on the grass, cat"
SOURCE, TARGET, NEGATIVE = (tiny_models.conditioning(seed) for seed in (1, 2, 3))
STEPS = 6


class Tokens:
    """A CLIP's tokenizer alone."""

    def __init__(self, name: str) -> None:
        self.tokenizer, (_, self.names, self.cut) = TOKENIZERS[name][0](), TOKENIZERS[name]

    def tokenize(self, text: str, return_word_ids: bool = False) -> Any:
        return self.tokenizer.tokenize_with_weights(text, return_word_ids=return_word_ids)

    def embedded(self, text: str) -> list[tuple[Any, int]]:
        """(decoding tokenizer, token) of every position of the embedding."""
        result = []
        for name in self.names:
            key = name.removeprefix("clip_") if name.startswith("clip_") else name
            decoder = getattr(self.tokenizer, name).tokenizer
            result += [(decoder, token) for chunk in self.tokenize(text)[key] for token, *_ in chunk]
        return result[self.cut :]


def spelled(tokens: list[tuple[Any, int]]) -> str:
    decoder = tokens[0][0]
    if hasattr(decoder, "decode"):
        return decoder.decode([token for _, token in tokens])
    return decoder.tokenizer.decode([token for _, token in tokens])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_every_text_encoder_spell_the_prompt(name: str) -> None:
    clip = Tokens(name)
    whole = clip.embedded(PROMPT)
    positions = embedded_tokens(clip, PROMPT, len(whole))
    each = [[p for p in positions if p < 77], [p for p in positions if p >= 77]] if name == "sd3" else [positions]
    for part in each:
        found = spelled([whole[position] for position in part])
        assert found.replace(" ", "") == PROMPT.replace(" ", "")
    cats = embedded_words(clip, PROMPT, len(whole), "cat", "The prompt")
    assert len(cats) == 2 * len(each) and set(cats) < set(positions)
    assert all(spelled([whole[position]]).strip() == "cat" for position in cats)
    both = embedded_words(clip, PROMPT, len(whole), "red cat", "The prompt")
    assert len(both) == 2 * len(each) and len(set(both) & set(cats)) == len(each)
    with pytest.raises(IdentityEditError, match="The prompt .* does not contain the word 'dog'"):
        embedded_words(clip, PROMPT, len(whole), "dog", "The prompt")
    assert embedded_tokens(clip, "", len(clip.embedded(""))) == ()


def test_an_embedding_without_its_padding() -> None:
    """As the demo world's flow transformer takes it."""
    clip = tiny_text_encoders.clip("sd1")
    assert embedded_tokens(clip, "a red cat", 77) == embedded_tokens(clip, "a red cat", 32) == (1, 2, 3)
    assert embedded_tokens(clip, "a red cat", 3) == (1, 2)


def test_stable_diffusion_3_with_one_of_its_encoders() -> None:
    clip = Tokens("sd3")
    long = "a cat " * 60  # 121 tokens of T5 in one embedding, 154 of CLIP in two chunks
    lengths = [sum(len(chunk) for chunk in clip.tokenize(long)[name]) for name in ("l", "t5xxl")]
    assert lengths[0] != lengths[1]
    of_both = embedded_tokens(clip, long, sum(lengths))
    assert embedded_tokens(clip, long, lengths[0]) == tuple(p for p in of_both if p < lengths[0])
    of_t5 = tuple(p - lengths[0] for p in of_both if p >= lengths[0])
    assert embedded_tokens(clip, long, lengths[1]) == of_t5


def test_an_identity_prompt_with_its_contrast() -> None:
    clip = tiny_text_encoders.clip("sd1")
    plain = encode_identity_prompt(clip, "red cat", "cat")
    model = tiny_flow_models.flux()
    assert contrast_for(tiny_models.sd1(), " grass ") is None
    identity = encode_identity_prompt(clip, "red cat", "cat", contrast=contrast_for(model, " grass "))
    grass = clip.encode_from_tokens(clip.tokenize("grass"))
    assert torch.equal(identity.embedding, torch.cat([plain.embedding, grass[:, 1:2]], dim=1))
    assert (identity.tokens, identity.contrast) == (plain.tokens, (77,))
    assert torch.equal(identity.options["pooled_output"], clip.encode_from_tokens(clip.tokenize("red cat"), True)[1])
    start = encode_identity_prompt(clip, "red cat", contrast="")
    empty = clip.encode_from_tokens(clip.tokenize(""))
    assert torch.equal(start.embedding[:, 77:], empty[:, :1]) and start.contrast == (77,) and start.tokens == (1, 2)
    for words, text in (("dog", "does not contain the word 'dog'"), ("", "identity_prompt is empty")):
        with pytest.raises(IdentityEditError, match=text):
            encode_identity_prompt(clip, "red cat" if words else " ", words, contrast="")


def test_the_words_of_a_caption() -> None:
    """Subject and contrast are read where they stand; what the caption lacks is appended, or replaces it."""
    clip = tiny_text_encoders.clip("sd1")
    caption = "a red cat on the grass"
    whole = clip.encode_from_tokens(clip.tokenize(caption))
    inside = identity_in_caption(clip, "red cat", caption, "grass")
    assert torch.equal(inside.embedding, whole)
    assert (inside.tokens, inside.contrast) == ((2, 3), (6,))
    appended = identity_in_caption(clip, "cat", caption, "snow")
    assert torch.equal(appended.embedding[:, :77], whole) and (appended.tokens, appended.contrast) == ((3,), (77,))
    other = identity_in_caption(clip, "dog", caption, "")
    assert torch.equal(other.embedding[:, :77], clip.encode_from_tokens(clip.tokenize("dog"))) and other.tokens == (1,)
    with pytest.raises(IdentityEditError, match="subject is empty"):
        identity_in_caption(clip, " ", caption, "")


def test_masked_prompts_keep_their_contrast() -> None:
    """Prompts of Lumina 2 and Qwen-Image bring a mask of their padding."""

    class Masked:
        tokenize = staticmethod(tiny_text_encoders.clip("sd1").tokenize)

        def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
            return [[torch.zeros(1, 77, 4), {"attention_mask": torch.ones(1, 77).index_fill(1, torch.tensor(76), 0)}]]

    identity = encode_identity_prompt(Masked(), "red cat", contrast="green grass")
    assert identity.options["attention_mask"][0, 75:].tolist() == [1, 0, 1, 1]


@pytest.fixture(scope="module", params=tiny_flow_models.JOINT)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_flow_models.JOINT[request.param](output_gain=0.2)


IDENTITY = IdentityPrompt(
    torch.cat([tiny_models.conditioning(4)[0][0], tiny_models.conditioning(5)[0][0][:, :1]], dim=1),
    (1, 2), (8,), {"pooled_output": tiny_models.conditioning(4)[0][1]["pooled_output"]},
)  # fmt: skip


def test_segmentation_reads_the_identity_prompt_in_noised_images(model: Any) -> None:
    """The same maps as of ComfyUI's own model call at (1 - s) z_0 + s eps, refined and thresholded."""
    latent = tiny_flow_models.latent_for(model, 4, 2)
    counted: list[float] = []
    clone = model.clone()
    clone.add_wrapper_with_key(
        "apply_model", "test", lambda executor, x, t, *args, **kwargs: (counted.append(float(t[0])), executor(
            x, t, *args, **kwargs))[1])  # fmt: skip
    masks = attention_segmentation.attention_masks(
        clone, latent, IDENTITY, SOURCE, (64, 64), settings=MaskSettings((99, 499), 0.5, 2), seed=5
    )
    assert counted == pytest.approx([0.5, 0.1]), "one model call each"
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
    capturing, attention = capture_joint_attention(model, None, (1, 2), (8,))

    def evaluate(evaluator: engine.NetworkEvaluator, x: torch.Tensor) -> None:
        z_0 = engine.to_model_scale(model, latent)
        for sigma in (0.5, 0.1):
            evaluator.denoised((1 - sigma) * z_0 + sigma * noise, torch.tensor(sigma))

    engine.run_loop(capturing, IDENTITY.conditioning, None, latent, torch.tensor([0.5, 0.1]), evaluate)
    assert attention.evaluations == 2
    assert torch.equal(masks, identity_mask(attention, 64, 64, 0.5, 2)) and 0 < float(masks.mean()) < 1
    with pytest.raises(IdentityEditError, match="whole numbers from 0 to 999"):
        attention_segmentation.attention_masks(
            model, latent, IDENTITY, SOURCE, (64, 64), settings=MaskSettings((1000,), 0.5, 2)
        )


def test_the_blend_is_algorithm_1(model: Any) -> None:
    """Every step written out with two runs of the capture, one step longer each time."""
    inversion = invert_image(model, tiny_flow_models.latent_for(model, 4, 2), SOURCE, steps=STEPS)
    settings = BlendSettings(threshold=0.45, power=1)
    result = identity_mask_blend(
        model, inversion, SOURCE, TARGET, IDENTITY, NEGATIVE, guidance_scale=3.0, settings=settings
    )
    height, width = inversion.trajectory.shape[-2:]
    trajectory, sigmas = inversion.trajectory, inversion.sigmas

    def run(conditioning: Any, negative: Any, body: Any) -> Any:
        recording, attention = capture_identity(model, IDENTITY)
        return engine.run_loop(
            recording, conditioning, negative, trajectory[0], sigmas, lambda evaluator, _: body(evaluator, attention)
        )

    def reconstruction(evaluator: Any, attention: Any) -> torch.Tensor:
        for x, sigma in zip(trajectory[:-1], sigmas[:-1], strict=True):
            evaluator.denoised(x, sigma)
        return identity_mask(attention, height, width, 0.45, 1)

    m_source = run(SOURCE, None, reconstruction)
    assert torch.equal(result.source_mask, m_source) and 0 < float(m_source.mean()) < 1

    def denoise(evaluator: Any, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x = trajectory[0]
        for i in range(STEPS):
            x = sampling_step(inversion, i, x, evaluator.guided(x, sigmas[i], 3.0))
            m_target = identity_mask(attention, height, width, 0.45, 1)
            m = torch.maximum(m_source, m_target)
            m = m[:, None, None] if x.ndim == 5 else m[:, None]
            x = m * x + (1 - m) * trajectory[i + 1]
        return x, m_target

    x, m_target = run(TARGET, NEGATIVE, denoise)
    assert torch.equal(result.target_mask, m_target)
    scale = inversion.noise_path.image_scale(sigmas[-1])
    assert tiny_models.relative_error(result.latent, engine.to_socket_scale(model, x / scale)) < 1e-5
    assert result.evaluations == 3 * STEPS + 2 * 4, "4 model calls of the identity prompt in each pass"


def test_a_clip_of_another_width_is_refused(model: Any) -> None:
    wide = IdentityPrompt(torch.zeros(1, 9, 4), (1,), (8,), {})
    with pytest.raises(IdentityEditError, match="clip has embeddings of 4 channels but the model takes 32"):
        capture_identity(model, wide)
