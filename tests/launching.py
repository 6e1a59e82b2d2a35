"""Processes as a launcher starts them: the same script, a rank each in the environment."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import dfq

ROOT = Path(dfq.__file__).parents[1]


def environment(**more):
    """Of a process that finds this dfq and the helpers of the tests, and computes in one thread."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in more.items()}}


def launch(words, world_size, cwd, all_succeed=True):
    """Run ``python *words`` as each of ``world_size`` ranks; all must end with 0, or the first to fail ends all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "NODE_RANK": 0}
        around = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **ranks)
        processes.append(
            subprocess.Popen(
                [sys.executable, *words],
                env=around,
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    if not all_succeed:  # as torchrun does
        while all(process.poll() in (None, 0) for process in processes):
            time.sleep(0.1)
        for process in processes:
            process.kill()
            process.communicate()
        return []
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs
