"""Subject masks by attention, and by Segment Anything and Grounding DINO against their own calls."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_segmentation_models as tiny
import torch
from identity_edit_pack.attention import identity_mask
from identity_edit_pack.pipelines.lipe import attention_segmentation as by_attention
from identity_edit_pack.pipelines.lipe import identity_prompt
from identity_edit_pack.pipelines.lipe.attention_segmentation import MaskSettings
from identity_edit_pack.pipelines.networks import grounding_dino
from identity_edit_pack.pipelines.networks import segment_anything as sam
from identity_edit_pack.pipelines.shared.errors import IdentityEditError

IMAGE = torch.rand(48, 64, 3, generator=torch.Generator().manual_seed(1))


# --- Attention -------------------------------------------------------------------------------------------------------


def identity() -> identity_prompt.IdentityPrompt:
    return identity_prompt.IdentityPrompt(tiny_models.conditioning(9)[0][0], (1, 2))


def test_attention_masks_are_cut_out_of_what_the_network_attends_to() -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(4, batch=2)
    attention = by_attention.record_attention(
        model, latent, identity(), tiny_models.conditioning(5), timesteps=(1, 401)
    )
    assert attention.evaluations == 2
    masks = by_attention.attention_masks(
        model, latent, identity(), tiny_models.conditioning(5), (64, 64), settings=MaskSettings((401, 1), 0.4, 1)
    )
    assert torch.equal(masks, identity_mask.identity_mask(attention, 64, 64, 0.4, 1))
    assert masks.shape == (2, 64, 64) and set(masks.unique().tolist()) == {0.0, 1.0}


def test_every_timestep_is_one_evaluation_at_its_own_noise() -> None:
    model, latent = tiny_models.sd1(), tiny_models.latent(4)
    seen: list[tuple[float, torch.Tensor]] = []

    def watch(apply: Any, arguments: dict[str, Any]) -> torch.Tensor:
        seen.append((float(arguments["timestep"][0]), arguments["input"].clone()))
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(watch)
    by_attention.record_attention(model, latent, identity(), tiny_models.conditioning(5), timesteps=(101, 501), seed=7)
    sampling = model.get_model_object("model_sampling")
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))
    scaled = model.model.process_latent_in(latent)
    for (sigma, x), timestep in zip(seen, (501, 101), strict=True):
        assert sigma == pytest.approx(float(sampling.sigmas[timestep]), rel=1e-5)
        assert tiny_models.relative_error(x, scaled + sigma * noise) < 1e-6


def test_bad_attention_options_are_named() -> None:
    model, latent, prompt = tiny_models.sd1(), tiny_models.latent(4), tiny_models.conditioning(5)
    for timesteps in ((), (1000,), (-1,)):
        with pytest.raises(IdentityEditError, match="timesteps is"):
            by_attention.attention_masks(
                model, latent, identity(), prompt, (8, 8), settings=MaskSettings(timesteps, 0.4, 1)
            )
    with pytest.raises(IdentityEditError, match="threshold is 2"):
        by_attention.attention_masks(model, latent, identity(), prompt, (8, 8), settings=MaskSettings((1,), 2.0, 1))


# --- Segment Anything ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        sam.Prompt(((20.0, 12.0),), (True,)),
        sam.Prompt(((20.0, 12.0), (50.0, 40.0)), (True, False)),
        sam.Prompt(box=(8.0, 4.0, 50.0, 40.0)),
        sam.Prompt(((20.0, 12.0),), (True,), (8.0, 4.0, 50.0, 40.0)),
    ],
)
def test_transformers_sam_gives_the_mask_of_its_own_call(prompt: sam.Prompt, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import SamProcessor

    network = tiny.save_sam(tmp_path)
    with sam.load_segmenter(str(tmp_path)) as segmenter:
        found = sam.segment_anything(segmenter, IMAGE, prompt)
    processor = SamProcessor.from_pretrained(tmp_path)
    given: dict[str, Any] = {}
    if prompt.points:
        given["input_points"] = [[[list(point) for point in prompt.points]]]
        given["input_labels"] = [[[int(label) for label in prompt.labels]]]
    if prompt.box:
        given["input_boxes"] = [[list(prompt.box)]]
    image = Image.fromarray((IMAGE * 255).round().byte().numpy())
    inputs = processor(image, return_tensors="pt", **given)
    multimask = prompt.box is None and len(prompt.points) == 1
    with torch.no_grad():
        tensors = {name: value.float() for name, value in inputs.items() if name in ("input_points", "input_boxes")}
        if prompt.points:
            tensors["input_labels"] = inputs["input_labels"]
        output = network(pixel_values=inputs["pixel_values"], **tensors, multimask_output=multimask)
    masks = processor.image_processor.post_process_masks(
        output.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )[0][0]
    assert masks.shape[0] == (3 if multimask else 1)
    assert torch.equal(found, masks[int(output.iou_scores[0, 0].argmax())].float())
    assert found.shape == IMAGE.shape[:2]


class Parts:
    """A Segment Anything that has found a background, a large and a certain small part."""

    def __init__(self) -> None:
        self.boxes: list[Any] = []
        masks = torch.zeros(3, 48, 64, dtype=torch.bool)
        masks[0] = True
        masks[0, 10:30, 10:40] = False
        masks[1, 10:30, 10:40] = True
        masks[2, 32:40, 44:50] = True
        self.parts = [sam.Segment(mask, score) for mask, score in zip(masks, (0.99, 0.8, 0.95), strict=True)]

    def everything(self, image: torch.Tensor) -> list[sam.Segment]:
        return self.parts

    def by_prompt(self, image: torch.Tensor, prompt: sam.Prompt) -> sam.Segment:
        self.boxes.append(prompt.box)
        return self.parts[len(self.boxes)]


def test_without_a_prompt_one_part_is_chosen_and_never_the_background() -> None:
    segmenter = Parts()
    _, large, small = (part.mask.float() for part in segmenter.parts)
    for choice, expected in (
        (sam.LARGEST, large),
        (sam.MOST_CERTAIN, small),
        (sam.UNION, large + small),
    ):
        found = sam.segment_anything(segmenter, IMAGE, sam.Prompt(), choice)
        assert torch.equal(found, expected), choice
    segmenter.parts = segmenter.parts[:1]
    assert float(sam.segment_anything(segmenter, IMAGE, sam.Prompt()).max()) == 0
    with pytest.raises(IdentityEditError, match="choice is 'first'"):
        sam.segment_anything(segmenter, IMAGE, sam.Prompt(), "first")


def test_boxes_are_cut_to_the_image_and_chosen_by_the_detector_s_score() -> None:
    segmenter = Parts()
    boxes = [(0.9, (-5.0, 2.0, 70.0, 30.0)), (0.4, (40.0, 30.0, 52.0, 90.0))]
    found = sam.segment_by_name(segmenter, IMAGE, boxes, sam.MOST_CERTAIN)
    assert segmenter.boxes == [(0.0, 2.0, 64.0, 30.0), (40.0, 30.0, 52.0, 48.0)]
    assert torch.equal(found, segmenter.parts[1].mask.float())
    assert float(sam.segment_by_name(segmenter, IMAGE, [], sam.UNION).max()) == 0


def test_transformers_sam_segments_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipeline filters and joins parts; torchvision's non-maximum suppression may lack its operator here."""
    import transformers.models.sam.image_processing_sam as module

    def keep_all(boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float) -> torch.Tensor:
        return torch.arange(len(boxes))

    monkeypatch.setattr(module, "batched_nms", keep_all)
    monkeypatch.setattr(sam, "POINTS_PER_SIDE", 4)
    tiny.save_sam(tmp_path)
    with sam.load_segmenter(str(tmp_path)) as segmenter:
        # A random network is sure of nothing: no part passes the pipeline's filters.
        assert float(sam.segment_anything(segmenter, IMAGE, sam.Prompt()).max()) == 0
        kept = module.SamImageProcessor.filter_masks

        def lenient(self: Any, masks: Any, scores: Any, size: Any, box: Any, *_: Any, **__: Any) -> Any:
            return kept(self, masks, scores, size, box, -10.0, -1.0, 0, 1)

        monkeypatch.setattr(module.SamImageProcessor, "filter_masks", lenient)
        found = segmenter.everything(IMAGE)
    assert found and all(part.mask.shape == (48, 64) and part.mask.dtype == torch.bool for part in found)


