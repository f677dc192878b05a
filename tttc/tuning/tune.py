"""`tttc.tune`: find what is fastest for a program on a device, and remember it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from tttc.backends.target import GPUS, architecture_of
from tttc.compiler.driver import SUPPORTED_DTYPES
from tttc.declare.variant import Variant
from tttc.errors import TuningError
from tttc.tuning.measured import TuningResult, tune_measured
from tttc.tuning.static import StaticTuning, tune_statically
from tttc.tuning.task import Task

BATCH = 16  # sequences of a call on a GPU: enough heads for every multiprocessor
UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def tune(
    variant: type[Variant],
    dims: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    budget: str | float = "60s",
    *,
    backend: str = "auto",
    batch: int | None = None,
    tokens: int = 2048,
    heads: int = 12,
    forward_only: bool = False,
    save: bool = True,
    progress: bool = True,
) -> TuningResult | StaticTuning:
    """Find what is fastest, and keep it where `tttc.compile` looks for it.

    Args:
        variant, dims, dtype: as for `tttc.compile`.
        device: "cpu", or the architecture of a GPU, which need not be there: "sm_80", "sm_90", "sm_100" or "gfx942".
            For one of these nothing is timed: candidates are compiled, and an estimate
            (backends/cost_model.py) ranks them.
        budget: seconds, or a text such as "60s" or "2m", everything included. The default is compiled and timed
            whatever that takes, and a candidate that was begun is finished.
        backend: whose kernels; "auto" takes native ones where they can run the program.
        batch, tokens, heads: the call that is timed, by default of one sequence, or estimated, by default of sixteen.
            What is found is taken for calls of any size.
        forward_only: time the forward alone; otherwise forward and backward.
        save: write the result to the database (`tttc doctor` shows where it is).
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        TuningError: for a device or a budget that cannot be; or where no candidate is right.
        DeclarationError, ShapeError, BackendRefusal: as `tttc.compile`.
    """
    seconds = _budget_seconds(budget)
    _refuse_other_devices(device)
    if dtype not in SUPPORTED_DTYPES:
        raise TuningError(f"dtype {dtype} is not supported; use one of {', '.join(map(str, SUPPORTED_DTYPES))}")
    target = str(device) if str(device) in GPUS else None
    batch = (1 if target is None else BATCH) if batch is None else batch
    counts = {"batch": batch, "tokens": tokens, "heads": heads}
    bad = [f"{n}={v!r}" for n, v in counts.items() if not isinstance(v, int) or isinstance(v, bool) or v < 1]
    if bad:
        raise TuningError(f"{', '.join(bad)}: what is timed has at least one of each.\n  Give positive ints.")
    task = Task(variant, dims, dtype, backend, batch, tokens, heads, seconds, forward_only, save, progress)
    return tune_measured(task) if target is None else tune_statically(task, target)


def _refuse_other_devices(device: str | torch.device) -> None:
    """Only this CPU can be timed; for a GPU there are estimates, where it is known what its multiprocessors hold."""
    name = str(device)
    if name.split(":")[0] == "cpu" or name in GPUS:
        return
    known = f"times candidates on the CPU that it runs on, and estimates them for {', '.join(GPUS)}"
    present = architecture_of(torch.device("cuda")) if name.startswith("cuda") else ""
    way = f'Use device="{present}".' if present in GPUS else 'Use device="cpu", or one of these.'
    raise TuningError(f'cannot tune for device "{name}": this version {known}.\n  {way}')


def _budget_seconds(budget: str | float) -> float:
    """60, "60s", "1.5m" or "1h" as seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", str(budget).casefold())
    if isinstance(budget, bool) or found is None or found[2] not in UNITS or not float(found[1]):
        raise TuningError(
            f"budget is {budget!r}; it must be a time.\n"
            '  Give seconds, such as "60s" or 60, or minutes or hours, such as "2m" or "1h".'
        )
    return float(found[1]) * UNITS[found[2]]
