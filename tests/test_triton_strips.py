"""The Triton backend where there are fewer heads than multiprocessors, or a state is too large: strips of a free axis.

In the interpreter, which runs one program after the other: how many run at once is not looked at here.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

import tttc
from tests.helpers import LIBRARY, differences, dims_of, inputs_for, keywords, oracle_result, replaced
from tests.learners import Upright
from tests.test_triton import DEVICE, GRADIENT, OUTPUT, called, compiled, converted
from tttc.backends.triton.emit import module_text
from tttc.backends.triton.kernel_spec import half_of, spec_of, unfused
from tttc.backends.triton.load import Module
from tttc.ir.names import worded
from tttc.library import DeltaNet, LinearAttention, TTTLinear
from tttc.verification.comparison import relative_error

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="there is no triton for this platform"),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]

TOKENS = 37  # two chunks of 16 and a tail of 5
WIDE = 64  # two strips of 32, or four of 16


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch):
    """Sets how many a device has; and calls are not too short."""
    load = import_module("tttc.backends.triton.load")
    monkeypatch.setattr(load, "MIN_TOKENS_TO_TILE", 1)

    def use(count):
        monkeypatch.setattr(load, "multiprocessors", lambda device: count)

    return use


def strips_of(layer):
    """The numbers of strips in which its loops were run, but for those of a whole head."""
    loops = [s for s in layer._scans.values() if s.scan.loops]
    return {k.spec.strips for s in loops for k in s._narrower.values()}


def compared(layer, inputs):
    """What differs from the oracle, which is always float64."""
    wanted = oracle_result(layer.signature.variant, converted(inputs, torch.float64, "cpu"))
    return differences(called(layer, inputs), wanted, OUTPUT, GRADIENT)


def short(layer, tokens=TOKENS, batch=1, heads=1):
    return converted(inputs_for(layer, tokens, batch=batch, heads=heads), torch.float32, DEVICE)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "heads", "count", "strips"),
    [(1, 1, 4, 4), (1, 1, 3, 2), (2, 1, 4, 2), (1, 3, 6, 2), (2, 2, 8, 2), (1, 1, 100, 4), (1, 3, 5, None)],
)
def test_outputs_states_and_gradients_are_those_of_the_oracle(multiprocessors, batch, heads, count, strips):
    """For every way in which strips lie among batch and heads, and no more programs than can run at once."""
    multiprocessors(count)
    layer = compiled(LinearAttention, {"D": WIDE}, chunk=16)
    assert not compared(layer, short(layer, batch=batch, heads=heads))
    assert strips_of(layer) == ({strips} if strips else set())


@pytest.mark.parametrize("name", ["DeltaNet", "GatedDeltaNet", "KDA", "MomentumDeltaNet", "RetNet"])
def test_every_kind_of_scan(multiprocessors, name):
    """A system to solve, a gate for each channel, a carry beside the weights."""
    multiprocessors(2)
    layer = compiled(LIBRARY[name], dims_of(LIBRARY[name], 32), chunk=16)
    assert not compared(layer, short(layer))
    assert strips_of(layer) == {2}


class Tiles(tttc.Variant):
    """A long mini-batch, a bias, and a param that only the columns of a strip have."""

    W = tttc.state("D", "E")
    b = tttc.state("E")
    scale = tttc.param("E", init=1.0)
    v = tttc.token("E")
    mini_batch = 24

    def learner(self, x):
        return self.scale * (x @ self.W) + self.b

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"), read_scale=tttc.gate("tau"))


@pytest.mark.parametrize(("E", "strips"), [(32, 2), (24, 2), (40, 3)])
def test_tiles_open_mini_batches_and_strips_that_are_not_full(multiprocessors, E, strips):
    multiprocessors(3)
    layer = compiled(Tiles, {"D": 5, "E": E}, chunk=16)
    assert not compared(layer, short(layer))
    assert strips_of(layer) == {strips}


def test_rows_of_the_weights(multiprocessors):
    multiprocessors(8)
    layer = compiled(Upright, {"D": 32})
    assert not compared(layer, short(layer, batch=2, heads=2))
    assert strips_of(layer) == {2}


@pytest.mark.parametrize("checkpoint", [None, 1, 2, 5])
def test_carries_may_be_kept_at_any_distance(multiprocessors, checkpoint):
    multiprocessors(2)
    layer = compiled(DeltaNet, {"D": 32}, chunk=8, checkpoint=checkpoint)
    assert not compared(layer, short(layer))
    assert strips_of(layer) == {2}


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
def test_half_precision(multiprocessors, dtype, allowed):
    """As without strips (test_triton.py); what is added up over them is rounded once."""
    multiprocessors(4)
    layer = compiled(DeltaNet, {"D": WIDE}, dtype, chunk=16)
    inputs = short(layer)
    given = replace(inputs, **{n: getattr(inputs, n).detach().to(dtype).requires_grad_() for n in ("q", "k", "v")})
    wanted = oracle_result(DeltaNet, converted(given, torch.float64, "cpu"))
    assert not differences(called(layer, given), wanted, allowed, 2 * allowed)
    assert strips_of(layer) == {4}


def test_a_backward_may_have_other_strips_than_its_forward(multiprocessors):
    """What is kept lies as for whole heads; and the same strips give the same bits again."""
    layer = compiled(LinearAttention, {"D": WIDE}, chunk=16)
    inputs, found = short(layer), []
    for forward, backward in ((1, 1), (4, 2), (1, 4), (1, 4)):
        multiprocessors(forward)
        z, _ = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
        multiprocessors(backward)
        found.append(torch.autograd.grad(z.square().sum(), [inputs.q, inputs.k, inputs.v]))
    assert all(map(torch.equal, found[2], found[3]))
    for other in found[1:]:
        assert max(relative_error(x.double(), y.double()) for x, y in zip(other, found[0], strict=True)) <= GRADIENT


def test_tensors_are_read_where_they_lie(multiprocessors):
    """Cut from wider ones, with heads and tokens in any order."""
    multiprocessors(12)
    layer = compiled(LinearAttention, {"D": 32}, chunk=16)
    inputs = short(layer, batch=2, heads=3)
    wanted, final = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    wide = torch.randn(2, TOKENS, 3, 80, device=DEVICE)
    with torch.no_grad():
        wide[..., 16:48] = inputs.k
    v = inputs.v.transpose(0, 2).contiguous().transpose(0, 2)
    z, state = layer(inputs.q, wide[..., 16:48], v, **keywords(inputs))
    assert torch.equal(z, wanted)
    assert torch.equal(state.W, final.W)
    assert strips_of(layer) == {2}


def test_second_derivatives_are_those_of_the_torch_backend(multiprocessors):
    multiprocessors(2)
    layer, other = (tttc.compile(LinearAttention, {"D": 32}, device=DEVICE, backend=b) for b in ("triton", "torch"))
    inputs, found = short(layer, 3), []
    for each in (layer, other):
        z, _ = each(inputs.q, inputs.k, inputs.v, state=inputs.state)
        (g,) = torch.autograd.grad(z.square().sum(), inputs.k, create_graph=True)
        found += torch.autograd.grad(g.square().sum(), inputs.v)
    assert strips_of(layer) == {2}
    assert relative_error(*(x.double() for x in found)) <= GRADIENT
    assert found[0].abs().max() > 0


def test_an_operator_of_a_graph_runs_in_strips_too(multiprocessors):
    """A graph knows sizes alone, and what is kept has the same for any number of strips."""
    layer = compiled(LinearAttention, {"D": 32}, chunk=16)
    inputs = short(layer)
    plain = called(layer, inputs)
    multiprocessors(2)
    graph = torch.compile(lambda q, k, v, state: layer(q, k, v, state=state), fullgraph=True, backend="aot_eager")
    z, state = graph(inputs.q, inputs.k, inputs.v, inputs.state)
    assert strips_of(layer) == {2}
    assert relative_error(z.double().cpu(), plain.z) <= OUTPUT
    assert relative_error(state["W"].double().cpu(), plain.final["W"]) <= OUTPUT
    found = torch.autograd.grad(z.square().sum(), [inputs.k])
    multiprocessors(1)
    z, _ = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    wanted = torch.autograd.grad(z.square().sum(), [inputs.k])
    assert relative_error(found[0].double(), wanted[0].double()) <= GRADIENT


# -- states that no program can hold -----------------------------------------------------------------------------------


def smaller(monkeypatch, numbers):
    """A GPU with fewer registers than there is."""
    for name in ("LARGEST_STATE", "LARGEST_STRIP"):
        monkeypatch.setattr(import_module("tttc.backends.triton.kernel_spec"), name, numbers)


def test_a_state_that_is_too_large_is_cut(monkeypatch):
    """Whatever the number of heads; it was a sequence of batched operations."""
    smaller(monkeypatch, 1024)
    layer = compiled(DeltaNet, {"D": WIDE}, chunk=16)
    scan = layer._scans["delta_net"]
    assert (scan.kernels.spec.width, scan.kernels.spec.strips) == (16, 4)
    assert "def delta_net_strip_adjoint(" in layer.source
    assert "def delta_net_adjoint(" not in layer.source
    said = " ".join(layer.explain(stages=()).replace("#", " ").split())
    assert "delta_net in 4 strips: its state of 4096 numbers is larger than the registers of one program" in said
    assert not compared(layer, short(layer, batch=2))
    assert strips_of(layer) == set()


def test_a_state_that_is_too_large_even_in_strips_is_batched(monkeypatch):
    smaller(monkeypatch, 1023)
    program = compiled(DeltaNet, {"D": WIDE}, chunk=16).stages.program
    assert "its state of 4096 numbers is larger than the registers" in unfused(program.scans[0], program)


@pytest.mark.parametrize(("D", "width"), [(128, 0), (200, 32), (256, 32), (300, 16), (512, 16)])
def test_the_widest_strip_that_fits_is_taken(D, width):
    program = tttc.compile(LinearAttention, {"D": D}, chunk=16, backend="torch").stages.program
    spec = spec_of(program.scans[0], program)
    assert spec.width == width
    assert spec.strips == (-(-D // width) if width else 1)
    assert not unfused(program.scans[0], program)


# -- when it is cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "D", "count", "tokens", "why"),
    [
        (LinearAttention, 16, 8, TOKENS, "strips that no product of matrices takes"),
        (LinearAttention, 32, 1, TOKENS, "one multiprocessor"),
        (LinearAttention, 32, 8, 15, "little to do"),
        (TTTLinear, 32, 8, TOKENS, "no free axis"),
    ],
)
def test_what_is_not_cut(multiprocessors, monkeypatch, variant, D, count, tokens, why):
    monkeypatch.setattr(import_module("tttc.backends.triton.load"), "MIN_TOKENS_TO_TILE", 16)
    multiprocessors(count)
    layer = compiled(variant, {"D": D})
    inputs = short(layer, tokens)
    with torch.no_grad():
        layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    assert strips_of(layer) == set(), why


def test_a_device_that_is_no_gpu_runs_one_program():
    assert import_module("tttc.backends.triton.load").multiprocessors(torch.device("cpu")) == 1


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("strip * 16 + tl.arange", "tl.arange"),  # every strip is the first
        ("d[:, None] * 32 + d_strip", "d[:, None] * 16 + d_strip"),  # the rows of the whole lie further apart
        (" + strip * dk_out_s", ""),  # all write to one part
    ],
)
def test_a_fault_in_a_kernel_is_found(multiprocessors, right, wrong):
    multiprocessors(2)
    layer = compiled(LinearAttention, {"D": 32}, chunk=16)
    inputs = short(layer)
    assert not compared(layer, inputs)
    (kernels,) = layer._scans["linear_attention"]._narrower.values()
    source = kernels.module.source
    assert right in source.text
    kernels.module = Module(replaced(source, right, wrong), "faulty")
    assert compared(layer, inputs)


def test_the_source_of_a_strip(golden):
    program = compiled(DeltaNet, {"D": 64}, chunk=16).stages.program
    spec = half_of(program.scans[0], program)
    assert spec is not None
    golden("triton/delta_net_strip", worded(module_text(program.name, [spec])).text)
