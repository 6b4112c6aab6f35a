"""Networks of the pack's own under ComfyUI's management: clones with weights of their own."""

from __future__ import annotations

import pytest
import tiny_models
import tiny_styles
import torch
from identity_edit_pack.pipelines.engine.edit_model import as_edit_model, set_weights
from identity_edit_pack.pipelines.pidiff.style_attention import apply_style_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_network_beside_a_model_can_be_made_again(dtype: torch.dtype) -> None:
    model = tiny_models.sd1(dtype=dtype)
    styled = apply_style_attention(model, tiny_styles.style_attention(model), tiny_styles.w_plus(), strength=1.0)
    (patcher,) = styled.get_additional_models()
    make, arguments = patcher.cached_patcher_init
    for again in (make(*arguments), make(*arguments, disable_dynamic=True)):
        assert again.load_device == patcher.load_device and again.model is not patcher.model
        torch.testing.assert_close(again.model.state_dict(), patcher.model.state_dict(), rtol=0.0, atol=0.0)


def test_an_edit_model_is_made_again_with_what_it_has_learned() -> None:
    model = as_edit_model(tiny_models.sd1())
    key = "diffusion_model.input_blocks.0.0.weight"
    learned = torch.randn(model.model.get_parameter(key).shape, generator=torch.Generator().manual_seed(1))
    set_weights(model, {key: learned})
    make, arguments = model.cached_patcher_init
    again = make(*arguments)
    assert type(again.model) is type(model.model)
    assert torch.equal(again.model.get_parameter(key), learned)
    torch.testing.assert_close(again.model.state_dict(), model.model.state_dict(), rtol=0.0, atol=0.0)
