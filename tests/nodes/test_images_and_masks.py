"""What ComfyUI's own nodes take as images and masks: every IMAGE and MASK input of every node takes it too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from identity_edit_pack.nodes import scores as measure
from identity_edit_pack.nodes import sockets
from identity_edit_pack.nodes.pidiff import face
from identity_edit_pack.pipelines.faces import detection as face_networks
from identity_edit_pack.pipelines.mcdm.pair_folder import PairFolder
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.tests import tiny_vision
from identity_edit_pack.tests.nodes import good_inputs
from identity_edit_pack.tests.nodes.good_inputs import CLASSES, World, good, world_in
from identity_edit_pack.tests.nodes.test_bad_inputs import alike, as_comfyui_gives, run, tensors_in
from saved_pairs import load_pair


def inputs_of(kind: str) -> list[tuple[str, str]]:
    return [
        (name, item.id)
        for name, node in CLASSES.items()
        for item in node.define_schema().inputs
        if item.get_io_type() == kind
    ]


MASKS, IMAGES, VAES = inputs_of("MASK"), inputs_of("IMAGE"), inputs_of("VAE")
OPTIONAL = [
    (name, item.id)
    for name, node in CLASSES.items()
    for item in node.define_schema().inputs
    if item.get_io_type() == "MASK" and item.optional
]
NO_MASK = torch.zeros(1, 64, 64)
"""What Load Image gives for an image without transparency."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        yield world_in(tmp_path_factory.mktemp("comfyui"), patch)


def results(world: World, name: str, **changes: Any) -> list[torch.Tensor] | str:
    """All tensors that a node gives, or the sentence with which it refuses."""
    try:
        return [tensor.detach().clone() for tensor in tensors_in(run(name, {**good(world, name), **changes}, world))]
    except IdentityEditError as error:
        return str(error)


