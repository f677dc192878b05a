"""Where a sequence stands, in files and in batches: saved, loaded, moved, selected, repeated."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import tttc
from tests.helpers import LIBRARY, dims_of
from tests.learners import DIMS, CausalConvolution
from tttc.nn import TTT, Cache
from tttc.runtime.state import PackedState, State

F64 = torch.float64
# one that carries sums, one rows, one momentum and accumulators, one taps
VARIANTS = {n: LIBRARY[n].replace(mini_batch=4) for n in ("TTTLinear", "Moneta", "Titans")}
VARIANTS["CausalConvolution"] = CausalConvolution
every_variant = pytest.mark.parametrize("name", VARIANTS)


class Sequences:
    """A layer and calls of it, of which each continues."""

    def __init__(self, name: str, batch: int = 3) -> None:
        variant = VARIANTS[name]
        dims = dims_of(variant, 3, 4) | ({"K": DIMS["K"]} if name == "CausalConvolution" else {})
        self.layer = tttc.compile(variant, dims, F64, backend="torch", telemetry=name == "TTTLinear")
        generator = torch.Generator().manual_seed(0)
        self.tokens = {n: torch.rand(batch, 12, 2, 3, generator=generator, dtype=F64) for n in "qkv"}
        self.gates = {
            n: torch.rand(batch, 12, 2, *(self.layer.dims[d] for d in s.dims), generator=generator, dtype=F64)
            for n, s in self.layer.signature.gates.items()
        }

    def call(self, where: slice, state: Any = None, rows: Any = slice(None), **more: Any) -> Any:
        gates = {n: g[rows, where] for n, g in self.gates.items()}
        return self.layer(**{n: x[rows, where] for n, x in self.tokens.items()}, gates=gates, state=state, **more)


def loaded(value: Any) -> Any:
    """By torch.save and torch.load as they are."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


def same(found: State, wanted: State) -> None:
    """Types, places, names and every bit."""
    (values, spec), (wanted_values, wanted_spec) = tree_flatten(found), tree_flatten(wanted)
    assert spec == wanted_spec
    assert len(values) == len(wanted_values)
    assert all(torch.equal(x, y) for x, y in zip(values, wanted_values, strict=True))


