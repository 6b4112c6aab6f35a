"""What the tests of nodes share: the previews of trainings take few steps. No node has a setting for their number; how
a preview is sampled is tested in tests/pipelines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

STEPS = 2


@pytest.fixture(scope="module", autouse=True)
def short_previews() -> Iterator[None]:
    from identity_edit_pack.pipelines.mcdm import train as train_mcdm
    from identity_edit_pack.pipelines.training import images as training_images

    preview = training_images.preview

    def short(networks: Any, latent_shape: Any, settings: Any, estimate: Any) -> Any:
        return preview(networks, latent_shape, dataclasses.replace(settings, sample_steps=STEPS), estimate)

    with pytest.MonkeyPatch.context() as patch:
        for module in (training_images, train_mcdm):
            patch.setattr(module, "preview", short)
        yield
