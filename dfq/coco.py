"""A synthetic dataset of boxes in COCO's format, for whatever trains or looks at detectors.

::

    DIR/images/000007.png   sample 7, in bytes
    DIR/annotations.json    images, categories, annotations: bbox [x, y, width, height] in pixels, score
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dfq.dataset import SyntheticDataset, write_atomic
from dfq.errors import UserError
from dfq.teacher import InputSpec, input_spec_from_dict


def export_coco(dataset: SyntheticDataset | str | os.PathLike, path: str | os.PathLike) -> Path:
    """Write the folder ``path``; returns its annotations. A category's id is the network's label."""
    dataset = dataset if isinstance(dataset, SyntheticDataset) else SyntheticDataset(dataset)
    folder = Path(path)
    if not {"boxes", "labels"} <= dataset.lists:
        raise UserError(f"got {dataset.path}, a dataset without boxes", "a dataset made for a detector")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "not empty" if folder.is_dir() else "a file"
        raise UserError(f"got {folder}, which is {what}", "an empty or new folder")
    spec = input_spec_from_dict(dataset.manifest["settings"]["input_spec"])
    assert isinstance(spec, InputSpec)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "info": {"description": f"made by dfq from {dataset.provenance.get('teacher')}", **dataset.provenance},
        "images": [],
        "annotations": [],
    }
    labels: set[int] = set()
    for index, sample in enumerate(dataset):
        pixels = spec.to_pixels(sample["images"]).permute(1, 2, 0).numpy()
        name = f"{index:06d}.png"
        Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if spec.size[0] == 1 else pixels)).save(
            folder / "images" / name
        )
        content["images"].append({"id": index, "file_name": name, "height": spec.size[1], "width": spec.size[2]})
        scores = sample.get("scores", torch.ones(len(sample["labels"])))
        for box, label, score in zip(sample["boxes"].tolist(), sample["labels"].tolist(), scores.tolist(), strict=True):
            x, y, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
            labels.add(label)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": index,
                    "category_id": label,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "score": score,
                }
            )
    content["categories"] = [{"id": label, "name": str(label)} for label in sorted(labels)]
    write_atomic(folder / "annotations.json", json.dumps(content).encode())
    return folder / "annotations.json"
