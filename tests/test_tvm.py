"""The TVM backend: every library variant against the oracle, its functions against libm, its cache, bad input.

Memory is poisoned with NaN before every test (conftest.py), so that nothing here is right by chance.
"""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import tttc
from tests.helpers import (
    LIBRARY,
    VARIANTS,
    differences,
    dims_of,
    inputs_for,
    layer_result,
    oracle_result,
    second_derivative,
)
from tests.test_random_variants import outcomes
from tttc.backends import tvm_cuda
from tttc.compiler.driver import untuned
from tttc.errors import BackendRefusal, FallbackWarning, ShapeError
from tttc.library import GatedDeltaNet, LinearAttention, MomentumDeltaNet, TTTLinear
from tttc.verification.comparison import random_inputs, relative_error

pytestmark = pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")

TOKENS = 37  # two mini-batches of 16 and a tail of 5
HEAVY = {"GatedThreeLayer", "LaCT", "Moneta", "TTTMLP", "Titans", "Yaad"}  # a quarter of a minute and more to compile


def compiled(variant, dims, dtype=torch.float64, **settings):
    return tttc.compile(variant, dims, dtype, backend="tvm", **settings)


def compared(name, D, dtype=torch.float64, tokens=TOKENS, **settings):
    """What differs from the oracle, which is always float64."""
    variant = LIBRARY[name].replace(**settings)
    layer = compiled(variant, dims_of(variant, D, 2 * D), dtype)
    inputs = random_inputs(layer.signature, layer.dims, 1, tokens, 2)
    if dtype == torch.float64:
        return differences(layer_result(layer, inputs), oracle_result(variant, inputs))
    short = converted(inputs, dtype)  # the oracle is given what float32 holds of them
    wanted = oracle_result(variant, converted(short, torch.float64))
    # float32 rounds at 6e-8; some hundred operations in a row, and twice as many in the backward
    return differences(layer_result(layer, short), wanted, 5e-6, 1e-5)


def converted(inputs, dtype):
    def to(x):
        return x.detach().to(dtype).requires_grad_()

    groups = {n: {k: to(x) for k, x in getattr(inputs, n).items()} for n in ("gates", "params", "state", "tokens")}
    return replace(inputs, q=to(inputs.q), k=to(inputs.k), v=to(inputs.v), **groups)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIBRARY)
