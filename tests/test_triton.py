"""The Triton backend in its interpreter: every library variant against the oracle, what lies beyond ends, bad input.

On a machine with a GPU the same tests run on it. Memory is poisoned with NaN before every test (conftest.py).
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch

import tttc
from tests.helpers import (
    LIBRARY,
    differences,
    dims_of,
    inputs_for,
    keywords,
    oracle_result,
    replaced,
    result_of,
    split_call,
)
from tttc.backends import torch as torch_backend
from tttc.backends import triton as triton_backend
from tttc.backends.triton.kernel_spec import unfused
from tttc.backends.triton.load import Module, TritonScan
from tttc.backends.triton.tune import bounded
from tttc.errors import BackendRefusal
from tttc.library import TTTMLP, DeltaNet, LinearAttention, TTTLinear
from tttc.reference import reference
from tttc.verification.comparison import random_inputs, relative_error

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="there is no triton for this platform"),
    # the interpreter computes beyond the ends of blocks too, where a division by zero is no mistake
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 37  # two chunks of 16 and a tail of 5
FEWER = {"Titans": 21, "Moneta": 21, "Yaad": 21}  # with random gates their states grow beyond what float32 can follow
# Its Newton-Schulz steps enlarge the least singular values of a gradient, which for fewer tokens than features are a
# rounding: at D=64 and 37 tokens the definition itself in float32 is 1.8e-5 from the one in float64.
MORE = {"LaCT": 75}
BATCHED = ("LaCT", "MTTT", "ViTTT")  # their chunk is the whole sequence, or 2048 tokens
# float32 rounds at 6e-8; some hundred operations in a row, and twice as many in the backward
OUTPUT, GRADIENT = 5e-6, 1e-5


def compiled(variant, dims, dtype=torch.float32, **settings):
    return tttc.compile(variant, dims, dtype, DEVICE, "triton", **settings)


def converted(inputs, dtype, device):
    def to(x):
        return x.detach().to(device, dtype).requires_grad_()

    groups = {n: {k: to(x) for k, x in getattr(inputs, n).items()} for n in ("gates", "params", "state", "tokens")}
    return replace(inputs, q=to(inputs.q), k=to(inputs.k), v=to(inputs.v), **groups)


def called(layer, inputs, **more):
    """Outputs, states and gradients of a call, as float64."""
    z, state = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs), **more)
    found = result_of(z, state, inputs)
    return type(found)(*(x.double().cpu() if isinstance(x, torch.Tensor) else _doubled(x) for x in found))


def _doubled(tensors):
    return {n: x.double().cpu() for n, x in tensors.items()}


def compared(variant, dims, tokens=TOKENS, batch=1, **settings):
    """What differs from the oracle, which is always float64."""
    layer = compiled(variant, dims, **settings)
    short = converted(random_inputs(layer.signature, layer.dims, batch, tokens, 2), torch.float32, DEVICE)
    wanted = oracle_result(variant, converted(short, torch.float64, "cpu"))
    return differences(called(layer, short), wanted, OUTPUT, GRADIENT)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [16, 24, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LIBRARY)
def test_every_library_variant_equals_the_oracle(name, D):
    """Outputs, final states and every gradient, with a tail; where the chunk is free, in chunks of 16."""
    free = tttc.compile(LIBRARY[name], dims_of(LIBRARY[name], D, 2 * D)).stages.program.plan.free
    tokens = FEWER.get(name, MORE.get(name, TOKENS) if D > TOKENS else TOKENS)
    assert not compared(LIBRARY[name], dims_of(LIBRARY[name], D, 2 * D), tokens, chunk=16 if free else None)


@pytest.mark.parametrize("name", [n for n in LIBRARY if n not in BATCHED])
def test_it_is_the_kernels_that_run(name):
    layer = compiled(LIBRARY[name], dims_of(LIBRARY[name], 16, 32))
    assert isinstance(layer._scans[layer._name], TritonScan)


@pytest.mark.parametrize("name", BATCHED)
def test_what_is_no_kernel_is_said(name):
    layer = compiled(LIBRARY[name], dims_of(LIBRARY[name], 16))
    assert f"# {layer._name}: its chunk is" in layer.source
    assert f"{layer._name} as batched operations: its chunk is" in layer.explain(stages=()).replace("\n#", "").replace(
        "  ", ""
    )


@pytest.mark.parametrize("read", ["after", "before", "start", "end"])
@pytest.mark.parametrize("mini_batch", [1, 4])
def test_every_read(read, mini_batch):
    """Chunks of one token, and of fewer than a product of matrices takes."""
    assert not compared(TTTLinear.replace(read=read, mini_batch=mini_batch), {"D": 5}, 9)


@pytest.mark.parametrize("checkpoint", [None, 1, 2, 5])
def test_carries_may_be_kept_at_any_distance(checkpoint):
    assert not compared(TTTLinear.replace(mini_batch=4), {"D": 16}, 30, checkpoint=checkpoint)


@pytest.mark.parametrize("name", ["TTTLinear", "TTTMLP", "GatedDeltaNet"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    """bfloat16 has 8 bits (4e-3), float16 11 (5e-4): factors are rounded, sums are float32; gradients twice that."""
    allowed = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype]
    variant = LIBRARY[name]
    layer = compiled(variant, dims_of(variant, 16, 32), dtype)
    inputs = random_inputs(layer.signature, layer.dims, 1, 21, 2)
    wide = converted(inputs, torch.float32, DEVICE)
    short = replace(wide, **{n: getattr(wide, n).detach().to(dtype).requires_grad_() for n in ("q", "k", "v")})
    wanted = oracle_result(variant, converted(short, torch.float64, "cpu"))
    assert not differences(called(layer, short), wanted, allowed, 2 * allowed)


class Scalar(tttc.Variant):
    """Learns one number for each token."""

    W = tttc.state("D", "E")
    v = tttc.token("E")
    anchor = "token"

    def learner(self, x):
        return x @ self.W

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


@pytest.mark.parametrize(("variant", "dims"), [(DeltaNet, {"D": 16}), (Scalar, {"D": 5, "E": 1})])
@pytest.mark.parametrize("chunk", [32, 64])
def test_triangular_systems_of_several_blocks(variant, dims, chunk):
    """Forward and, transposed, backward; a tail that ends within a block."""
    assert not compared(variant, dims, 70, chunk=chunk)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
def test_triangular_systems_of_several_blocks_in_half_precision(dtype, allowed):
    """The products that link blocks take factors of the dtype of the tokens, as all others do."""
    layer = compiled(DeltaNet, {"D": 32}, dtype, chunk=64)
    wide = converted(inputs_for(layer, 128), torch.float32, DEVICE)
    short = replace(wide, **{n: getattr(wide, n).detach().to(dtype).requires_grad_() for n in ("q", "k", "v")})
    wanted = oracle_result(DeltaNet, converted(short, torch.float64, "cpu"))
    assert not differences(called(layer, short), wanted, allowed, 2 * allowed)


def test_calls_of_any_length_and_decoding():
    """Open mini-batches, their end, and the kernel of one token."""
    layer = compiled(TTTLinear, {"D": 16}, decode="sums")
    inputs = converted(inputs_for(layer, 40, batch=2, heads=2), torch.float32, DEVICE)
    exact = converted(inputs, torch.float64, "cpu")
    wanted, final = reference(TTTLinear, exact.q, exact.k, exact.v, **keywords(exact))
    with torch.no_grad():
        z, state = split_call(layer, inputs, (0, 1, 2, 3, 15, 16, 17, 33))
    assert relative_error(z.double().cpu(), wanted) <= OUTPUT
    assert max(relative_error(state[n].double().cpu(), w) for n, w in final.items()) <= OUTPUT


@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 0, 2), (0, 5, 2), (1, 1, 1), (3, 5, 1)])
def test_empty_and_single_calls(batch, tokens, heads):
    layer = compiled(LinearAttention, {"D": 16})
    q, k, v = torch.randn(3, batch, tokens, heads, 16, device=DEVICE)
    z, state = layer(q, k, v)
    wanted, final = tttc.compile(LinearAttention, {"D": 16}, backend="torch")(q.cpu(), k.cpu(), v.cpu())
    assert z.shape == wanted.shape
    torch.testing.assert_close(z.cpu(), wanted, rtol=1e-5, atol=1e-5)  # float32, in another order
    torch.testing.assert_close(state.W.cpu(), final.W, rtol=1e-5, atol=1e-5)


def test_packed_sequences():
    """Each as if it were alone, and their gradients."""
    layer = compiled(DeltaNet, {"D": 16}, chunk=16)
    inputs = converted(inputs_for(layer, 40), torch.float32, DEVICE)
    begun = {n: x.detach().expand(3, -1, -1, -1) for n, x in inputs.state.items()}
    bounds = [0, 17, 18, 40]
    packed = torch.tensor(bounds, device=DEVICE)
    z, state = layer(inputs.q, inputs.k, inputs.v, gates=inputs.gates, state=begun, cu_seqlens=packed)
    exact = converted(inputs, torch.float64, "cpu")
    for n, (a, b) in enumerate(pairwise(bounds)):
        gates = {g: x[:, a:b] for g, x in exact.gates.items()}
        part = exact.q[:, a:b], exact.k[:, a:b], exact.v[:, a:b]
        wanted, final = reference(DeltaNet, *part, gates=gates, params={}, state=exact.state)
        assert relative_error(z[:, a:b].double().cpu(), wanted) <= OUTPUT
        assert relative_error(state.W[n : n + 1].double().cpu(), final["W"]) <= OUTPUT
    (found,) = torch.autograd.grad(z.square().sum(), [inputs.k])
    assert bool(torch.isfinite(found).all())
    assert bool((found.abs().sum((0, 2, 3)) > 0).all())


def test_tensors_are_read_where_they_lie():
    """Cut from wider ones, with batch, heads and tokens in any order, or the same for all heads."""
    layer = compiled(TTTLinear, {"D": 16})
    inputs = converted(inputs_for(layer, 20, batch=2, heads=3), torch.float32, DEVICE)
    plain = called(layer, inputs)
    wide = torch.randn(2, 20, 3, 80, device=DEVICE)
    with torch.no_grad():
        wide[..., 16:32], wide[..., 32:48], wide[..., 48:64] = inputs.q, inputs.k, inputs.v
    moved = replace(
        inputs, q=wide[..., 16:32], k=wide[..., 32:48], v=wide[..., 48:64].transpose(0, 2).contiguous().transpose(0, 2)
    )
    z, state = layer(moved.q, moved.k, moved.v, **keywords(moved))
    assert torch.equal(z.double().cpu(), plain.z)
    assert all(torch.equal(state[n].double().cpu(), x) for n, x in plain.final.items())


NAMED_LIKE_A_KERNELS_OWN = [
    ("W", "b", "lr"),
    ("W", "h", "length"),
    ("d", "inside", "first"),
    ("count", "j", "token"),
    ("q_b", "dot", "q_ptr"),
    ("b", "b_", "h"),
    ("W", "W_found", "k_f32"),
    ("groups", "W_kept_ptr", "tl"),
]


@pytest.mark.parametrize(("weights", "bias", "rate"), NAMED_LIKE_A_KERNELS_OWN)
def test_a_declaration_may_name_things_as_a_kernel_does(weights, bias, rate):
    """A state called b is not the batch element of the program."""

    class Named(tttc.Variant):
        mini_batch = 4

        def learner(self, x):
            return x @ getattr(self, weights) + getattr(self, bias)

        def loss(self, k, v):
            return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

        update = tttc.sgd(lr=tttc.gate(rate))

    setattr(Named, weights, tttc.state("D", "D"))
    setattr(Named, bias, tttc.state("D"))
    assert not compared(Named, {"D": 16}, 11, batch=2)


def test_settings_that_are_not_given_stay_as_they_are():
    """A large state has more warps than a small one, whatever else is set."""
    layer = compiled(TTTMLP, {"D": 64, "F": 256}, config={"num_stages": 3})
    scan = layer._scans["tttmlp"]
    assert scan.kernels.options == {d: {"num_warps": 16, "num_stages": 3} for d in (False, True)}


@pytest.mark.parametrize(
    ("target", "warps", "registers"),
    [
        ("sm_80", 4, 255),
        ("sm_86", 16, 128),
        ("sm_90", 4, None),
        ("sm_100", 16, 128),
        ("gfx942", 4, None),
        ("", 4, None),
    ],
)
def test_registers_are_asked_for_where_the_assembler_has_to_be_told(target, warps, registers):
    assert bounded({"num_warps": warps, "num_stages": 1}, target).get("maxnreg") == registers


# -- the chunk ---------------------------------------------------------------------------------------------------------


def chunk_of(variant, dims=None, **settings):
    """The chunk of a layer, and whether explain says that the backend chose it."""
    layer = compiled(variant, dims or {"D": 16}, **settings)
    said = " ".join(layer.explain(stages=()).replace("#", " ").split())
    return layer.stages.program.plan.chunk, "tokens fits the registers of a program" in said


def test_a_free_chunk_is_as_the_kernels_want_it():
    """Unless the user chose; and where the schedule has no choice, or has chosen fewer, nothing is asked."""
    assert tttc.compile(LinearAttention, {"D": 16}, backend="torch").stages.program.plan.chunk == 64
    assert chunk_of(LinearAttention) == (32, True)
    assert chunk_of(LinearAttention, chunk=64) == (64, False)
    assert chunk_of(LinearAttention, {"D": 128}) == (16, True)  # four times the state
    assert chunk_of(LIBRARY["KDA"], dims_of(LIBRARY["KDA"], 16)) == (16, False)
    assert chunk_of(TTTLinear.replace(mini_batch=64)) == (64, False)


# -- what can go wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("tl.minimum(16, T - first)", "tl.minimum(15, T - first)"),  # the last token of each chunk is left out
        ("t[None, :] >= t[:, None]", "t[None, :] > t[:, None]"),  # a token does not see its own gradient
        ("chunk % every == 0", "chunk % every == 1"),  # the wrong carry is kept
        ("j = count - 1 - j_back", "j = j_back"),  # the chunks of a group in the wrong order
        ("other=0.0", "other=1.0"),  # tokens beyond the last one count
    ],
)
def test_a_fault_in_a_kernel_is_found(right, wrong):
    """The comparison with the oracle above is one that a wrong kernel fails."""
    variant = TTTLinear
    layer = compiled(variant, {"D": 16}, checkpoint=2)
    assert right in layer.source
    module = Module(replaced(layer._source, right, wrong), layer.stages.program.name)
    for scan in layer._scans.values():
        scan.kernels.module = module
    inputs = converted(inputs_for(layer, 75), torch.float32, DEVICE)
    wanted = oracle_result(variant, converted(inputs, torch.float64, "cpu"))
    assert differences(called(layer, inputs), wanted, OUTPUT, GRADIENT)


def test_refusals(monkeypatch):
    with pytest.raises(BackendRefusal, match="float64 is no dtype of its matrix products"):
        compiled(TTTLinear, {"D": 16}, torch.float64)
    monkeypatch.setattr(import_module("tttc.backends.triton.load"), "interpreted", lambda: False)
    with pytest.raises(BackendRefusal, match="TRITON_INTERPRET=1 set before Python starts"):
        tttc.compile(TTTLinear, {"D": 16}, backend="triton")


def test_a_fault_in_a_system_of_several_blocks_is_found():
    layer = compiled(DeltaNet, {"D": 16}, chunk=64)
    right, wrong = (f"(second >> n == (first >> n) + {i})" for i in (1, 2))
    assert right in layer.source
    scan, inputs = layer._scans[layer._name], converted(inputs_for(layer, 40), torch.float32, DEVICE)
    scan.kernels.module = Module(replaced(layer._source, right, wrong), "faulty")
    wanted = oracle_result(DeltaNet, converted(inputs, torch.float64, "cpu"))
    assert differences(called(layer, inputs), wanted, OUTPUT, GRADIENT)


# -- the source --------------------------------------------------------------------------------------------------------


def test_the_source_of_a_kernel(golden):
    golden("triton/ttt_linear", compiled(TTTLinear, {"D": 64}).source)


def test_the_source_of_an_mlp_is_short():
    """Forward and backward of whole mini-batches: what a person would have to review."""
    functions = compiled(TTTMLP, {"D": 64, "F": 256}).source.split("@triton.jit")
    kernels = [f for f in functions if "def tttmlp(" in f or "def tttmlp_adjoint(" in f]
    assert len(kernels) == 2
    assert sum(k.strip().count("\n") + 1 for k in kernels) <= 300


@pytest.mark.slow
def test_batched_scans_are_compiled_where_kernels_are_not_interpreted():
    """What a GPU runs of them, here on the CPU: outputs and gradients as without torch.compile."""
    layer = tttc.compile(LIBRARY["MTTT"], dims_of(LIBRARY["MTTT"], 4), backend="torch")
    program = layer.stages.program
    inputs = converted(random_inputs(layer.signature, layer.dims, 1, 9, 2), torch.float32, "cpu")
    plain = called(layer, inputs)
    layer._scans = torch_backend.load_scans(torch_backend.emit_source(program), program, steps=torch.compile)
    # float32, and torch.compile adds up in another order
    assert not differences(called(layer, inputs), plain, OUTPUT, GRADIENT)


def test_a_state_that_no_program_can_hold_is_batched():
    program = compiled(TTTMLP, {"D": 128, "F": 512}).stages.program
    assert "larger than the registers of one program" in unfused(program.scans[0], program)


def test_a_value_that_triton_does_not_take():
    """Of many axes, each padded to 16: the scan is batched, and says why."""

    class Experts(tttc.Variant):
        mini_batch, read = 2, "start"
        W = tttc.state("D", "D")
        E = tttc.state(*"IJKLM", "D", "D")

        def learner(self, x):
            return x @ self.W + tttc.einsum("d,ijklmde->e", x, tttc.tanh(self.E))

        def loss(self, k, v):
            return 0.05 * tttc.sum((self.learner(k) - v) ** 2)

        update = tttc.sgd(lr=tttc.gate("lr"))

    dims = {"D": 2} | dict.fromkeys("IJKLM", 2)
    assert "and Triton takes 1048576" in " ".join(triton_backend.notes(compiled(Experts, dims).stages.program))
    assert compared(Experts, dims, 5) == ""
