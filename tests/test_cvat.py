"""The auto-annotation function for CVAT, with its SDK where that is installed, else with stand-ins for what it uses."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from grounded_sam.errors import ConfigError
from grounded_sam.pipeline.pipeline import Pipeline
from grounded_sam.serve.cvat import CvatFunction, create
from grounded_sam.shapes.examples import demo_images
from grounded_sam.structures.vocabulary import Vocabulary

WORDS = ["red circle", "blue square", "green star", "yellow triangle", "orange ring", "purple cross"]


def _encode(bitmap):
    """Encode a mask as `cvat_sdk.masks.encode_mask` does, whose documentation describes the format."""
    ys, xs = np.nonzero(bitmap)
    x1, y1, x2, y2 = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    flat = bitmap[y1:y2, x1:x2].ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    return [float(run) for run in np.diff([0, *edges, flat.size])] + [x1, y1, x2 - 1, y2 - 1]


def _decode(points, size_hw):
    *runs, x1, y1, x2, y2 = map(int, points)
    mask = np.zeros(size_hw, bool)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask[y1 : y2 + 1, x1 : x2 + 1] = flat.reshape(y2 - y1 + 1, x2 - x1 + 1)
    return mask


@pytest.fixture
def sdk(monkeypatch):
    """Return the SDK, or a stand-in whose shapes are plain objects."""
    try:
        import cvat_sdk.auto_annotation as real
    except ImportError:
        package, stand_in, masks = (ModuleType(f"cvat_sdk{end}") for end in ("", ".auto_annotation", ".masks"))

        def shape(kind):
            return lambda label_id, points, **more: SimpleNamespace(
                label_id=label_id, points=points, type=SimpleNamespace(value=kind), **more
            )

        stand_in.label_spec = lambda name, id, **more: SimpleNamespace(name=name, id=id, **more)
        stand_in.DetectionFunctionSpec = lambda labels: SimpleNamespace(labels=labels)
        stand_in.mask, stand_in.polygon, stand_in.rectangle = map(shape, ("mask", "polygon", "rectangle"))
        masks.encode_mask, package.auto_annotation, package.masks = _encode, stand_in, masks
        for module in (package, stand_in, masks):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return stand_in
    return real


def context(floor=None, polygons=False):
    return SimpleNamespace(frame_name="a.png", conf_threshold=floor, conv_mask_to_poly=polygons)


def test_masks_and_polygons_of_an_image(sdk, shapes):
    model = Pipeline(shapes.detector, shapes.segmenter, shapes.select, Vocabulary.parse(WORDS))
    function, picture = CvatFunction(model), demo_images()[0].image
    assert [(label.name, label.id, label.type) for label in function.spec.labels] == [
        (name, i, "mask") for i, name in enumerate(WORDS)
    ]
    wanted = model.segment(picture)
    found = function.detect(context(), Image.fromarray(picture))
    assert [shape.label_id for shape in found] == wanted.class_id.tolist()
    for shape, mask in zip(found, wanted.mask, strict=True):
        assert np.array_equal(_decode(shape.points, mask.shape), mask)
    polygons = function.detect(context(polygons=True), Image.fromarray(picture))
    assert {str(shape.type.value if hasattr(shape.type, "value") else shape.type) for shape in polygons} == {"polygon"}
    size = picture.shape[:2]
    drawn = [coco_mask.decode(coco_mask.frPyObjects([list(p.points)], *size))[..., 0].astype(bool) for p in polygons]
    for mask in wanted.mask:
        assert max((mask & d).sum() / (mask | d).sum() for d in drawn) > 0.9
    few = function.detect(context(floor=float(np.median(wanted.confidence))), Image.fromarray(picture))
    assert 0 < len(few) < len(found)


def test_without_a_segmenter_there_are_rectangles(sdk, shapes):
    function = CvatFunction(Pipeline(shapes.detector, None, shapes.select, Vocabulary.parse(WORDS)))
    found = function.detect(context(), Image.fromarray(demo_images()[0].image))
    assert found and all(len(shape.points) == 4 for shape in found)
    assert {label.type for label in function.spec.labels} == {"rectangle"}


def test_mistakes_are_told_before_weights_are_loaded(sdk, shapes, monkeypatch):
    with pytest.raises(ConfigError, match="needs classes, such as text="):
        CvatFunction(Pipeline(shapes.detector, shapes.segmenter))
    monkeypatch.setitem(sys.modules, "cvat_sdk", None)
    monkeypatch.setitem(sys.modules, "cvat_sdk.auto_annotation", None)
    with pytest.raises(ConfigError, match="pip install cvat-sdk"):
        create(preset="shapes", text="red circle")


def test_parameters_are_choices_and_keys(sdk):
    function = create(preset="shapes", text="red circle, green star", select__score=0.7)
    assert function.pipeline.select.score == 0.7 and function.vocabulary.classes == ("red circle", "green star")


def test_the_module_needs_no_sdk_until_it_is_used():
    code = "import sys; sys.modules['cvat_sdk'] = None; import grounded_sam.serve.cvat"
    subprocess.run([sys.executable, "-c", code], check=True)
