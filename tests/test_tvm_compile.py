"""How the TVM backend makes its kernels: tiles that fit the registers, each kernel once, and none too early."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import pytest
import torch

import tttc
from tests.helpers import inputs_for, layer_result
from tttc.library import LinearAttention

pytestmark = pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))


@pytest.fixture
def load():
    return importlib.import_module("tttc.backends.tvm_cpu.scan")


@pytest.fixture
def built(load, monkeypatch):
    """The names of the kernels that LLVM has compiled."""
    names = []

    def counted(kernel, build=load.build):
        names.append(kernel.name)
        return build(kernel)

    monkeypatch.setattr(load, "build", counted)
    return names


# -- tiles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [16, 32])
@pytest.mark.parametrize("rows", [None, 1, 2, 3, 5, 16, 17, 64, 96])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 8, 11, 32])
def test_a_tile_and_what_it_multiplies_fit_the_registers(registers, rows, vectors):
    machine = importlib.import_module("tttc.backends.tvm_cpu.machine").Machine("float32", 8, registers)
    high, wide = machine.micro_kernel(rows, vectors)
    assert 1 <= high <= (rows or 8)
    assert 1 <= wide <= vectors
    assert high * wide + wide + 1 <= registers


@pytest.mark.parametrize(("registers", "rows", "vectors", "tile"), [(16, 16, 8, (4, 2)), (32, 64, 4, (4, 4))])
def test_a_tile_divides_its_rows_and_keeps_the_multipliers_busy(registers, rows, vectors, tile):
    machine = importlib.import_module("tttc.backends.tvm_cpu.machine").Machine("float32", 8, registers)
    assert machine.micro_kernel(rows, vectors) == tile


# -- when, and how often -----------------------------------------------------------------------------------------------


def test_the_backward_is_compiled_beside_the_forward_and_once(built):
    layer = tttc.compile(LinearAttention, {"D": 3}, torch.float64, backend="tvm")
    layer_result(layer, inputs_for(layer, 5))
    layer_result(layer, inputs_for(layer, 5))
    assert sorted(built) == ["linear_attention", "linear_attention_adjoint"]


def test_without_gradients_no_backward_is_compiled_and_no_carry_kept(built):
    """The same bits as with gradients, where the carry of every group of chunks is kept."""
    layer = tttc.compile(LinearAttention, {"D": 3}, torch.float64, backend="tvm", chunk=2)
    inputs = inputs_for(layer, 7)
    with torch.no_grad():
        z, state = layer(inputs.q, inputs.k, inputs.v, gates=inputs.gates, params=inputs.params, state=inputs.state)
    assert built == ["linear_attention"]
    again, kept = layer(inputs.q, inputs.k, inputs.v, gates=inputs.gates, params=inputs.params, state=inputs.state)
    again.sum().backward()
    assert torch.equal(z, again)
    assert torch.equal(state.W, kept.W)


def test_a_kernel_that_was_linked_is_not_compiled_again_by_another_layer(built):
    for _ in range(2):
        layer = tttc.compile(LinearAttention, {"D": 4}, torch.float64, backend="tvm")
        layer_result(layer, inputs_for(layer, 3))
    assert len(built) == 2


def test_the_source_is_what_is_compiled_and_is_written_when_it_is_asked_for(load, monkeypatch):
    written, compiled = [], []

    def kernel(self, backward, stored, make=load.CPUScan.kernel):
        written.append(backward)
        return make(self, backward, stored)

    def build(kernel, build=load.build):
        compiled.append(str(kernel.function.script()))
        return build(kernel)

    monkeypatch.setattr(load.CPUScan, "kernel", kernel)
    layer = tttc.compile(LinearAttention, {"D": 3}, torch.float64, backend="tvm")
    assert "linear_attention" in layer.stages["emit"].text
    assert not written
    source = layer.source
    assert written == [False, True, False]  # of chunks, both ways, and of a single token
    monkeypatch.setattr(load, "build", build)
    layer_result(layer, inputs_for(layer, 5))
    assert len(compiled) == 2
    assert all(text in source for text in compiled)
