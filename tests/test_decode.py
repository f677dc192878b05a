"""One token at a time, where no gradient is asked for: the kernel of one token against the oracle of the sequence."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import tttc
from tests.helpers import CAUSAL_READS, LIBRARY, MINI_BATCHES, VARIANTS, dims_of, inputs_for, keywords, split_call
from tttc.declare.read import signature
from tttc.ir.program import ScanKind
from tttc.reference import reference
from tttc.verification.comparison import OUTPUT_TOLERANCE, relative_error

TOKENS = 10  # two mini-batches of 4 and half of one
CAUSAL = [n for n, v in LIBRARY.items() if signature(v).read != "end"]
NATIVE = pytest.param("tvm", marks=pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is not installed"))


class Counted:
    """A scan that notes its runs."""

    def __init__(self, name, scan, runs):
        self.name, self.scan, self.runs = name, scan, runs

    def forward(self, inputs, checkpoint):
        self.runs.append(self.name)
        return self.scan.forward(inputs, checkpoint)


def decoded(variant, backend="torch"):
    """How outputs and last weights differ from the oracle's, and the scans that ran, in their order."""
    layer = tttc.compile(variant, dims_of(variant, 3, 4), torch.float64, backend=backend, decode="sums")
    runs: list[str] = []
    layer._scans = {n: Counted(n.removeprefix(f"{layer._name}_"), s, runs) for n, s in layer._scans.items()}
    inputs = inputs_for(layer, TOKENS, batch=2, heads=2)
    wanted, final = reference(variant, inputs.q, inputs.k, inputs.v, **keywords(inputs))
    with torch.no_grad():
        z, state = split_call(layer, inputs, range(1, TOKENS))
    errors = {"z": relative_error(z, wanted)} | {n: relative_error(state[n], w) for n, w in final.items()}
    return {n: e for n, e in errors.items() if not e <= OUTPUT_TOLERANCE}, runs


@pytest.mark.parametrize("name", CAUSAL)
def test_every_variant(name):
    short = signature(LIBRARY[name]).mini_batch != 1
    variant = LIBRARY[name].replace(mini_batch=4) if short else LIBRARY[name]
    wrong, runs = decoded(variant)
    assert wrong == {}
    assert "token" in runs


@pytest.mark.parametrize("backend", ["torch", NATIVE])
@pytest.mark.parametrize("name", ["TTTLinear", "Titans", "GatedDeltaNet", "MomentumDeltaNet"])
def test_one_kernel_for_a_token(name, backend):
    """And one before the first, where something beside the weights begins."""
    wrong, runs = decoded(
        LIBRARY[name].replace(mini_batch=4) if name in ("TTTLinear", "Titans") else LIBRARY[name], backend
    )
    assert wrong == {}
    assert [r for r in runs if r != "begin"] == ["token"] * TOKENS
    assert runs.count("begin") <= 1


@pytest.mark.parametrize("read", CAUSAL_READS)
@pytest.mark.parametrize("mini_batch", MINI_BATCHES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_rule_of_reading(name, mini_batch, read):
    wrong, _ = decoded(LIBRARY[name].replace(mini_batch=mini_batch, read=read))
    assert wrong == {}


def test_what_else_ends_with_a_mini_batch():
    """The last token of a mini-batch that changes a momentum, a norm or an accumulator is left to open and close."""
    wrong, runs = decoded(LIBRARY["LaCT"].replace(mini_batch=4))
    assert wrong == {}
    assert runs[:6] == ["begin", "token", "token", "token", "open", "close"]


def test_gradients_go_through_the_scans_that_have_an_adjoint():
    variant = LIBRARY["TTTLinear"].replace(mini_batch=4)
    layer = tttc.compile(variant, dims_of(variant, 3), torch.float64, decode="sums")
    inputs = inputs_for(layer, 1)
    z, _ = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    (found,) = torch.autograd.grad(z.sum(), [inputs.state["W1"]])
    wanted, _ = reference(variant, inputs.q, inputs.k, inputs.v, **keywords(inputs))
    assert relative_error(found, torch.autograd.grad(wanted.sum(), [inputs.state["W1"]])[0]) < OUTPUT_TOLERANCE


def test_nothing_reads_the_end_before_it_is_there():
    program = tttc.compile(LIBRARY["TTTLinear"].replace(read="end"), {"D": 3}).stages.program
    assert program.scan(ScanKind.TOKEN) is None
