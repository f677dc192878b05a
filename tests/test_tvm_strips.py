"""The TVM backend where there are fewer heads than threads: strips of a free axis, against the oracle.

How many threads run at once is not looked at here: a strip is a strip on one core too.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import pytest
import torch

import tttc
from tests.helpers import LIBRARY, differences, inputs_for, keywords, layer_result, oracle_result, second_derivative
from tests.learners import Upright
from tttc.backends.tvm_cpu.machine import host
from tttc.library import DeltaNet, LinearAttention, TTTLinear
from tttc.verification.comparison import relative_error

pytestmark = pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")

TOKENS = 70  # a chunk of 64 and a tail of 6; more than four chunks of 16
LANES = host("float64").lanes
WIDE = 8 * LANES  # four strips of two vectors


@pytest.fixture(autouse=True)
def small_calls_too(monkeypatch):
    """What pays is none of these tests' business; and sums are taken in parts."""
    strips = importlib.import_module("tttc.backends.tvm_cpu.tiled")
    monkeypatch.setattr(strips, "MIN_WORK_TO_WAKE", 1)
    monkeypatch.setattr(strips, "MIN_THREADS_PER_HEAD", 2)
    monkeypatch.setattr(strips, "SERIAL", 1000)


@pytest.fixture(autouse=True)
def threads():
    """Sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def compiled(variant=DeltaNet, width=WIDE, dtype=torch.float64, **settings):
    return tttc.compile(variant, {"D": width}, dtype, backend="tvm", **settings)


def strips_of(layer):
    """The numbers of strips in which its loops were run; 1 is the kernel of a whole head."""
    loops = [s for s in layer._scans.values() if s.scan.loops]
    return {n for s in loops for n in s._parts} | {1 for s in loops if s._compiled}


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "heads", "count", "strips"),
    [(1, 1, 4, 4), (1, 1, 3, 2), (2, 1, 4, 2), (1, 3, 6, 2), (2, 2, 8, 2), (1, 1, 64, 4), (1, 3, 4, 1), (4, 1, 4, 1)],
)
def test_outputs_states_and_gradients_are_those_of_the_oracle(threads, batch, heads, count, strips):
    """For every way in which strips lie among batch and heads; and no thread has more to do than without them."""
    threads(count)
    layer = compiled(LinearAttention)
    inputs = inputs_for(layer, TOKENS, batch=batch, heads=heads)
    assert not differences(layer_result(layer, inputs), oracle_result(LinearAttention, inputs))
    assert strips_of(layer) == {strips}


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize(
    "name", ["DeltaNet", "KDA", pytest.param("MomentumDeltaNet", marks=pytest.mark.slow), "RetNet", "ViTTT"]
)
def test_every_kind_of_scan(threads, name):
    """A system to solve, a gate for each channel, a carry beside the weights, a param, tiles of a mini-batch."""
    threads(2)
    layer = compiled(LIBRARY[name], 4 * LANES)
    inputs = inputs_for(layer, TOKENS)
    assert not differences(layer_result(layer, inputs), oracle_result(LIBRARY[name], inputs))
    assert strips_of(layer) == {2}


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 2)])
def test_rows_of_the_weights(threads, batch, heads):
    threads(2 * batch * heads)
    layer = compiled(Upright, 4 * LANES)
    inputs = inputs_for(layer, TOKENS, batch=batch, heads=heads)
    assert not differences(layer_result(layer, inputs), oracle_result(Upright, inputs))
    assert strips_of(layer) == {2}


@pytest.mark.parametrize("checkpoint", [None, 1, 2, 5])
def test_carries_may_be_kept_at_any_distance(threads, checkpoint):
    threads(2)
    layer = compiled(width=4 * LANES, chunk=8, checkpoint=checkpoint)
    inputs = inputs_for(layer, TOKENS)
    assert not differences(layer_result(layer, inputs), oracle_result(DeltaNet, inputs))
    assert strips_of(layer) == {2}


def test_a_sequence_may_go_on_with_other_threads(threads):
    """Some calls in strips, some not; and a backward with fewer threads than its forward had."""
    layer, states = compiled(LinearAttention), []
    inputs = inputs_for(layer, TOKENS)
    for counts in ((4, 4, 4), (4, 2, 1), (1, 1, 1)):
        state, outputs = inputs.state, []
        for count, part in zip(counts, (slice(0, 30), slice(30, 31), slice(31, TOKENS)), strict=True):
            threads(count)
            sequences = inputs.q[:, part], inputs.k[:, part], inputs.v[:, part]
            z, state = layer(*sequences, gates={n: x[:, part] for n, x in inputs.gates.items()}, state=state)
            outputs.append(z)
        states.append((torch.cat(outputs, 1), state.W))
        threads(1)
        states[-1] += torch.autograd.grad(states[-1][0].sum(), [inputs.k, inputs.v, inputs.state["W"]])
    assert strips_of(layer) == {1, 2, 4}
    for found in states[:2]:
        # columns are summed over in other parts, in float64: a few units
        assert max(relative_error(x, y) for x, y in zip(found, states[2], strict=True)) <= 1e-13


# -- input of all kinds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_strided_and_offset_views(threads, batch, heads):
    """Sequences cut from wider ones, gates with gaps, and weights that lie transposed, read as they are."""
    width = 4 * host("float32").lanes
    layer = compiled(width=width, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, TOKENS, heads, width + 1, generator=generator)[..., 1:].unbind()
    gates = {"lr": torch.rand(batch, TOKENS, 2 * heads, generator=generator)[:, :, ::2] / width}
    W = torch.randn(batch, heads, width, width, generator=generator).transpose(2, 3)
    threads(2 * batch * heads)
    z, state = layer(q, k, v, gates=gates, state={"W": W})
    assert z.is_contiguous()
    whole = [x.contiguous() for x in (q, k, v)]
    again, other = layer(*whole, gates={"lr": gates["lr"].contiguous()}, state={"W": W.contiguous()})
    assert torch.equal(z, again)
    assert torch.equal(state.W, other.W)
    assert strips_of(layer) == {2}
    threads(1)
    wanted, last = layer(q, k, v, gates=gates, state={"W": W})
    # float32 rounds at 6e-8, some hundred operations in a row
    assert max(relative_error(z, wanted), relative_error(state.W, last.W)) <= 5e-6


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])
def test_half_precision_is_storage(threads, dtype, unit):
    """Each result is rounded once, also what is added up over the strips: half a unit at most."""
    threads(4)
    width = 8 * host("float32").lanes
    layer = compiled(LinearAttention, width, dtype)
    generator = torch.Generator().manual_seed(0)
    short = [torch.randn(1, TOKENS, 1, width, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in short]
    cotangent = torch.randn(1, TOKENS, 1, width, generator=generator).to(dtype)
    z, _ = layer(*short)
    wanted, _ = tttc.compile(LinearAttention, {"D": width}, torch.float64, backend="torch")(*exact)
    found = [z, *torch.autograd.grad(z, short, cotangent)]
    other = [wanted, *torch.autograd.grad(wanted, exact, cotangent.double())]
    assert strips_of(layer) == {4}
    assert {x.dtype for x in found} == {dtype}
    assert max(float(relative_error(x.double(), y)) for x, y in zip(found, other, strict=True)) <= unit


def test_second_derivatives_are_those_of_the_torch_backend(threads):
    threads(4)
    layers = [tttc.compile(LinearAttention, {"D": WIDE}, torch.float64, backend=b) for b in ("tvm", "torch")]
    found = [second_derivative(layer) for layer in layers]
    assert relative_error(*found) <= 1e-12
    assert found[0].abs().max() > 0


# -- when it is cut, and what is compiled ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "vectors", "count", "tokens", "why"),
    [
        (LinearAttention, 8, 4, 63, "little to do"),
        (LinearAttention, 3, 4, 2000, "strips of one vector"),
        (LinearAttention, 8.5, 4, 200, "no whole vectors"),
        (LinearAttention, 8, 1, 200, "one thread"),
        (TTTLinear, 8, 4, 200, "no free axis"),
    ],
)
def test_what_is_not_cut(threads, monkeypatch, variant, vectors, count, tokens, why):
    monkeypatch.setattr(
        importlib.import_module("tttc.backends.tvm_cpu.tiled"), "MIN_WORK_TO_WAKE", 64 * (8 * LANES) ** 2
    )
    threads(count)
    layer = compiled(variant, int(vectors * LANES))
    inputs = inputs_for(layer, tokens)
    scan = layer._scans[layer.stages.program.name]
    sequences = [x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)]
    assert scan.strips([*(x for x in inputs.state.values()), *sequences]) == 1, why


@pytest.mark.parametrize(
    ("vectors", "count", "strips"), [(8, 4, 4), (8, 3, 2), (6, 3, 3), (6, 2, 2), (5, 4, 1), (16, 7, 4)]
)
def test_strips_are_equal_whole_vectors_and_no_more_than_threads(threads, vectors, count, strips):
    threads(count)
    scan = compiled(LinearAttention, vectors * LANES)._scans["linear_attention"]
    W = torch.zeros(1, 1, vectors * LANES, vectors * LANES)
    assert scan.strips([W, *3 * [torch.zeros(1, 1, 9, vectors * LANES)]]) == strips


def test_kernels_of_strips_are_compiled_once_and_those_of_heads_not_at_all(threads, monkeypatch, tmp_path):
    """Forward and backward, for all calls and all layers; without gradients no backward, and the same bits."""
    load = importlib.import_module("tttc.backends.tvm_cpu.scan")
    names = []

    def counted(kernel, build=load.build):
        names.append(kernel.name)
        return build(kernel)

    monkeypatch.setattr(load, "build", counted)
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    threads(2)
    for first in (True, False):
        layer = compiled(LinearAttention, 4 * LANES)
        inputs = inputs_for(layer, TOKENS)
        with torch.no_grad():
            z, state = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
        assert names == ["linear_attention_strip"] or not first
        again, kept = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
        again.sum().backward()
        assert torch.equal(z, again)
        assert torch.equal(state.W, kept.W)
    assert sorted(names) == ["linear_attention_strip", "linear_attention_strip_adjoint"]
