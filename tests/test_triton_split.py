"""The Triton backend where heads are few and no axis is free: the carry chunk after chunk, the outputs all at once."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from tests.helpers import LIBRARY, differences, dims_of, inputs_for, keywords, oracle_result
from tests.test_triton import DEVICE, GRADIENT, OUTPUT, called, compiled, converted
from tttc.backends.triton.emit import module_text
from tttc.backends.triton.kernel_spec import spec_of, split_state_output
from tttc.ir.names import worded
from tttc.ir.program import SEQUENCE
from tttc.ir.split import split
from tttc.library import TTTMLP, LinearAttention, TTTLinear
from tttc.verification.comparison import relative_error

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="there is no triton for this platform"),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def many_multiprocessors(monkeypatch):
    load = import_module("tttc.backends.triton.load")
    monkeypatch.setattr(load, "MIN_TOKENS_TO_TILE", 1)
    monkeypatch.setattr(load, "multiprocessors", lambda device: 100)


@pytest.fixture
def launched(monkeypatch):
    """The names of the scans whose forward kernels ran."""
    names = []
    kernels = import_module("tttc.backends.triton.load").Kernels
    launch = kernels.launch

    def watched(self, backward, *rest):
        if not backward:
            names.append(self.spec.scan.name)
        return launch(self, backward, *rest)

    monkeypatch.setattr(kernels, "launch", watched)
    return names


def compared(layer, inputs):
    wanted = oracle_result(layer.signature.variant, converted(inputs, torch.float64, "cpu"))
    return differences(called(layer, inputs), wanted, OUTPUT, GRADIENT)


@pytest.mark.parametrize("checkpoint", [0, 1, 2, None])
@pytest.mark.parametrize("variant", [TTTLinear, TTTMLP])
def test_outputs_states_and_gradients_are_those_of_the_oracle(launched, variant, checkpoint):
    """Four chunks and a tail; some carries or all of them kept for the backward; and the cheaper in a batch."""
    layer = compiled(variant, dims_of(variant, 16), checkpoint=checkpoint)
    batch, heads = (2, 3) if variant is TTTLinear else (1, 2)
    assert not compared(layer, converted(inputs_for(layer, 69, batch=batch, heads=heads), torch.float32, DEVICE))
    assert launched[:2] == [f"{layer._name}_states", f"{layer._name}_outputs"]


def test_tokens_in_sixteen_bits(launched):
    layer = compiled(TTTLinear, {"D": 24}, torch.bfloat16)
    inputs = converted(inputs_for(layer, 69), torch.bfloat16, DEVICE)
    wanted = oracle_result(TTTLinear, converted(inputs, torch.float64, "cpu"))
    found = called(layer, inputs)
    assert not differences(found, wanted, 1.5e-2, 3e-2)
    assert f"{layer._name}_outputs" in launched


def test_without_gradients_nothing_is_kept(launched):
    layer = compiled(TTTLinear, {"D": 16})
    inputs = converted(inputs_for(layer, 48), torch.float32, DEVICE)
    with torch.no_grad():
        z, _ = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    assert launched[:2] == [f"{layer._name}_states", f"{layer._name}_outputs"]
    wanted = oracle_result(TTTLinear, converted(inputs, torch.float64, "cpu")).z
    assert relative_error(z.double().cpu(), wanted) <= OUTPUT


def test_one_chunk_and_free_axes_are_not_split(launched):
    layer = compiled(TTTLinear, {"D": 16})
    layer(
        *(torch.randn(1, 16, 1, 16, device=DEVICE) for _ in "qkv"),
        gates={n: torch.ones(1, 16, 1, device=DEVICE) for n in layer.signature.gates},
    )
    free = compiled(LinearAttention, {"D": 64}, chunk=16)
    free(*(torch.randn(1, 48, 1, 64, device=DEVICE) for _ in "qkv"))
    assert not any(name.endswith("_outputs") for name in launched)


def test_what_the_chunks_wait_for(golden):
    """Both kernels, as they are written."""
    program = compiled(TTTLinear, {"D": 64}).stages.program
    specs = split_state_output(spec_of(program.scans[0], program))
    assert specs is not None
    states, outputs = specs
    assert [p.name for p in outputs.scan.sequence] == [p.name for p in program.scans[0].sequence]
    assert "q" not in {p.name for p in states.scan.sequence}
    golden("triton/ttt_linear_split", worded(module_text("ttt_linear", specs)).text)


@pytest.mark.parametrize("name", LIBRARY)
def test_a_split_scan_has_all_results(name):
    """Each of them once, and whatever is carried."""
    program = compiled(LIBRARY[name], dims_of(LIBRARY[name], 16)).stages.program
    for scan in program.scans:
        if (found := split(scan)) is None:
            assert not scan.loops or scan.chunk is SEQUENCE or not scan.outputs or not scan.updates
            continue
        assert found.outputs.outputs == scan.outputs
        assert found.states.updates == scan.updates
        assert found.states.carry == scan.carry
        assert 0 <= found.saved(program.dims) < 1
