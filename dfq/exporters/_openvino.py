"""A process of its own for OpenVINO, whose plugin has ended processes on networks that other runtimes run.

    python -m dfq.exporters._openvino FOLDER

reads ``network.onnx``, ``settings.json`` ({"threads": n, "modes": {name: properties}}) and ``inputs.npz`` (batches "0",
"1", ...) from FOLDER, and writes ``MODE.npz`` with the outputs "BATCH_OUTPUT" of each mode. A second mode that the
plugin does not know is left out. What goes wrong ends up on stderr.
"""

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: Path) -> None:
    core = import_openvino().Core()
    model = core.read_model(folder / "network.onnx")
    settings = json.loads((folder / "settings.json").read_text())
    with np.load(folder / "inputs.npz") as inputs:
        batches = {key: inputs[key] for key in inputs.files}
    for position, (mode, properties) in enumerate(settings["modes"].items()):
        with contextlib.suppress(RuntimeError) if position else contextlib.nullcontext():
            threads = {"INFERENCE_NUM_THREADS": settings["threads"]}
            network = core.compile_model(model, "CPU", properties | threads)
            found: dict[str, Any] = {}
            for key, batch in batches.items():
                outputs = network([batch])
                found |= {f"{key}_{i}": outputs[output] for i, output in enumerate(network.outputs)}
            np.savez(folder / f"{mode}.npz", **found)


def import_openvino() -> Any:
    """The package without its telemetry, which would report every import over the network."""
    if "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # reads as not installed
        try:
            importlib.import_module("openvino")
        finally:
            del sys.modules["openvino_telemetry"]
    return importlib.import_module("openvino")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
