"""teacher=ultralytics, with a stand-in for the package, which is AGPL-3.0 and not needed."""

import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dfq.errors import UserError
from dfq.settings import resolve
from dfq.tasks._task import task_of

CLASSES = 3


class DetectionModel(nn.Module):
    """Gives in evaluation mode what those networks give: [N, 4 + K, A] and what it was computed from."""

    def __init__(self, extra=0):
        super().__init__()
        self.nc = CLASSES
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4 + CLASSES + extra, 1)

    def forward(self, x):
        maps = self.head(self.bn(self.conv(x)).relu())
        rows, columns = maps.shape[-2:]
        flat = maps.flatten(2)
        x = (torch.arange(columns) + 0.5).repeat(rows) * 8
        y = (torch.arange(rows) + 0.5).repeat_interleave(columns) * 8
        centers = torch.stack([x, y]) + 4 * flat[:, :2].tanh()
        return torch.cat([centers, 32 * flat[:, 2:4].sigmoid(), flat[:, 4:].sigmoid()], 1), [maps]


DetectionModel.__module__ = "ultralytics.nn.tasks"


@pytest.fixture
def package(monkeypatch):
    """The name of the file → the network, as a module of that name."""

    def yolo(name):
        if name == "missing.pt":
            raise FileNotFoundError("'missing.pt' does not exist")
        torch.manual_seed(0)
        return types.SimpleNamespace(model=DetectionModel(extra=int(name == "yolo26n.pt")).half())

    module = types.ModuleType("ultralytics")
    module.YOLO = yolo
    monkeypatch.setitem(sys.modules, "ultralytics", module)


def test_boxes_are_in_fractions_and_logits_are_those_of_probabilities(package):
    teacher = resolve("teacher", "ultralytics", name="yolo11n.pt", input_size=[3, 32, 64])
    assert teacher.name == "yolo11n" and teacher.input_spec.std == (1.0,) * 3
    images = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    task = task_of(teacher)
    raw = task.raw_outputs(teacher, images)
    predictions, _ = teacher.module.network(images)
    torch.testing.assert_close(raw["class_logits"].sigmoid(), predictions[:, 4:].mT)
    found = teacher.module.candidates(raw)
    x, y, w, h = predictions[:, :4].unbind(1)
    torch.testing.assert_close(
        found.boxes, torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1) / torch.tensor([64, 32, 64, 32])
    )
    assert task.labels(raw) == [0, 1, 2] and len(task.detections(raw, [(32, 64)] * 2)) == 2


def test_weights_of_a_checkpoint(package, tmp_path):
    network = DetectionModel()
    nn.init.constant_(network.head.bias, 0.5)
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    teacher = resolve("teacher", "ultralytics", name="yolo11n.yaml", checkpoint=str(tmp_path / "own.safetensors"))
    assert (teacher.module.network.head.bias == 0.5).all() and teacher.input_spec.size == (3, 640, 640)


def test_a_network_that_suppresses_by_itself_is_refused(package):
    teacher = resolve("teacher", "ultralytics", name="yolo26n.pt", input_size=[3, 32, 32])
    with pytest.raises(UserError, match=r"got \[2, 8, 16\] from a DetectionModel of 3 classes; allowed: \[N, 7, A\]"):
        teacher(teacher.example(2))


def test_what_the_package_can_not_load(package):
    with pytest.raises(UserError, match=r"teacher.name=missing.pt, which ultralytics can't load \(FileNotFoundError"):
        resolve("teacher", "ultralytics", name="missing.pt")


def test_without_the_package_its_licence_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(UserError, match=r"needs ultralytics, not installed here \(AGPL-3.0.*pip install 'dfq\[ultra"):
        resolve("teacher", "ultralytics", name="yolo11n.pt")


def test_nothing_else_imports_it():
    code = (
        "import sys; sys.modules['ultralytics'] = None; import dfq.detectors.ultralytics, dfq.teachers.ultralytics;"
        "from dfq.teachers._detector import as_detector; from torchvision.models import detection;"
        "as_detector(detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