def test_every_library_variant_equals_the_oracle(name, request):
    """Outputs, final states and every gradient, with an odd width; and a tail, where its kernels compile in seconds.

    What LLVM makes of these is compared in float32, at a width of whole vectors.
    """
    if name not in HEAVY:
        request.getfixturevalue("plain_kernels")
    assert not compared(name, 3, tokens=32 if name in HEAVY else TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("D", [3, 17, 64, 96])
@pytest.mark.parametrize("name", LIBRARY)
def test_every_library_variant_at_other_widths(name, D):
    assert not compared(name, D)


@pytest.mark.parametrize("name", [n if n not in HEAVY else pytest.param(n, marks=pytest.mark.slow) for n in LIBRARY])
def test_every_library_variant_in_float32(name):
    assert not compared(name, 16, torch.float32)


@pytest.mark.usefixtures("plain_kernels")  # LLVM has the same to do for each
@pytest.mark.parametrize("read", ["after", "before", "start", "end"])
@pytest.mark.parametrize("mini_batch", [4, "all"])
def test_every_read(read, mini_batch):
    assert not compared("TTTLinear", 3, tokens=9, read=read, mini_batch=mini_batch)


def test_it_is_what_the_torch_backend_computes_in_calls_of_any_length():
    layer, other = (tttc.compile(TTTLinear, {"D": 8}, torch.float64, backend=b) for b in ("tvm", "torch"))
    inputs = inputs_for(other, 40)
    state = wanted_state = inputs.state
    for first, stop in ((0, 0), (0, 1), (1, 16), (16, 33), (33, 40)):
        part = inputs.q[:, first:stop], inputs.k[:, first:stop], inputs.v[:, first:stop]
        gates = {n: x[:, first:stop] for n, x in inputs.gates.items()}
        with torch.no_grad():
            z, state = layer(*part, gates=gates, params=inputs.params, state=state)
            wanted, wanted_state = other(*part, gates=gates, params=inputs.params, state=wanted_state)
        assert z.shape == wanted.shape
        assert not z.numel() or relative_error(z, wanted) <= 1e-12
    assert max(relative_error(state[n], wanted_state[n]) for n in state) <= 1e-12


@pytest.mark.parametrize("checkpoint", [None, 1, 2, 5])
def test_carries_may_be_kept_at_any_distance(checkpoint):
    layer = compiled(TTTLinear.replace(mini_batch=4), {"D": 3}, checkpoint=checkpoint)
    inputs = inputs_for(layer, 30)
    assert not differences(layer_result(layer, inputs), oracle_result(layer.signature.variant, inputs))


def test_second_derivatives_are_those_of_the_torch_backend():
    layers = [tttc.compile(LinearAttention, {"D": 2}, torch.float64, backend=b) for b in ("tvm", "torch")]
    found = [second_derivative(layer) for layer in layers]
    assert relative_error(*found) <= 1e-12
    assert found[0].abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_random_declarations_as_native_kernels(number):
    """What nobody wrote by hand, by native kernels wherever they can run it; no library variant is among these."""
    assert outcomes(6, 700 + number, backend="tvm")["equal"] >= 1


# -- elementwise functions ---------------------------------------------------------------------------------------------

RANGES = {
    "exp": (-80, 80),
    "tanh": (-25, 25),
    "sigmoid": (-80, 80),
    "softplus": (-80, 80),
    "silu": (-80, 80),
    "gelu": (-4, 10),
    "log": (1e-30, 1e30),
    "sqrt": (0, 1e6),
    "rsqrt": (1e-6, 1e6),
    "erf": (-6, 6),
    "sin": (-30, 30),
    "cos": (-30, 30),
    "abs": (-3, 3),
    "relu": (-3, 3),
    "sign": (-3, 3),
    "step": (-3, 3),
}
UNITS = {
    "exp": 3,
    "log": 3,
    "tanh": 6,
    "sigmoid": 4,
    "silu": 8,
    "softplus": 4,
    "gelu": 20,
}  # others 2; gelu rounds what exp is given, 12 at -4
POINTS = 4608  # of every array, so that each function is compiled once


def elementwise(name, values):
    """A function of tttc.backends.tvm_cpu.ops on an array whose length is a whole number of vectors."""
    result = np.zeros_like(values)
    elementwise_kernel(name, str(values.dtype), len(values))(values, result)
    return result


@cache
def elementwise_kernel(name, dtype, length):
    """It reads an array and writes another."""
    from tttc.backends.tvm_common.tir import LEFT_OUT, PASS_SETTINGS, imported_tvm

    tvm = imported_tvm()
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    from tttc.backends.tvm_cpu.codegen import Emitter
    from tttc.backends.tvm_cpu.machine import BYTES, host

    machine = host(dtype)
    count = length // machine.lanes
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("f")
        T.func_attr({"global_symbol": "f"})
        x, y = (
            T.match_buffer(
                T.arg(n, T.handle()),
                (length,),
                machine.dtype,
                align=BYTES[dtype],
            )
            for n in "xy"
        )
        functions = Emitter(machine, {}, 1, 1).vectors
        with T.serial(count) as i:
            found = functions[name](functions.let(x.vload([i * machine.lanes], machine.vector)))
            T.add_to_parent(y.vstore([i * machine.lanes], found))
    with tvm.transform.PassContext(opt_level=3, config=PASS_SETTINGS, disabled_pass=list(LEFT_OUT)):
        return tvm.compile(builder.get(), target=machine.target())["f"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", RANGES)
def test_elementwise_functions_are_right_to_a_few_units(name, dtype):
    """In units of the last place of the exact result, over the whole range, and near zero."""
    from tttc.ir.scalars import SCALARS

    low, high = RANGES[name]
    points = np.geomspace(low, high, POINTS - 512) if name == "log" else np.linspace(low, high, POINTS - 512)
    near = np.geomspace(1e-8, 1, 512) * (1 if low >= 0 else -1)
    values = np.concatenate([points, near]).astype(dtype)
    wanted = SCALARS[name].numpy(values.astype(np.longdouble) if name not in ("erf",) else values.astype(np.float64))
    found = elementwise(name, values)
    unit = np.spacing(np.maximum(np.abs(wanted.astype(dtype)), np.finfo(dtype).tiny))
    assert np.max(np.abs(found - wanted) / unit) <= UNITS.get(name, 2)


@pytest.mark.parametrize("name", [n for n in RANGES if n not in ("step", "sign")])
def test_nan_stays_nan_and_infinity_is_no_surprise(name):
    from tttc.ir.scalars import SCALARS

    values = np.array([math.nan, math.inf, -math.inf, 1.0] * (POINTS // 4), np.float32)
    with np.errstate(all="ignore"):
        wanted = SCALARS[name].numpy(values.astype(np.float64))
    if name in ("silu", "gelu"):  # minus infinity times zero: what torch gives too is 0 or NaN
        values[2::4], wanted[2::4] = 1.0, wanted[3]
    np.testing.assert_allclose(elementwise(name, values), wanted, rtol=1e-5)


# -- input of all kinds ------------------------------------------------------------------------------------------------


def test_strided_and_offset_views_are_read_where_they_lie():
    layer = compiled(TTTLinear, {"D": 16}, torch.float32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 20, 3, 17, generator=generator)[..., 1:].unbind()  # misaligned by 4 bytes
    gates = {n: torch.rand(2, 20, 6, generator=generator)[:, :, ::2] for n in ("lr", "tau")}
    W1 = torch.randn(2, 3, 16, 20, generator=generator)
    for state in (W1[..., :16], W1.transpose(2, 3)[:, :, :16, :16]):
        z, _ = layer(q, k, v, gates=gates, state={"W1": state})
        whole = [x.contiguous() for x in (q, k, v)], {n: x.contiguous() for n, x in gates.items()}
        wanted, _ = layer(*whole[0], gates=whole[1], state={"W1": state.contiguous()})
        assert torch.equal(z, wanted)


@pytest.mark.parametrize(("batch", "tokens", "heads"), [(0, 5, 2), (2, 0, 2), (2, 5, 0), (1, 1, 1)])
def test_empty_and_single_calls(batch, tokens, heads):
    layer = compiled(TTTLinear, {"D": 4}, torch.float32)
    q, k, v = torch.randn(3, batch, tokens, heads, 4).unbind()
    gates = {n: torch.rand(batch, tokens, heads) for n in ("lr", "tau")}
    z, state = layer(q.requires_grad_(), k, v, gates=gates)
    assert z.shape == (batch, tokens, heads, 4)
    assert state.W1.shape == (batch, heads, 4, 4)
    z.sum().backward()
    assert q.grad.shape == q.shape
    assert torch.isfinite(z).all()


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])
def test_half_precision_is_storage(dtype, unit):
    """Inputs are read as they are, arithmetic is float32, and each result is rounded once: half a unit at most."""
    assert max(half_errors(compiled(LinearAttention, {"D": 17}, dtype), dtype)) <= unit


def half_errors(layer, dtype):
    """Of the output and the gradients of linear attention that stores its sequences in this dtype."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 20, 3, 17, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    gates = {n: torch.rand(2, 20, 3, generator=generator).to(dtype) for n in layer.signature.gates}
    other = tttc.compile(LinearAttention, {"D": 17}, torch.float64, backend="torch")
    z, _ = layer(*inputs, gates=gates)
    wanted, _ = other(*exact, gates={n: x.double() for n, x in gates.items()})
    cotangent = torch.randn(z.shape, generator=generator).to(dtype)
    z.backward(cotangent)
    wanted.backward(cotangent.double())
    found = [z, *(x.grad for x in inputs)]
    assert {x.dtype for x in found} == {dtype}
    assert z.is_contiguous()
    return [
        float(relative_error(x.double(), y)) for x, y in zip(found, [wanted, *(x.grad for x in exact)], strict=True)
    ]


def test_second_derivatives_of_half_precision():
    layer = compiled(LinearAttention, {"D": 3}, torch.bfloat16)
    q, k, v = (torch.ones(1, 4, 1, 3, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    z, _ = layer(q, k, v, gates={n: torch.ones(1, 4, 1) for n in layer.signature.gates})
    (g,) = torch.autograd.grad(z.square().sum(), k, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), v)
    assert h.dtype == torch.bfloat16
    assert h.abs().max() > 0


def test_what_it_cannot_run_is_refused_with_the_reason():
    with pytest.raises(BackendRefusal, match="it runs on a CPU or an NVIDIA GPU, not on mps"):
        tttc.compile(TTTLinear, {"D": 4}, device="mps", backend="tvm")
    with pytest.raises(BackendRefusal, match="found one after the other"):
        tttc.compile(VARIANTS["TTTMLP"].replace(mini_batch=1), {"D": 4, "F": 8}, backend="tvm", chunk=8)


def test_auto_is_native_where_it_can_be(monkeypatch):
    monkeypatch.setenv("TTTC_BACKEND", "auto")
    layer = tttc.compile(LinearAttention, {"D": 4})
    assert layer.backend == "tvm"
    assert "tvm: native kernels for this CPU" in layer.explain()
    assert not any(s._compiled for s in layer._scans.values())  # at its first call, not before
    online = VARIANTS["TTTMLP"].replace(mini_batch=1)
    assert tttc.compile(online, {"D": 4, "F": 8}).backend == "tvm"  # token by token
    with pytest.warns(FallbackWarning):
        rows = tttc.compile(online, {"D": 4, "F": 8}, chunk=8)
    assert rows.backend == "torch"
    assert "not tvm: the rows of a chunk are found one after the other" in rows.why
    with pytest.warns(FallbackWarning, match="not triton: torch finds no GPU"):
        assert tttc.compile(LinearAttention, {"D": 4}, device="cuda").backend == "torch"


def test_auto_is_what_the_environment_names(monkeypatch):
    for name in ("torch", "tvm"):
        monkeypatch.setenv("TTTC_BACKEND", name)
        layer = tttc.compile(LinearAttention, {"D": 4})
        assert layer.backend == name
        assert "TTTC_BACKEND" in layer.why
    monkeypatch.setenv("TTTC_BACKEND", "nonsense")
    with pytest.raises(BackendRefusal, match="TTTC_BACKEND names no backend; there are auto, torch, tvm"):
        tttc.compile(LinearAttention, {"D": 4})


@pytest.mark.parametrize(
    ("variant", "D", "dtype", "chunk"),
    [
        (LinearAttention, 64, torch.float32, 16),
        (LinearAttention, 128, torch.float32, 16),
        (LinearAttention, 128, torch.float64, 32),
        (GatedDeltaNet, 256, torch.float32, 32),
        (GatedDeltaNet, 512, torch.float32, 64),
        (MomentumDeltaNet, 128, torch.float32, 32),  # two states
        (TTTLinear, 64, torch.float32, 16),  # its mini-batch
    ],
)
def test_a_free_chunk_is_short_while_the_state_stays_in_a_near_cache(variant, D, dtype, chunk):
    plan = compiled(variant, {"D": D}, dtype).stages.program.plan
    assert plan.chunk == chunk
    assert ("near cache" in plan.reason) == (variant is not TTTLinear and chunk < 64)


def test_a_chunk_that_is_given_stays_and_that_of_a_gpu_is_another():
    assert compiled(LinearAttention, {"D": 64}, chunk=48).stages.program.plan.chunk == 48
    assert untuned(LinearAttention, {"D": 64}, tvm_cuda).plan.chunk == 64


COMPILES = """
import inspect, sys, torch, tttc
from tttc.library import LinearAttention
before = inspect.getfile, inspect.findsource
layer = tttc.compile(LinearAttention, {"D": 3}, torch.float64, backend="tvm")
layer.source
assert "tvm" in sys.modules
assert (inspect.getfile, inspect.findsource) == before
"""


def test_the_process_is_left_as_it_was():
    """Importing TVM replaces a function of `inspect`, which then fails for classes that no module holds. In a process
    of its own: in this one a plugin or a test may have imported TVM before.
    """
    found = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_it_takes_as_many_threads_as_torch():
    layer = compiled(TTTLinear, {"D": 4}, torch.float32)
    q, k, v = torch.randn(3, 1, 40, 6, 4).unbind()
    gates = {n: torch.rand(1, 40, 6) for n in ("lr", "tau")}
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            found.append(layer(q, k, v, gates=gates)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_heads_may_be_taken_together(monkeypatch):
    """By chunks, some heads in each, or head by head: the same operations, the same bits."""
    load = importlib.import_module("tttc.backends.tvm_cpu.scan")
    layer = compiled(TTTLinear, {"D": 16}, torch.float32)
    inputs = converted(inputs_for(layer, 40, heads=5, batch=2), torch.float32)
    found = []
    for cached in (0, 10**9):
        monkeypatch.setattr(load, "CACHED", cached)
        found.append(layer_result(layer, inputs))
    assert torch.equal(found[0].z, found[1].z)
    assert all(torch.equal(found[0].final[n], w) for n, w in found[1].final.items())
    assert all(torch.equal(found[0].gradients[n], g) for n, g in found[1].gradients.items())


@pytest.mark.parametrize(
    ("batch", "heads", "threads", "most", "together"),
    [
        (1, 12, 2, 100, 6),
        (1, 12, 2, 4, 3),
        (1, 12, 16, 100, 1),
        (8, 12, 2, 100, 12),
        (1, 5, 2, 100, 3),
        (1, 1, 4, 0, 1),
    ],
)
def test_no_thread_has_more_heads_than_another_must(batch, heads, threads, most, together):
    load = importlib.import_module("tttc.backends.tvm_cpu.scan")
    assert load._together(batch, heads, threads, most) == together


def test_several_threads_compile_and_call_one_layer():
    layer, found = compiled(LinearAttention, {"D": 5}), []
    inputs = inputs_for(layer, 20)

    def call():
        found.append(layer(inputs.q.detach(), inputs.k.detach(), inputs.v.detach(), gates=inputs.gates)[0])

    workers = [threading.Thread(target=call) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(found) == 4
    assert all(torch.equal(z, found[0]) for z in found)


def linear_attention(q, k, v, dtype=torch.float32):
    layer = compiled(LinearAttention, {"D": 16}, dtype)
    return layer(q, k, v, gates={n: torch.ones(*q.shape[:3]) for n in layer.signature.gates})[0]


@pytest.mark.parametrize("case", ["expanded", "overlapping", "transposed", "read-only", "one tensor three times"])
def test_inputs_that_share_their_memory_or_may_not_be_written(case):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 20, 3, 16, generator=generator)
    if case == "expanded":
        q = whole[:, :, :1].expand(-1, -1, 3, -1)
    elif case == "overlapping":
        q = whole.as_strided((2, 20, 3, 16), (7, 16, 3, 1))
    elif case == "transposed":
        q = torch.randn(2, 20, 16, 3, generator=generator).transpose(2, 3)
    elif case == "read-only":
        kept = whole.numpy()
        kept.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that it cannot keep anybody from writing
            q = torch.from_numpy(kept)
    else:
        q = whole
    inputs = (q, q, q) if case == "one tensor three times" else (q, whole, whole.flip(1))
    before = [x.clone() for x in inputs]
    z = linear_attention(*inputs)
    assert torch.equal(z, linear_attention(*before))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert z.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in inputs}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.double(), "dtype torch.float64"),
        (lambda x: x.half(), "dtype torch.float16"),
        (lambda x: x.long(), "dtype torch.int64"),
        (lambda x: x.to("meta"), "is on meta"),
        (lambda x: x[..., :15], r"expected \[B, T, H, D\]"),
        (lambda x: x[:, :5], r"expected \[B, T, H, D\]"),
        (lambda x: x.numpy(), "is a ndarray"),
        (lambda x: None, "is a NoneType"),
    ],
)
def test_input_that_is_wrong_is_an_error(change, said):
    x = torch.randn(1, 6, 2, 16)
    with pytest.raises(ShapeError, match=said):
        linear_attention(x, change(x), x)


# -- text --------------------------------------------------------------------------------------------------------------


def test_the_source_is_the_statements_of_the_kernels(golden):
    golden("tvm/ttt_linear", tttc.compile(TTTLinear, {"D": 64}, backend="tvm").stages["emit"].text)


def test_the_script_is_tensor_ir():
    layer = compiled(LinearAttention, {"D": 4})
    assert "T.prim_func" in layer.source
