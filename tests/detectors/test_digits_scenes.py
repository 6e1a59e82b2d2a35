"""examples/digits_scenes.py: scenes as they should be, and each network through the same pipeline."""

import sys
from pathlib import Path

import pytest
import torch

from dfq import pipeline
from dfq.evaluation import Coco
from dfq.losses._box_overlap import area, pairwise_iou
from dfq.scheme import Scheme
from dfq.settings import load, resolve
from dfq.teacher import InputSpec, Teacher

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[2]))
from examples import digits_scenes

SPEC = InputSpec((3, digits_scenes.SIZE, digits_scenes.SIZE), (0.45,) * 3, (0.25,) * 3)
LABELS = {"retinanet": "order", "faster_rcnn": "id", "yolos": "order", "rt_detr": "order"}


def test_boxes_lie_tight_around_digits_that_are_apart():
    scenes = [scene for scene, _ in zip(digits_scenes.scenes(False, 3), range(30), strict=False)]
    counts = [len(found.boxes) for _, found in scenes]
    assert min(counts) >= 1 and 2 < max(counts) <= digits_scenes.MOST_DIGITS
    contrast = []
    for image, found in scenes:
        assert image.dtype == torch.uint8 and image.shape == (3, digits_scenes.SIZE, digits_scenes.SIZE)
        assert (found.boxes >= 0).all() and (found.boxes <= digits_scenes.SIZE).all() and (area(found.boxes) > 15).all()
        overlaps = pairwise_iou(found.boxes, found.boxes).fill_diagonal_(0)
        assert float(overlaps.max()) <= digits_scenes.APART
        for x1, y1, x2, y2 in found.boxes.int().tolist():
            inside = image[:, y1:y2, x1:x2].float().mean(0)
            assert (inside.amax(0) > inside.mean()).float().mean() > 0.5, "strokes in most columns"
            contrast.append(float(inside.mean() - image.float().mean()))
    assert sum(contrast) / len(contrast) > 20, "digits are brighter than the ground"
    again = next(digits_scenes.scenes(False, 3))
    assert torch.equal(again[0], scenes[0][0]) and torch.equal(again[1].boxes, scenes[0][1].boxes)
    assert not torch.equal(next(digits_scenes.scenes(True, 3))[0], scenes[0][0])


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn", "yolos", pytest.param("rt_detr", marks=pytest.mark.slow)])
def test_each_network_goes_through_the_same_pipeline(name, tmp_path, monkeypatch):
    assert name in digits_scenes.NETWORKS
    if name in digits_scenes.TRANSFORMERS:
        pytest.importorskip("transformers")
    monkeypatch.setattr(pipeline, "OUTPUTS", tmp_path / "outputs")
    state = torch.get_rng_state()
    try:
        detector = digits_scenes.train(name, steps=2, batch_size=2, learning_rate=1e-3)
    finally:
        torch.set_rng_state(state)
    teacher = Teacher(detector, "detection", SPEC, name=name)
    generator = resolve("generator", "box_sampling", batch_size=4, iterations=2, final_iterations=1)
    dataset = pipeline.generate(teacher, generator, 4, 0, tmp_path / "data")
    methods = [resolve("quantizer", "mse", num_candidates=5)] * 2
    quick = {"iterations": 5, "balance_activations": name != "faster_rcnn"}  # of its wide layers half a minute
    algorithm, scheme = resolve("algorithm", "equalization", **quick), Scheme.from_dict(load("scheme", "w4a8"))
    student, _ = pipeline.quantize(teacher, dataset, scheme, algorithm, *methods, 0, tmp_path / "student")
    annotations = digits_scenes.write_scenes(tmp_path, "val", 3, True)
    evaluation = Coco(str(tmp_path / "val"), str(annotations), labels=LABELS[name])
    found = pipeline.evaluate(teacher, student, evaluation, dataset)
    assert set(found["teacher"]) == set(found["student"]) == {"map", "map_50"}
    assert 0 <= found["fidelity"]["agreement"] <= 1
