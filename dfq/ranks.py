"""Which of several processes this one is, as a launcher tells it in the environment. No torch."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Literal

from dfq.errors import UserError

Auto = Literal["auto"]
# Rank and number of processes, as torchrun, SLURM's srun, Open MPI, MPICH and Lightning's own launcher call them. What
# sbatch alone sets (SLURM_NTASKS) says what was asked for, not that there are as many processes.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("LOCAL_RANK", "WORLD_SIZE"),
)
STARTED_BY = "DFQ_STARTED_BY"  # variable with the number of the process of dfq that has started this one
LOCAL = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


def from_environment(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """(rank, world size); (0, 1) where no launcher has said anything."""
    known = os.environ if environment is None else environment
    for rank, world_size in LAUNCHERS:
        if rank in known and world_size in known:
            try:
                found = int(known[rank]), int(known[world_size])
            except ValueError:
                continue
            if 0 <= found[0] < found[1]:
                return found
    return 0, 1


def local_rank() -> int:
    """Which of the processes on this computer this one is; 0 where nothing says."""
    for name in LOCAL:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def end_with_parent() -> None:
    """End this process, whatever it waits for, as soon as the one that has started it has ended, if that is one of dfq.

    Lightning's launcher ends its processes where training fails, and nobody where rank 0 fails behind it; those that
    wait for it in a collective would do so for a day, with their GPU. What a shell has started outlives the shell.
    """
    parent, starter = os.getppid(), os.environ.get(STARTED_BY)
    os.environ[STARTED_BY] = str(os.getpid())  # for those that this one starts
    if starter != str(parent):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        print("dfq: the process that has started this rank has ended, and so does this one", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # a collective hears nothing else

    threading.Thread(target=watch, daemon=True).start()


def resolve(rank: int | Auto, world_size: int | Auto) -> tuple[int, int]:
    """What is ``auto`` from the environment; a UserError where the two do not go together."""
    found_rank, found_size = from_environment()
    if rank == "auto" and world_size not in ("auto", found_size):
        raise UserError(
            f"got rank=auto and world_size={world_size}, and a launcher of {found_size}",
            "rank=auto world_size=auto under torchrun, srun or mpirun; or both as numbers",
        )
    size = (found_size if rank == "auto" else 1) if world_size == "auto" else world_size
    rank = found_rank if rank == "auto" else rank
    if not 0 <= rank < size:
        raise UserError(f"got rank={rank} and world_size={size}", f"rank from 0 to {max(0, size - 1)}")
    return rank, size
