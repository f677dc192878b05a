"""The graphs of ONNX: every library variant through ONNX Runtime, at lengths and cuts that meet no chunk."""

from __future__ import annotations

import pytest
import torch

import tttc
from tests.helpers import (
    LIBRARY,
    Result,
    differences,
    dims_of,
    inputs_for,
    keywords,
    oracle_result,
    run_alone,
    split_call,
)
from tttc.backends.onnx.emit import OPSET
from tttc.backends.scan import NotBuilt
from tttc.errors import BackendRefusal
from tttc.library import DeltaNet, GatedDeltaNet, TTTLinear
from tttc.verification.inputs import Inputs

onnx = pytest.importorskip("onnx", reason="onnx is an extra: pip install 'tttc[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is an extra: pip install 'tttc[onnx]'")

SHORT = 4  # tokens of a mini-batch that has more
TOLERANCE = 1e-5
WORSE = {"LaCT": 4e-5}  # Muon magnifies: in float32 the definition itself is off by 1.3e-5 here


class OwnLearner(tttc.Variant):
    """A formula of its own, names that are words of ONNX, and a token per mini-batch that differs from call to call."""

    mini_batch = 3
    If = tttc.state("D", "F", init=tttc.normal(0.5))
    Identity = tttc.state("F", "D", init=tttc.normal(0.5))
    été = tttc.state("D")

    def learner(self, x):
        return tttc.softplus(x @ self.If) @ self.Identity + self.été

    def loss(self, k, v):
        return 0.1 * tttc.sum(tttc.huber(self.learner(k) - v, 0.7))

    update = tttc.sgd(lr=tttc.gate("lr"), momentum=tttc.gate("Scan"), decay=0.9)


VARIANTS = {**LIBRARY, "OwnLearner": OwnLearner}


def compiled(name):
    variant = VARIANTS[name]
    long = isinstance(variant.mini_batch, int) and variant.mini_batch > SHORT
    variant = variant.replace(mini_batch=SHORT) if long else variant
    return tttc.compile(variant, dims_of(variant, 3, 5), torch.float32, backend="onnx")


def given(inputs: Inputs) -> Inputs:
    return inputs.map(lambda x: x.detach().float())


def forward(wanted: Result) -> Result:
    return wanted._replace(gradients={})


def called(layer, inputs: Inputs, cuts=None) -> Result:
    single = given(inputs)
    z, state = (
        layer(single.q, single.k, single.v, **keywords(single)) if cuts is None else split_call(layer, single, cuts)
    )
    return Result(z.double(), {n: x.double() for n, x in dict(state).items()}, {})


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name):
    """The call as a whole, without a token, and cut into single tokens and others where the rule may be cut."""
    layer, allowed = compiled(name), WORSE.get(name, TOLERANCE)
    for tokens in (10, 1, SHORT, 0):
        inputs = inputs_for(layer, tokens, batch=2, heads=2)
        wanted = forward(oracle_result(layer.signature.variant, inputs))
        assert differences(called(layer, inputs), wanted, allowed, allowed) == ""
    inputs = inputs_for(layer, 10, heads=2)
    wanted = forward(oracle_result(layer.signature.variant, inputs))
    if layer.signature.mini_batch != "all" and layer.signature.read != "end":
        assert differences(called(layer, inputs, (1, 2, 7, 7)), wanted, allowed, allowed) == ""


def test_a_chunk_reads_like_its_mathematics(golden):
    golden("onnx/ttt_linear", tttc.compile(TTTLinear, {"D": 64}, backend="onnx").source)


@pytest.mark.parametrize("variant", [TTTLinear, DeltaNet])
def test_models_are_checked_and_equal_every_time(variant):
    texts = [tttc.compile(variant, {"D": 8}, backend="onnx").source for _ in range(2)]
    assert texts[0] == texts[1]
    for text in texts[0].split("# scan ")[1:]:
        model = onnx.parser.parse_model(text.partition("\n")[2])
        onnx.checker.check_model(model, full_check=True)
        operator = {"com.microsoft": 1} if "LinearAttention <" in text else {}
        assert {i.domain: i.version for i in model.opset_import} == {"": OPSET, "tttc": 1} | operator


def test_a_system_as_long_as_the_call():
    """Its length, and so how many factors its solution has, is known from the call alone."""
    variant = GatedDeltaNet.replace(mini_batch="all", read="end")
    layer = tttc.compile(variant, {"D": 3, "E": 3}, torch.float32, backend="onnx")
    for tokens in (1, 2, 3, 5, 33):
        inputs = inputs_for(layer, tokens)
        wanted = forward(oracle_result(variant, inputs))
        assert differences(called(layer, inputs), wanted, TOLERANCE, TOLERANCE) == ""


def test_what_it_cannot_do_is_said():
    with pytest.raises(BackendRefusal, match=r"it computes in float32: compile with dtype=torch\.float32"):
        tttc.compile(TTTLinear, {"D": 4}, torch.float64, backend="onnx")
    layer = compiled("TTTLinear")
    single = given(inputs_for(layer, 5)).map(torch.Tensor.requires_grad_)
    z, _ = layer(single.q, single.k, single.v, **keywords(single))
    with pytest.raises(NotBuilt, match=r"ttt_linear.*runs forward alone; train the layer with backend='auto'"):
        z.sum().backward()


def test_a_call_without_tokens_ends_well():
    """A Scan with nothing to do would stop the process; so this is another one."""
    script = (
        "import torch, tttc\n"
        "layer = tttc.compile(tttc.library.TTTLinear, {'D': 4}, backend='onnx')\n"
        "for tokens in (0, 15, 16, 33):\n"
        "    q, gates = torch.zeros(1, tokens, 1, 4), {n: torch.ones(1, tokens, 1) for n in layer.signature.gates}\n"
        "    assert layer(q, q, q, gates=gates)[0].shape == q.shape\n"
    )
    run_alone(script)
