"""Equations 1 to 3 against plain NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity_edit_pack.attention import identity_mask, masks
from identity_edit_pack.attention.capture import IdentityAttention
from identity_edit_pack.attention.maps import MeanMap
from scipy.ndimage import gaussian_filter


def recorded(batch: int = 2) -> IdentityAttention:
    """Two grids, 6x4 with three maps and 3x2 with five, and self-attention at the coarser one."""
    generator = torch.Generator().manual_seed(0)
    attention = IdentityAttention((1,))
    for grid, count in (((6, 4), 3.0), ((3, 2), 5.0)):
        maps = torch.rand(batch, *grid, generator=generator) * count
        attention.cross[grid] = MeanMap(maps, torch.full_like(maps, count))
    own = torch.rand(batch, 6, 6, generator=generator)
    attention.self_grid = (3, 2)
    attention._self = MeanMap(7 * own / own.sum(-1, keepdim=True), torch.full((batch, 6), 7.0))
    return attention


def rough_by_hand(attention: IdentityAttention) -> np.ndarray:
    fine, coarse = (attention.cross[grid].total.double().numpy() for grid in ((6, 4), (3, 2)))
    fine = fine.reshape(-1, 3, 2, 2, 2).mean(axis=(2, 4))  # half the size: bilinear is the mean of 2x2
    return (fine + coarse) / 8  # every map counts the same


def test_rough_mask_is_the_mean_over_layers_and_steps() -> None:
    attention = recorded()
    assert np.allclose(identity_mask.rough_mask(attention).numpy(), rough_by_hand(attention), atol=1e-6)


@pytest.mark.parametrize("power", [0, 1, 2, 4])
def test_refined_mask_is_the_matrix_power(power: int) -> None:
    attention = recorded()
    rough = rough_by_hand(attention)
    own = attention.self_attention().double().numpy()
    powers = [np.linalg.matrix_power(matrix, power) for matrix in own]
    expected = np.stack([p @ m.ravel() for p, m in zip(powers, rough, strict=True)]).reshape(rough.shape)
    found = identity_mask.refined_mask(torch.from_numpy(rough).float(), attention.self_attention(), power)
    assert np.allclose(found.numpy(), expected, atol=1e-6)
    low, high = expected.min(axis=(1, 2), keepdims=True), expected.max(axis=(1, 2), keepdims=True)
    normalized = (expected - low) / (high - low)
    mask = identity_mask.identity_mask(attention, 3, 2, threshold=0.3, power=power)
    assert np.array_equal(mask.numpy(), (normalized > 0.3).astype(np.float32))


def test_masks_are_normalized_for_each_image_alone() -> None:
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1))
    maps *= torch.tensor([1.0, 50.0, 0.0]).view(3, 1, 1)
    found = masks.normalized(maps)
    assert found[:2].amin(dim=(1, 2)).tolist() == [0, 0] and found[:2].amax(dim=(1, 2)).tolist() == [1, 1]
    assert torch.equal(found[2], torch.zeros(4, 5)), "an even map outlines nothing"
    assert torch.equal(found[:1], masks.normalized(maps[:1]))


def test_the_contour_runs_between_coarse_cells() -> None:
    attention = IdentityAttention((1,))
    maps = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    attention.cross[2, 2] = MeanMap(maps, torch.ones_like(maps))
    mask = identity_mask.identity_mask(attention, 8, 8, threshold=0.3, power=0)
    # Bilinear from 0 at column 1.5 to 1 at column 5.5: 0.125, 0.375, ... from column 2 on.
    assert torch.equal(mask[0, 0], torch.tensor([0, 0, 0, 1, 1, 1, 1, 1.0]))


def test_union_and_feathering() -> None:
    first, second = torch.tensor([[[1.0, 0.0, 0.2]]]), torch.tensor([[[0.0, 0.0, 0.7]]])
    assert torch.equal(masks.union(first, second), torch.tensor([[[1.0, 0.0, 0.7]]]))
    mask = torch.zeros(2, 12, 9)
    mask[0, 3:7, 2:6] = 1
    mask[1] = 1
    assert masks.feathered(mask, 0.0) is mask
    soft = masks.feathered(mask, 1.5)
    expected = gaussian_filter(mask[0].double().numpy(), 1.5, mode="nearest", radius=5)
    assert np.allclose(soft[0].numpy(), expected, atol=1e-6)
    assert torch.allclose(soft[1], torch.ones(12, 9), atol=1e-6)
    assert masks.feathered(mask[:, :2, :2], 4.0).shape == (2, 2, 2)


def test_an_empty_recording_says_so() -> None:
    with pytest.raises(ValueError, match="No attention has been recorded"):
        identity_mask.rough_mask(IdentityAttention((1,)))


@pytest.mark.parametrize(("is_joint", "threshold", "power"), [(False, 0.4, 1), (True, 0.55, 8)])
def test_automatic_values_are_those_of_the_kind_of_attention(is_joint: bool, threshold: float, power: int) -> None:
    attention = recorded()
    attention.is_joint = is_joint
    expected = identity_mask.identity_mask(attention, 12, 8, threshold, power)
    assert torch.equal(identity_mask.identity_mask(attention, 12, 8), expected)
    assert 0 < float(expected.mean()) < 1
    others = (threshold, 2), (0.3, power)
    assert not any(torch.equal(identity_mask.identity_mask(attention, 12, 8, *other), expected) for other in others)
    assert torch.equal(identity_mask.identity_map(attention, 8, 8), identity_mask.identity_map(attention, 8, 8, power))
