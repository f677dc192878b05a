"""A layer among the other parts of PyTorch: checkpoints, hooks, changes in place, copies, files, threads, meta."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import tttc
from tests.helpers import LIBRARY, dims_of
from tttc.nn.layer import TTT
from tttc.verification.comparison import random_inputs, relative_error

pytestmark = pytest.mark.usefixtures("plain_kernels")  # what calls them is tested
F64 = torch.float64
NATIVE = pytest.param("tvm", marks=pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is not installed"))
every_backend = pytest.mark.parametrize("backend", ["torch", NATIVE])
TTTLinear = LIBRARY["TTTLinear"].replace(mini_batch=4)


def layer_of(variant: Any = TTTLinear, backend: str = "torch", **settings: Any) -> tuple[Any, Any]:
    """A layer and a call of it: of 9 tokens, two mini-batches of 4 and one that is left open."""
    layer = tttc.compile(variant, dims_of(variant, 3, 4), F64, backend=backend, **settings)
    inputs = random_inputs(layer.signature, layer.dims, 2, 9, 2)

    def call(q: Any = inputs.q, **more: Any) -> Any:
        given = {"gates": inputs.gates, "params": inputs.params, "state": inputs.state} | more
        return layer(q, inputs.k, inputs.v, **given)

    call.inputs = inputs  # type: ignore[attr-defined]
    return layer, call


def gradients(call: Any, results: Any) -> list[torch.Tensor]:
    """Of everything that the call returned."""
    z, state = results
    leaves = [x for x in call.inputs.named().values() if x.requires_grad]
    return list(torch.autograd.grad(z.square().sum() + sum(w.sin().sum() for w in state.values()), leaves))


def same(found: Any, wanted: Any) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert relative_error(x, y) <= 1e-12


# -- what is kept for the backward -------------------------------------------------------------------------------------


def alive() -> float:
    """MiB of tensors."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values()) / 2**20


@every_backend
def test_checkpointing_and_freeing(backend):
    """Under torch.utils.checkpoint, and after a backward whose loss is kept, next to nothing of it is left."""
    block = TTT(LIBRARY["TTTMLP"], 64, 2, backend=backend, checkpoint=1)
    x = torch.randn(1, 256, 64, requires_grad=True)
    block(x)
    base = alive()
    y = block(x)
    plain = alive() - base
    wanted = torch.autograd.grad(y.square().sum(), [x, *block.parameters()], materialize_grads=True)
    del y
    y = checkpoint(block, x, use_reentrant=False)
    held = alive() - base - sum(g.untyped_storage().nbytes() for g in wanted) / 2**20
    assert held < 0.2 * plain
    found = torch.autograd.grad(y.square().sum(), [x, *block.parameters()], materialize_grads=True)
    for g, w in zip(found, wanted, strict=True):
        assert torch.equal(g, w)
    del y, found, wanted, g, w
    loss = block(x).sum()
    loss.backward()
    block.zero_grad()
    x.grad = None
    assert alive() - base < 0.2 * plain


@pytest.mark.parametrize("every", [None, 1, "auto"])
@every_backend
def test_hooks_see_all_that_is_kept(backend, every):
    """What they are given is enough: in copies of it nothing is missing, and gradients are those without hooks."""
    _, call = layer_of(backend=backend, checkpoint=every)
    wanted = gradients(call, call())
    packed: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        packed.append(x)
        return x.clone()

    with saved_tensors_hooks(pack, lambda x: x):
        results = call()
    for x in packed:
        if not x.requires_grad and x.grad_fn is None:
            x.data.fill_(float("nan"))  # what was kept by the side would now be wrong
    same(gradients(call, results), wanted)
    _, call = layer_of(backend=backend, checkpoint=every)
    with save_on_cpu():
        results = call()
    same(gradients(call, results), wanted)