@every_variant
@pytest.mark.parametrize("way", [loaded, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_saved_and_loaded_at_the_defaults(name, way):
    """Inside a mini-batch, where it holds all that it ever holds; the next call is the same to the last bit."""
    sequences = Sequences(name)
    _, state = sequences.call(slice(0, 7))
    again = way(state)
    same(again, state)
    assert torch.equal(sequences.call(slice(7, 12), again)[0], sequences.call(slice(7, 12), state)[0])


def test_a_pack_and_a_cache_are_loaded_too():
    sequences = Sequences("TTTLinear", batch=1)
    _, state = sequences.call(slice(0, 7), cu_seqlens=[0, 3, 7])
    again = loaded(state)
    assert isinstance(again, PackedState)
    for one, other in zip(again.sequences, state.sequences, strict=True):
        same(one, other)
    for kernel in (None, 4):
        block = TTT(LIBRARY["TTTLinear"], 8, 2, conv_kernel=kernel, backend="torch")
        x = torch.randn(2, 9, 8)
        _, cache = block(x[:, :5], return_state=True)
        again = loaded({"cache": cache.detach()})["cache"]
        assert isinstance(again, Cache)
        assert torch.equal(block(x[:, 5:], again), block(x[:, 5:], cache))


@every_variant
def test_some_of_the_sequences(name):
    """By an index, a list, a tensor, a mask and a slice: each continues as it would have, alone or in the batch."""
    sequences = Sequences(name)
    _, state = sequences.call(slice(0, 7))
    wanted, _ = sequences.call(slice(7, 12), state)
    mask = torch.tensor([True, False, True])
    for chosen, rows in (
        (1, [1]),
        ([2, 0], [2, 0]),
        (torch.tensor([2, 2]), [2, 2]),
        (mask, [0, 2]),
        (slice(1, 3), [1, 2]),
    ):
        picked = state.select(chosen)
        assert picked.position == state.position
        z, _ = sequences.call(slice(7, 12), picked, rows)
        torch.testing.assert_close(z, wanted[rows], rtol=1e-12, atol=1e-12)
    again = State.joined([state.select(i) for i in range(3)])
    same(again, state)


@every_variant
def test_each_sequence_several_times(name):
    sequences = Sequences(name)
    _, state = sequences.call(slice(0, 7))
    rows = [0, 0, 1, 1, 2, 2]
    wanted, _ = sequences.call(slice(7, 12), state)
    z, _ = sequences.call(slice(7, 12), state.repeat(2), rows)
    torch.testing.assert_close(z, wanted[rows], rtol=1e-12, atol=1e-12)


def test_packs_are_selected_repeated_and_moved():
    sequences = Sequences("TTTLinear", batch=1)
    _, state = sequences.call(slice(0, 7), cu_seqlens=[0, 3, 7])
    assert [s.position for s in state.select([1, 0, 1]).sequences] == [0, 3, 0]
    assert [s.position for s in state.select(slice(1, 2)).sequences] == [0]
    assert [s.position for s in state.repeat(2).sequences] == [3, 3, 0, 0]
    moved = state.to(torch.float32)
    assert {x.dtype for s in moved.sequences for x in tree_flatten(s)[0]} == {torch.float32}
    assert state.to("meta").W1.device.type == "meta"


@pytest.mark.parametrize("kernel", [None, 4])
def test_a_cache_is_selected_repeated_and_moved(kernel):
    block = TTT(LIBRARY["TTTLinear"], 8, 2, conv_kernel=kernel, backend="torch").double()
    x = torch.randn(2, 9, 8, dtype=F64)
    _, cache = block(x[:, :5], return_state=True)
    wanted = block(x[:, 5:], cache)
    for rows, chosen in (([1], cache.select(1)), ([1, 0, 1], cache.select(torch.tensor([1, 0, 1])))):
        torch.testing.assert_close(block(x[rows, 5:], chosen), wanted[rows], rtol=1e-12, atol=1e-12)
    rows = [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(block(x[rows, 5:], cache.repeat(3)), wanted[rows], rtol=1e-12, atol=1e-12)
    leaves, spec = tree_flatten(cache.to(torch.float32))
    assert {y.dtype for y in leaves if y is not None} == {torch.float32}
    assert tree_unflatten(leaves, spec).position == 5
    assert not any(y.requires_grad for y in tree_flatten(cache.detach())[0] if y is not None)


@pytest.mark.parametrize("decode", ["sums", "rows"])
def test_a_state_is_its_own(decode):
    """What the caller does to his tensors after a call, an optimizer's step or the next token in the same buffer, is
    none of the open mini-batch's.
    """
    layer = tttc.compile(VARIANTS["TTTLinear"], {"D": 3}, F64, backend="torch", decode=decode)
    weights = {n: torch.rand(2, *[3] * len(s.dims), dtype=F64) for n, s in layer.signature.states.items()}
    tokens = torch.rand(1, 4, 2, 3, dtype=F64)
    rate = {n: torch.full((1, 2, 2), 0.3, dtype=F64) for n in ("lr", "tau")}
    for size in (2, 1):  # a scan, and the kernel of one token
        gates = {n: g[:, :size].clone() for n, g in rate.items()}
        given, buffer = {n: w.clone() for n, w in weights.items()}, tokens[:, :size].clone()
        with torch.no_grad():
            _, state = layer(buffer, buffer, buffer, gates=gates, state=given)
            wanted, _ = layer(*3 * [tokens[:, 2:]], gates=rate, state=copy.deepcopy(state))
            for x in (buffer, *given.values(), *gates.values()):
                x.fill_(7.0)
            found, _ = layer(*3 * [tokens[:, 2:]], gates=rate, state=state)
        assert torch.equal(found, wanted)
