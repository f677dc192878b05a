"""Several processes: copies of a module whose gradients are averaged, and a layer on tensors that lie in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import tttc
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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes found, which take longer to start than to work."""
    folder = tmp_path_factory.mktemp("results")
    mp.spawn(found_by, (folder,), nprocs=2)
    return folder


def found_by(rank: int, results: Path) -> None:
    torch.set_num_threads(1)
    for work in (copy, part):
        meeting = results / f"meeting of {work.__name__}"
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        torch.save(work(rank), results / f"{work.__name__}{rank}")
        dist.destroy_process_group()


def copy(rank: int) -> dict[str, torch.Tensor]:
    """One of two processes, on one of the two sequences."""
    module, x = module_and_input()
    return gradients_of(DistributedDataParallel(module), x[rank : rank + 1])


def test_two_processes_have_the_gradients_of_one(results: Path) -> None:
    wanted = gradients_of(*module_and_input())
    for rank in range(2):
        found = torch.load(results / f"copy{rank}")
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            # the mean of two halves is that of the whole, but for the order in which float64 is added up
            assert relative_error(found[name], gradient) <= 1e-12, name


# ---- a layer on tensors in parts ----


def call_of(parted: Callable[[torch.Tensor, int], torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, the state and all gradients of two calls, of which the first leaves a mini-batch open; `parted` places a
    tensor whose heads are along an axis.
    """
    generator = torch.Generator().manual_seed(0)
    layer = tttc.compile(LIBRARY["TTTLinear"], {"D": 4, "E": 4}, torch.float64, backend="torch")

    def drawn(shape: tuple[int, ...], heads: int) -> torch.Tensor:
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        return parted(x, heads).requires_grad_()

    q, k, v = (drawn((2, 21, 2, 4), 2) for _ in range(3))
    gates = {n: drawn((2, 21, 2), 2) for n in layer.signature.gates}
    params = {n: drawn((2, *x.shape), 0) for n, x in layer.init_params().items()}
    outputs = []
    state = None
    for cut in (slice(0, 5), slice(5, 21)):
        part = {n: x[:, cut] for n, x in {"q": q, "k": k, "v": v}.items()}
        z, state = layer(**part, gates={n: x[:, cut] for n, x in gates.items()}, params=params, state=state)
        outputs.append(z)
    loss = sum(x.square().sum() for x in (*outputs, *state.values()))
    given = [q, k, v, *gates.values(), *params.values()]
    return [*outputs, *state.values(), *torch.autograd.grad(loss, given)]


def part(rank: int) -> list[list[torch.Tensor]]:
    """One of two processes, with one of the two sequences, or of the two heads."""
    mesh = init_device_mesh("cpu", (2,))
    by_batch = call_of(lambda x, heads: distribute_tensor(x, mesh, [Shard(0) if heads else Replicate()]))
    by_heads = call_of(lambda x, heads: distribute_tensor(x, mesh, [Shard(heads)]))
    shown = [str(found[0].placements) for found in (by_batch, by_heads)]
    assert shown == ["(Shard(dim=0),)", "(Shard(dim=2),)"], shown
    return [[x.full_tensor() for x in found] for found in (by_batch, by_heads)]


def test_a_layer_on_tensors_in_parts(results: Path) -> None:
    """Each process runs what it has: some sequences, or some heads."""
    wanted = call_of(lambda x, heads: x)
    for rank in range(2):
        for found in torch.load(results / f"part{rank}"):
            for x, y in zip(found, wanted, strict=True):
                assert relative_error(x, y) <= 1e-12