@every_backend
def test_a_graph_is_freed_unless_it_is_retained(backend):
    _, call = layer_of(backend=backend)
    z, _ = call()
    leaves = [call.inputs.q, call.inputs.k]
    first = torch.autograd.grad(z.sum(), leaves, retain_graph=True)
    same(torch.autograd.grad(z.sum(), leaves), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(z.sum(), leaves)


# -- in place ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DeltaNet", "TTTLinear", "MTTT", "Moneta"])
@every_backend
def test_what_is_returned_may_be_changed_in_place(backend, name):
    """Outputs and states: `z += residual`, `z.mul_(gate)`, `state.W.mul_(decay)`, and the gradients of that."""
    variant = LIBRARY[name] if name in ("DeltaNet", "MTTT") else LIBRARY[name].replace(mini_batch=4)
    for every in (None, 1):
        layer = tttc.compile(variant, dims_of(variant, 3, 4), F64, backend=backend, checkpoint=every)
        inputs = random_inputs(layer.signature, layer.dims, 2, 8, 2)
        leaves = [x for x in inputs.named().values() if x.requires_grad]
        given = {"gates": inputs.gates, "params": inputs.params, "state": inputs.state, "tokens": inputs.tokens}
        given["tokens"] = {n: x for n, x in inputs.tokens.items() if n not in "qkv"} or None
        found = []
        for in_place in (True, False):
            z, state = layer(inputs.q, inputs.k, inputs.v, **given)
            scale = 1 + inputs.q.mean()
            if in_place:
                z += scale
                z.mul_(scale)
                for w in state.values():
                    w.mul_(scale)
                results = [z, *state.values()]
            else:
                results = [(z + scale) * scale, *(w * scale for w in state.values())]
            total = sum(x.square().sum() for x in results)
            found.append(torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True))
        same(*found)


@pytest.mark.parametrize("every", [None, 1])
@every_backend
def test_inputs_that_were_changed_are_noticed(backend, every):
    """By torch's own error, not by a gradient that is silently another."""
    _, call = layer_of(backend=backend, checkpoint=every)
    k = call.inputs.k
    q = call.inputs.q.detach().clone()
    z, _ = call(q)
    q.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(z.sum(), k)


def test_results_lie_in_memory_of_their_own():
    """Also where a token changes nothing, or there is none: what is done to a result is not done to an input."""
    layer, call = layer_of()
    given = {n: w.detach().clone() for n, w in call.inputs.state.items()}
    still = {n: torch.zeros(2, 4, 2, dtype=F64) for n in layer.signature.gates}
    with torch.no_grad():
        for tokens in (0, 1, 4):
            gates = {n: g[:, :tokens] for n, g in still.items()}
            x = call.inputs.k.detach()[:, :tokens]
            kept = {n: w.clone() for n, w in given.items()}
            _, state = layer(x, x, x, gates=gates, state=given, params=call.inputs.params)
            for w in state.values():
                w.fill_(7.0)
            assert all(torch.equal(given[n], w) for n, w in kept.items())


# -- copies and files --------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A module of a user's that holds a compiled layer."""

    def __init__(self, variant: Any = TTTLinear) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(4, 4, dtype=F64)
        self.memory = tttc.compile(variant, dims_of(variant, 4), F64, backend="torch", checkpoint=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.proj(x)[:, :, None]
        gates = {n: torch.full(h.shape[:3], 0.1, dtype=F64) for n in self.memory.signature.gates}
        params = {n: torch.ones(4, dtype=F64) for n in self.memory.signature.params if n != "rate"}
        params |= {n: torch.full((), 0.1, dtype=F64) for n in self.memory.signature.params if n == "rate"}
        return self.memory(h, h, h, gates=gates, params=params)[0]


class Rated(LIBRARY["DeltaNet"]):  # type: ignore[misc]
    """A declaration whose rate is a param."""

    rate = tttc.param(init=0.1)
    update = tttc.sgd(lr=rate)


def saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "average": lambda m: AveragedModel(m).module,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": saved,
}


@pytest.mark.parametrize(
    "variant",
    [
        LIBRARY["TTTLinear"],
        TTTLinear,
        LIBRARY["TTTMLP"].replace(mini_batch=4).replace(read="before"),
        Rated.replace(update=tttc.sgd(lr=Rated.rate, decay=tttc.gate("decay"))),
    ],
    ids=["importable", "replaced", "replaced twice", "a param as a rate"],
)
@pytest.mark.parametrize("way", COPIES)
def test_a_module_with_a_layer_is_copied(way, variant):
    """The same outputs, and the same declaration and settings."""
    block, x = Block(variant), torch.randn(1, 5, 4, dtype=F64)
    again = COPIES[way](block)
    assert torch.equal(again(x), block(x))
    assert again.memory.signature.mini_batch == block.memory.signature.mini_batch
    assert again.memory.checkpoint == 2