def reaches_alike(name: str, first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether the node gets the same from both, once the shared checks have brought its inputs to their form."""
    schema, given = CLASSES[name].GET_SCHEMA(), [as_comfyui_gives(name, inputs) for inputs in (first, second)]
    for each in given:
        sockets.check_inputs(schema, each)
        sockets.bring_to_form(schema, each)
    return given[0].keys() == given[1].keys() and all(alike(value, given[1][key]) for key, value in given[0].items())


def same(first: list[torch.Tensor] | str, second: list[torch.Tensor] | str) -> bool:
    if isinstance(first, str) or isinstance(second, str):
        return first == second
    return len(first) == len(second) and all(map(torch.equal, first, second))


def of(world: World, name: str, input_name: str) -> torch.Tensor:
    """A node's good mask or image, or the world's where it has none."""
    value = good(world, name).get(input_name)
    if isinstance(value, list):
        value = value[0]
    if value is None:
        value = world.images if (name, input_name) in IMAGES else world.mask
    return value


FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "[H, W]": lambda mask: mask[0],
    "[B, 1, H, W]": lambda mask: mask[:, None],
    "bool": lambda mask: mask > 0.5,
    "float16": lambda mask: mask.half(),
    "twice as large": lambda mask: mask.repeat_interleave(2, 1).repeat_interleave(2, 2),
    "of another shape": lambda mask: mask.repeat_interleave(3, 2),
}


@pytest.mark.parametrize(("name", "input_name"), MASKS)
def test_a_mask_is_the_same_in_every_form_and_size(name: str, input_name: str, world: World) -> None:
    mask, inputs = of(world, name, input_name), good(world, name)
    expected = results(world, name, **{input_name: mask})
    assert not isinstance(expected, str), expected
    for form, changed in FORMS.items():
        if reaches_alike(name, {**inputs, input_name: changed(mask)}, {**inputs, input_name: mask}):
            continue
        assert same(results(world, name, **{input_name: changed(mask)}), expected), form
    smaller = results(world, name, **{input_name: mask[:, ::2, ::2]})
    assert not isinstance(smaller, str), smaller


@pytest.mark.parametrize(("name", "input_name"), OPTIONAL)
def test_the_empty_mask_of_load_image_is_no_mask(
    name: str, input_name: str, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    without = results(world, name, **{input_name: None})
    caplog.clear()
    for empty in (NO_MASK, NO_MASK[0], NO_MASK[:, None]):
        assert same(results(world, name, **{input_name: empty}), without)
    said = [record for record in caplog.records if f"{input_name} is empty, as from Load Image" in record.message]
    assert len(said) == 3


BOTH = [(name, mask, image) for name, mask in MASKS for other, image in IMAGES if other == name]


@pytest.mark.parametrize(("name", "mask_name", "image_name"), BOTH)
def test_a_mask_of_the_transparent_part_is_warned_of(
    name: str, mask_name: str, image_name: str, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    alpha = of(world, name, mask_name)
    cut_out = torch.cat([of(world, name, image_name), alpha[..., None]], dim=-1)
    sentence = f"{mask_name} is 1 exactly where {image_name} is transparent"
    results(world, name, **{image_name: cut_out, mask_name: alpha})
    assert sentence not in caplog.text
    results(world, name, **{image_name: cut_out, mask_name: 1.0 - alpha})
    assert sentence in caplog.text


@pytest.mark.parametrize(("name", "input_name"), MASKS)
def test_every_mask_says_what_to_do_with_the_mask_of_a_cut_out(name: str, input_name: str) -> None:
    item = next(item for item in CLASSES[name].define_schema().inputs if item.id == input_name)
    assert item.tooltip.endswith("Load Image's mask marks the transparent part; for a cut-out, insert Invert Mask.")


@pytest.mark.parametrize(("name", "input_name"), IMAGES)
def test_an_image_of_high_dynamic_range_is_cut_with_a_warning(
    name: str, input_name: str, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    image = 8.0 * of(world, name, input_name)
    folders = [
        {"folder": f"pairs/{kind}-{input_name}"} if name in ("GeneratePairs", "SavePair") else {}
        for kind in ("clipped", "bright")
    ]
    expected = results(world, name, **{input_name: image.clamp(max=1.0)}, **folders[0])
    assert "HDR images" not in caplog.text
    found = results(world, name, **{input_name: image}, **folders[1])
    assert same(found, expected)
    assert f"{input_name} has values up to" in caplog.text
    levels = results(world, name, **{input_name: 255.0 * of(world, name, input_name)})
    assert isinstance(levels, str) and "divide it by its maximum" in levels


@pytest.mark.parametrize(("name", "input_name"), IMAGES)
def test_an_image_that_is_no_number_is_named(name: str, input_name: str, world: World) -> None:
    image = of(world, name, input_name).expand(3, -1, -1, -1).clone()
    image[1, 5, 5] = torch.nan
    found = results(world, name, **{input_name: image})
    assert isinstance(found, str) and f"{input_name} (number 2 of 3) contains NaN" in found


# -- sizes -------------------------------------------------------------------------------------------------------------

PHOTO = torch.rand(1, 97, 131, 3, generator=torch.Generator().manual_seed(1))
CUT = PHOTO[:, :96, 1:129]
"""What ComfyUI's VAE Encode keeps of it."""
EDIT = torch.rand(1, 96, 128, 3, generator=torch.Generator().manual_seed(2))


def test_a_photo_is_compared_with_what_vae_encode_keeps_of_it(world: World) -> None:
    check = measure.ReconstructionCheck.execute
    wanted = check(CUT, EDIT, 20.0).args[0]
    for pair in ((PHOTO, EDIT), (torch.cat([PHOTO, PHOTO[..., :1]], -1), EDIT), (PHOTO.expand(2, -1, -1, -1), EDIT)):
        psnr, report = check(*pair, 20.0).args
        assert psnr == wanted and "image (131x97) was center-cropped to 128x96" in report
    assert check(EDIT, PHOTO, 20.0).args[0] == wanted
    assert "middle" not in check(CUT, EDIT, 20.0).args[1]

    mask = (PHOTO[..., 0] > 0.5).float()
    common = {**good(world, "ScoreEdit"), "references": None}
    scores = [
        run("ScoreEdit", {**common, "edited": edited, "source": source, "mask": each}, world)
        for edited, source, each in (
            (EDIT, CUT, mask[:, :96, 1:129]),
            (EDIT, PHOTO, mask),
            (EDIT, PHOTO, mask[:, :96, 1:129]),
        )
    ]
    assert scores[0][1:4] == scores[1][1:4] == scores[2][1:4]
    assert "source (131x97) was center-cropped to 128x96" in scores[1][0]

    path, report = run("SavePair", {**good(world, "SavePair"), "source": PHOTO, "target": EDIT}, world)[:2]
    number = max(PairFolder(path).finished())
    source, target, _ = load_pair(PairFolder(path).path / "pairs" / f"{number:06}")
    torch.testing.assert_close(source, CUT[0], atol=0.002, rtol=0)
    torch.testing.assert_close(target, EDIT[0], atol=0.002, rtol=0)
    assert "center-cropped to 128x96" in report


class VideoVAE(tiny_vision.VAE):
    """Latents with a dimension for time, as of Wan and Qwen-Image."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return super().encode(images)[:, :, None]


@pytest.mark.parametrize(("name", "input_name"), [(name, each) for name, each in VAES if name != "GeneratePairs"])
def test_the_vae_of_a_video_model_is_named(name: str, input_name: str, world: World) -> None:
    found = results(world, name, **{input_name: VideoVAE()})
    assert isinstance(found, str) and "as video VAEs do" in found


# -- one bad image of many -------------------------------------------------------------------------------------------


class Detector(good_inputs.Detector):
    """Finds a face in images that are not black."""

    def detect(self, image: Any) -> list[face_networks.Face]:
        return super().detect(image) if image.max() > 0 else []


def three(world: World) -> torch.Tensor:
    """The middle one shows nobody."""
    images = world.images.repeat(3, 1, 1, 1)
    images[1] = 0.0
    images[2] *= 0.5
    return images


def test_align_face_leaves_out_what_it_cannot_use(world: World) -> None:
    images = three(world)
    inputs = {**good(world, "AlignFace"), "method": face.BY_DETECTOR, "face_detector": Detector()}
    alone = run("AlignFace", {**inputs, "images": images[[0, 2]]}, world)
    found = run("AlignFace", {**inputs, "images": images}, world)
    assert torch.equal(found[0], alone[0]) and torch.equal(found[1], alone[1])
    assert found[2].shape[0] == 3 and '"image": 3' in found[3] and '"image": 2' not in found[3]
    assert "2 faces of 3 image(s)" in found[4] and "Left out: No face was found in image 2." in found[4]

    masks = world.mask.repeat(3, 1, 1)
    masks[2] = 0.0
    for method in (face.BY_DETECTOR, face.BY_POINTS, face.WHOLE):
        changed = {**inputs, "images": images[[0, 2, 0]], "mask": masks, "method": method}
        result = run("AlignFace", changed, world)
        assert len(result[0]) == 2 and "The mask of image 3 is empty" in result[4]
        with pytest.raises(IdentityEditError, match="The mask of image 3 is empty"):
            run("AlignFace", {**changed, "without_face": face.STOP}, world)


def test_identity_similarity_leaves_out_what_it_cannot_use(world: World) -> None:
    images = three(world)
    inputs = {**good(world, "IdentitySimilarity"), "face_detector": Detector()}
    whole = run("IdentitySimilarity", {**inputs, "reference": images[[0, 2]]}, world)
    some = run("IdentitySimilarity", {**inputs, "reference": images}, world)
    assert some[0] == whole[0] and "Left out: No face was found in reference 2." in some[2]
    with pytest.raises(IdentityEditError, match="No face was found in reference 2"):
        run("IdentitySimilarity", {**inputs, "reference": images, "reference_without_face": face.STOP}, world)
    with pytest.raises(IdentityEditError, match="No face was found in reference 1"):
        run("IdentitySimilarity", {**inputs, "reference": images[1:2]}, world)

    kept = run("IdentitySimilarity", {**inputs, "images": images[[0, 2]]}, world)
    found = run("IdentitySimilarity", {**inputs, "images": images, "without_face": face.LEAVE_OUT}, world)
    assert found[:2] == kept[:2] and "image 2: left out (no face)" in found[2]
    with pytest.raises(IdentityEditError, match="No face was found in image 1"):
        run("IdentitySimilarity", {**inputs, "images": images[1:2], "without_face": face.LEAVE_OUT}, world)
