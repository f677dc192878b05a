"""A module trained by several processes: DistributedDataParallel averages the gradients of its copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import LIBRARY
from tttc.nn.layer import TTT
from tttc.verification.comparison import relative_error

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo here, which connects processes")


def module_and_input() -> tuple[TTT, torch.Tensor]:
    torch.manual_seed(0)
    return TTT(LIBRARY["TTTLinear"], 16, 2, backend="torch").double(), torch.randn(2, 21, 16, dtype=torch.float64)


def gradients_of(module: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    module(x).square().mean().backward()
    return {n.removeprefix("module."): p.grad for n, p in module.named_parameters() if p.grad is not None}


def copy(rank: int, meeting: str, results: str) -> None:
    """One of two processes, on one of the two sequences."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    module, x = module_and_input()
    torch.save(gradients_of(DistributedDataParallel(module), x[rank : rank + 1]), f"{results}{rank}")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    meeting, results = str(tmp_path / "meeting"), str(tmp_path / "gradients")
    mp.spawn(copy, (meeting, results), nprocs=2)
    wanted = gradients_of(*module_and_input())
    for rank in range(2):
        found = torch.load(f"{results}{rank}")
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            # the mean of two halves is that of the whole, but for the order in which float64 is added up
            assert relative_error(found[name], gradient) <= 1e-12, name
