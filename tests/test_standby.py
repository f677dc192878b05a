"""A kernel that cannot be made: an error for a backend asked for by name, for "auto" PyTorch, which says so."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

import tttc
from tests.helpers import differences, inputs_for, layer_result, oracle_result
from tttc.backends.scan import NotBuilt
from tttc.errors import FallbackWarning
from tttc.library import LinearAttention

pytestmark = pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")
DIMS = {"D": 2}
VARIANT = LinearAttention


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """A kernel that was kept is not made."""
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TTTC_BACKEND", raising=False)


def broken(monkeypatch, *directions):
    """The builder of kernels raises, forwards or backwards."""
    scan = import_module("tttc.backends.tvm_cpu.scan")
    made = scan.CPUScan.kernel

    def kernel(self, backward, stored):
        if backward in directions:
            raise KeyError("an operation that nobody thought of")
        return made(self, backward, stored)

    monkeypatch.setattr(scan.CPUScan, "kernel", kernel)


@pytest.mark.parametrize("directions", [(False,), (True,), (False, True)])
def test_auto_goes_on_with_torch_and_says_so(monkeypatch, directions):
    broken(monkeypatch, *directions)
    layer = tttc.compile(VARIANT, DIMS, torch.float64, checkpoint=2, chunk=2)
    inputs = inputs_for(layer, 9, heads=2)
    with pytest.warns(
        FallbackWarning, match="torch runs what tvm cannot: the kernel `linear_attention.*KeyError"
    ) as said:
        found = layer_result(layer, inputs)
    assert len(said) == 1
    assert not differences(found, oracle_result(VARIANT, inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert not differences(layer_result(layer, inputs), found)


def test_a_backend_that_was_asked_for_by_name_says_which_kernel_and_why(monkeypatch):
    broken(monkeypatch, False)
    layer = tttc.compile(VARIANT, DIMS, torch.float64, backend="tvm")
    with pytest.raises(NotBuilt, match=r"`linear_attention` could not be made \(KeyError: .*nobody thought of"):
        layer_result(layer, inputs_for(layer, 9))


def test_half_precision_keeps_its_dtypes(monkeypatch):
    """What a kernel reads and writes in 16 bits PyTorch takes and gives in 16 bits."""
    layers = [tttc.compile(VARIANT, DIMS, torch.bfloat16, backend=b) for b in ("tvm", "torch")]
    inputs = inputs_for(layers[0], 9)
    q, k, v = (x.detach().to(torch.bfloat16).requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    gates = {n: x.detach().float() for n, x in inputs.gates.items()}
    broken(monkeypatch, False, True)
    auto = tttc.compile(VARIANT, DIMS, torch.bfloat16)
    with pytest.warns(FallbackWarning):
        z, state = auto(q, k, v, gates=gates)
    found = torch.autograd.grad(z.float().sum(), (q, k, v))
    wanted_z, wanted = layers[1](q, k, v, gates=gates)
    assert z.dtype == torch.bfloat16
    assert all(g.dtype == torch.bfloat16 for g in found)
    assert torch.allclose(z.float(), wanted_z.float(), rtol=2e-2, atol=2e-2)
    assert torch.allclose(state["W"], wanted["W"], rtol=2e-2, atol=2e-2)