@pytest.mark.parametrize("way", COPIES)
def test_a_sequence_layer_is_copied(way):
    """`tttc.nn.TTT`, of a declaration that `replace` made."""
    block, x = TTT(TTTLinear, 8, 2, backend="torch"), torch.randn(1, 5, 8)
    assert torch.equal(COPIES[way](block)(x), block(x))


def test_an_attention_layer_is_copied():
    layer, x = tttc.compile(tttc.SoftmaxAttention, {"D": 4}), torch.randn(1, 5, 2, 4)
    for way in (copy.deepcopy, COPIES["pickle"]):
        assert torch.equal(way(layer)(x, x, x)[0], layer(x, x, x)[0])


def test_a_declaration_that_cannot_be_imported_is_refused_by_pickle():
    class Local(LIBRARY["DeltaNet"]):  # type: ignore[misc]
        pass

    block = Block(Local)
    assert copy.deepcopy(block).memory is block.memory
    with pytest.raises((AttributeError, pickle.PicklingError), match="Can't pickle local object"):
        pickle.dumps(block)


def test_a_declaration_of_the_main_program(tmp_path: Path):
    """Written and read where `__main__` declares it, as pickle does."""
    program = tmp_path / "main.py"
    program.write_text(
        "import pickle, torch, tttc\n"
        "class Mine(tttc.library.DeltaNet):\n    pass\n"
        'layer = tttc.compile(Mine, {"D": 3}, torch.float64, backend="torch")\n'
        "again = pickle.loads(pickle.dumps(layer))\n"
        "x = torch.randn(1, 4, 1, 3, dtype=torch.float64)\n"
        'lr = {"lr": x[..., 0].abs()}\n'
        "assert torch.equal(again(x, x, x, gates=lr)[0], layer(x, x, x, gates=lr)[0])\n"
        "print(again)\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert "Layer(Mine" in done.stdout, done.stderr


# -- tensors without numbers -------------------------------------------------------------------------------------------


def test_shapes_of_a_model_on_the_meta_device():
    """Of a layer and of `tttc.nn.TTT`, forward and backward, with and without a state."""
    block = TTT(LIBRARY["TTTMLP"], 8, 2, backend="torch", device="meta")
    x = torch.zeros(2, 21, 8, device="meta", requires_grad=True)
    y, cache = block(x, return_state=True)
    assert (y.shape, y.device.type) == (x.shape, "meta")
    assert cache.state.W1.device.type == "meta"
    (gradient,) = torch.autograd.grad(block(x, cache).sum(), x)
    assert (gradient.shape, gradient.device.type) == (x.shape, "meta")
    with torch.no_grad():
        assert block(x[:, :1], cache).shape == (2, 1, 8)


@every_backend
def test_fake_tensors(backend):
    """No kernel reads what has no memory; shapes, dtypes and devices are those of a call."""
    block = TTT(TTTLinear, 8, 2, backend=backend)
    x = torch.randn(2, 9, 8)
    wanted = block(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = mode.from_tensor(x)
        found = block(given)
        assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)
        found.sum().backward()
    assert block.q_proj.weight.grad.shape == block.q_proj.weight.shape


@every_backend
def test_a_trace_holds_the_layer(backend):
    """By make_fx, which runs what it records: other inputs give other outputs."""
    _, call = layer_of(backend=backend)
    graph = make_fx(lambda q: call(q)[0])(call.inputs.q.detach())
    other = torch.randn_like(call.inputs.q)
    same([graph(other)], [call(other)[0]])


# -- threads -----------------------------------------------------------------------------------------------------------


@every_backend
def test_threads_call_one_layer(backend):
    """Each with inputs of its own, forward and backward, from the first call on."""
    layer = tttc.compile(TTTLinear, {"D": 3}, F64, backend=backend)
    inputs = [random_inputs(layer.signature, layer.dims, 1, 9, 2, seed) for seed in range(4)]

    def run(own: Any) -> list[torch.Tensor]:
        z, _ = layer(own.q, own.k, own.v, gates=own.gates, params=own.params, state=own.state)
        return [z.detach(), *torch.autograd.grad(z.square().sum(), [own.q, own.k, own.v])]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(run, inputs * 3))
    for i, results in enumerate(found):
        same(results, run(inputs[i % 4]))