class FakePackage:
    """The parts of the package segment-anything that are used, with the real one's signatures."""

    def __init__(self) -> None:
        self.built: list[Any] = []
        self.sam_model_registry = {"vit_b": self.build}
        self.SamPredictor = FakePredictor
        self.SamAutomaticMaskGenerator = FakeGenerator

    def build(self, checkpoint: Any = None) -> torch.nn.Module:
        assert checkpoint is None, "the package would unpickle the file"
        network = torch.nn.Module()
        network.image_encoder = torch.nn.Module()
        network.image_encoder.pos_embed = torch.nn.Parameter(torch.zeros(1, 2, 2, 768))
        self.built.append(network)
        return network


class FakePredictor:
    calls: list[dict[str, Any]] = []

    def __init__(self, network: torch.nn.Module) -> None:
        self.value = float(network.image_encoder.pos_embed.detach().sum())

    def set_image(self, image: np.ndarray) -> None:
        assert image.dtype == np.uint8 and image.shape == (48, 64, 3)

    def predict(self, point_coords: Any, point_labels: Any, box: Any, multimask_output: bool) -> Any:
        self.calls.append({"points": point_coords, "labels": point_labels, "box": box, "multi": multimask_output})
        masks = np.zeros((3, 48, 64), bool)
        masks[1, 4:9] = True
        return masks, np.array([0.1, 0.7, 0.3]) * self.value, None


class FakeGenerator:
    def __init__(self, network: torch.nn.Module, points_per_side: int) -> None:
        pass

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        mask = np.zeros((48, 64), bool)
        mask[5:9, 5:9] = True
        return [{"segmentation": mask, "area": 16, "predicted_iou": 0.9}]


def test_the_package_gets_plain_weights_and_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "sam_vit_b.pth")
    torch.save({"image_encoder.pos_embed": torch.ones(1, 2, 2, 768)}, path)
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(IdentityEditError, match="pip install segment-anything"), sam.load_segmenter(path):
        pass
    package = FakePackage()
    monkeypatch.setitem(sys.modules, "segment_anything", package)
    monkeypatch.setattr(FakePredictor, "calls", [])
    with sam.load_segmenter(path) as segmenter:
        point = sam.Prompt(((3.0, 5.0),), (True,))
        found = sam.segment_anything(segmenter, IMAGE, point)
        sam.segment_anything(segmenter, IMAGE, sam.Prompt(box=(1.0, 2.0, 30.0, 40.0)))
        everything = sam.segment_anything(segmenter, IMAGE, sam.Prompt())
    assert float(package.built[0].image_encoder.pos_embed.detach().min()) == 1.0
    assert float(found.sum()) == 5 * 64 and float(everything.sum()) == 16
    first, second = FakePredictor.calls
    assert first["points"].tolist() == [[3, 5]] and first["labels"].tolist() == [1] and first["box"] is None
    assert first["multi"] and not second["multi"] and second["box"].tolist() == [1, 2, 30, 40]


