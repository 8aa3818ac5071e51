"""Jobs in processes of their own: where they run, what keeps two from one folder, and the file that tells what they took."""

import ctypes
import fcntl
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from unifashion import UserError


def places_of(jobs: int) -> list[list[int]]:
    """Cores for each of so many jobs at a time, or for as many as there are cores."""
    cores = sorted(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    share = max(1, len(cores) // jobs)
    return [cores[i * share : (i + 1) * share] for i in range(min(jobs, len(cores)))]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raise UserError if others work in `folder`. Processes that are started meanwhile hold the lock, too, and outlive this one with it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is in use: jobs are at work there, or about to end, being left alone"
            ) from None
        yield


def end_with_parent() -> None:
    """SIGTERM when the process that started this one is gone, however it ended: its jobs would be nobody's. Linux alone can."""
    with suppress(OSError):  # not glibc
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def quick_dtype(device: torch.device) -> str:
    """bf16 on a GPU and on a CPU that is made for it (AVX512-BF16, AMX), else fp32: on other CPUs bf16 takes nine times as long."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    made_for_it = device.type != "cpu" or has.get("avx512_bf16") or has.get("amx_bf16")
    return "bf16" if made_for_it else "fp32"


def cpu_of_ended() -> float:
    """Seconds of CPU time that all processes took that this one started and has seen the end of: what others do meanwhile is not in it."""
    of = resource.getrusage(resource.RUSAGE_CHILDREN)
    return of.ru_utime + of.ru_stime


def note(out: Path, row: dict) -> None:
    with open(out / "jobs.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def is_done(out: Path, job: str) -> bool:
    return any(row["job"] == job and row["code"] == 0 for row in noted(out))


def noted(out: Path) -> list[dict]:
    """What a kill cut short is no row: that job is asked again, and finds that it is done."""
    file, rows = out / "jobs.jsonl", []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def told_hours(rows: list[dict]) -> str:
    """What jobs took: on a GPU, in all; else of CPU time, or, where that was not noted, of the time that they held their cores."""
    gpu = [row["seconds"] for row in rows if row.get("device") == "cuda"]
    others = [row for row in rows if row.get("device") != "cuda"]
    cpu = [row["cpu seconds"] for row in others if "cpu seconds" in row]
    held = [row["seconds"] * row["cores"] for row in others if "cpu seconds" not in row]
    kinds = {
        "hours of CPU time": cpu,
        "hours of held cores, whatever else ran on them": held,
        "hours of jobs on the GPU": gpu,
    }
    return " and ".join(f"{sum(of) / 3600:.1f} {kind}" for kind, of in kinds.items() if of)
