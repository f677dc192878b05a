"""What the benchmarks share: interleaved timing, peak memory, and what is said about the machine."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tttc.backends.cpu import processor

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
GEMM = 1024  # the matrices that the machine's own rate is read from
LONG = 0.2  # seconds; a call of that length takes no notice of what is in the caches before it


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    budget: float = float("inf"),
    done: Callable[[int], None] = lambda rounds: None,
) -> dict[str, list[float]]:
    """Seconds of each contender, one after the other in every round, each after a call of its own that is not timed:
    the contender before it leaves the caches with nothing that it can use. Long calls need no such call.

    After `budget` seconds no further round begins, but there are at least three. `done` is told of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for made in range(rounds):
        if made >= 3 and time.perf_counter() - started > budget:
            break
        for name, run in contenders.items():
            if not seconds[name] or seconds[name][-1] < LONG:
                run()
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
        done(made + 1)
    return seconds


def sgemm() -> Callable[[], torch.Tensor]:
    """One product of two square float32 matrices."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(GEMM, GEMM, generator=generator) for _ in range(2))
    out = torch.empty(GEMM, GEMM)
    return lambda: torch.mm(a, b, out=out)


def summary(values: Sequence[float]) -> dict[str, float]:
    """The median, the quartiles and the range, to four digits."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    named = {"median": median, "quartile_1": low, "quartile_3": high, "min": min(values), "max": max(values)}
    return {n: float(f"{x:.4g}") for n, x in named.items()}


def ratios(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """`of` over `to`, round by round."""
    return summary([a / b for a, b in zip(of, to, strict=True)])


# -- memory ------------------------------------------------------------------------------------------------------------


def resident_peak() -> float:
    """The largest resident set of this process so far, MiB; of this program alone, not of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """From here on `resident_peak` counts anew, where the system can; what came before may have needed more."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


# -- the machine -------------------------------------------------------------------------------------------------------


def about(command: str) -> dict[str, Any]:
    """When, on what, with which versions and by which command something was measured."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "torch": torch.__version__,
        "tvm": _version("apache-tvm"),
        "python": platform.python_version(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }


def results_file(benchmark: str, suffix: str) -> Path:
    """Where the results of a benchmark on this machine go."""
    return RESULTS / f"{benchmark}_{platform.machine()}_{torch.get_num_threads()}threads{suffix}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The commit that was measured; "+" where the files have changed since."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