def test_no_pickle_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segment_anything", FakePackage())
    evil = tmp_path / "evil.pth"
    done = tmp_path / "done"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (done,))

    evil.write_bytes(pickle.dumps(Evil()))
    with (
        pytest.raises(IdentityEditError, match="cannot be read as plain weights"),
        sam.load_segmenter(str(evil)),
    ):
        pass
    assert not done.exists()
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.ones(2)}, other)
    with pytest.raises(IdentityEditError, match="is not a Segment Anything"), sam.load_segmenter(str(other)):
        pass


# --- Grounding DINO --------------------------------------------------------------------------------------------------


def test_grounding_dino_gives_the_boxes_of_its_own_call(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    network = tiny.save_grounding_dino(tmp_path)
    found = grounding_dino.detect(str(tmp_path), [IMAGE, IMAGE], " Dog.", box_threshold=0.0, text_threshold=0.0)
    processor = AutoProcessor.from_pretrained(tmp_path)
    image = Image.fromarray((IMAGE * 255).round().byte().numpy())
    inputs = processor(images=image, text="dog.", return_tensors="pt")
    with torch.no_grad():
        output = network(**inputs)
    scores = output.logits.sigmoid().max(dim=-1).values[0]
    x, y, width, height = output.pred_boxes[0].T * torch.tensor([64, 48, 64, 48])[:, None]
    boxes = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)
    order = scores.argsort(descending=True)
    assert len(found) == 2 and len(found[0]) == len(scores) == 5
    assert torch.allclose(torch.tensor([score for score, _ in found[0]]), scores[order], atol=1e-5)
    assert torch.allclose(torch.tensor([box for _, box in found[0]]), boxes[order], atol=1e-2)
    assert grounding_dino.detect(str(tmp_path), [IMAGE], "dog", box_threshold=1.0) == [[]]


def test_folders_of_another_kind_are_refused(tmp_path: Path) -> None:
    tiny.save_sam(tmp_path)
    with pytest.raises(IdentityEditError, match="is 'sam', not 'grounding-dino'"):
        grounding_dino.detect(str(tmp_path), [IMAGE], "dog")
    with pytest.raises(IdentityEditError, match="subject is empty"):
        grounding_dino.detect(str(tmp_path), [IMAGE], " . ")
    (tmp_path / "config.json").write_text('{"model_type": "grounding-dino"}')
    with pytest.raises(IdentityEditError, match="not 'sam'"), sam.load_segmenter(str(tmp_path)):
        pass
    with pytest.raises(IdentityEditError, match="create it with a checkpoint file of Segment Anything"):  # noqa: SIM117
        with sam.load_segmenter(str(tmp_path / "none")):
            pass


# --- Prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_read_from_text() -> None:
    parse = sam.parse_prompt
    assert parse("", "") == sam.Prompt() and parse("", "").is_automatic
    assert parse("10, 20\n30 40.5, 0", "") == sam.Prompt(((10.0, 20.0), (30.0, 40.5)), (True, False))
    assert parse("1,2,1; 3,4", "5, 6, 7, 8").box == (5.0, 6.0, 7.0, 8.0)
    for points, box, message in (
        ("10", "", "points has the line '10'"),
        ("a, b", "", "points has the line"),
        ("1, 2, 3", "", "points has the line"),
        ("1, 2, 0", "", "none on the subject"),
        ("", "1, 2, 3", "box is '1, 2, 3'"),
        ("", "9, 2, 3, 4", "box is"),
    ):
        with pytest.raises(IdentityEditError, match=message):
            parse(points, box)


def test_prompts_outside_of_the_image_are_refused() -> None:
    with pytest.raises(IdentityEditError, match=r"The point \(100, 5\) lies outside the image of 64x48"):
        sam.segment_anything(Parts(), IMAGE, sam.Prompt(((100.0, 5.0),), (True,)))
    with pytest.raises(IdentityEditError, match="The box"):
        sam.segment_anything(Parts(), IMAGE, sam.Prompt(box=(70.0, 0.0, 80.0, 9.0)))
