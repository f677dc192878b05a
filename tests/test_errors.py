"""Bad input: each kind gets an error that says what is wrong and what to do, or the right answer; never a wrong number.

The wording is that of tests/golden/errors; `--update-golden` accepts a new one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import tttc
from tests.helpers import VARIANTS, compiled, differences, inputs_for, keywords, layer_result, oracle_result
from tttc.errors import (
    BackendRefusal,
    DeclarationError,
    NonFinite,
    NotDifferentiable,
    ShapeError,
    StateMismatch,
    TTTCError,
)
from tttc.library import TTTMLP, LinearAttention, TTTLinear
from tttc.verification.comparison import OUTPUT_TOLERANCE, relative_error

GOLDEN = Path(__file__).parent / "golden"


class Case(NamedTuple):
    """A call or a declaration that is refused: a name for its golden text, what happens, and the error."""

    name: str
    run: object
    error: type[TTTCError]


def cases(**named):
    """Parameters for a test: `name=(error, function)`."""
    return [pytest.param(Case(name, run, error), id=name) for name, (error, run) in named.items()]


def refused(case, golden, run, folder="errors"):
    """The error is of the right kind, has no leftovers of the implementation, and its text is the golden one."""
    with pytest.raises(case.error) as caught:
        run()
    text = str(caught.value)
    assert not re.search(r"0x[0-9a-f]+|<locals>|object at|tttc[/.](ir|backends)", text)
    golden(f"{folder}/{case.name}", f"{type(caught.value).__name__}: {text}")


# -- calls --------------------------------------------------------------------------------------------------


def call(layer=None, **changed):
    """A good call of a layer but for what is changed; a value that is a function is applied to the good one."""
    layer = layer or compiled("TTTLinear", mini_batch=4)
    inputs = inputs_for(layer, 5, batch=2, heads=3)
    arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v} | keywords(inputs)
    for name, value in changed.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    return layer(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def state_after(**settings):
    """What a layer returns after 5 tokens of 2 batch elements and 3 heads."""
    return call(compiled("TTTLinear", **settings))[1]


def of_three(state):
    """The same state for three batch elements."""
    return state.map(lambda x: x[:1].expand(3, *x.shape[1:]))


def without(name):
    return lambda group: {n: x for n, x in group.items() if n != name}


def having(**more):
    return lambda group: {**group, **more}


def changing(name, change):
    return lambda group: {**group, name: change(group[name])}


def spoiled(value):
    """The same tensor with one entry replaced."""

    def change(x):
        x = x.detach().clone()
        x.view(-1)[3] = value
        return x

    return change


CALLS = cases(
    rank_of_q=(ShapeError, lambda: call(q=lambda q: q[0, 0])),
    rank_of_k=(ShapeError, lambda: call(k=lambda k: k[0])),
    batch=(ShapeError, lambda: call(k=lambda k: k[:1])),
    tokens=(ShapeError, lambda: call(v=lambda v: v[:, :4])),
    heads=(ShapeError, lambda: call(v=lambda v: v[:, :, :2])),
    width=(ShapeError, lambda: call(q=lambda q: q[..., :2])),
    width_of_all=(ShapeError, lambda: call(q=lambda q: q[..., :2], k=lambda k: k[..., :2], v=lambda v: v[..., :2])),
    dtype=(ShapeError, lambda: call(q=lambda q: q.float())),
    integers=(ShapeError, lambda: call(q=lambda q: q.long())),
    complex_numbers=(ShapeError, lambda: call(q=lambda q: q.to(torch.complex128))),
    a_list=(ShapeError, lambda: call(q=lambda q: q.tolist())),
    nothing=(ShapeError, lambda: call(k=None)),
    device=(ShapeError, lambda: call(q=lambda q: q.to("meta"))),
    device_of_a_gate=(ShapeError, lambda: call(gates=changing("lr", lambda x: x.to("meta")))),
    device_of_a_param=(ShapeError, lambda: call(params=changing("gamma", lambda x: x.to("meta")))),
    device_of_a_state=(ShapeError, lambda: call(state=changing("W1", lambda x: x.to("meta")))),
    gate_missing=(ShapeError, lambda: call(gates=without("lr"))),
    gates_missing=(ShapeError, lambda: call(gates=None)),
    gate_unknown=(ShapeError, lambda: call(gates=having(decay=torch.ones(2, 5, 3)))),
    gate_shape=(ShapeError, lambda: call(gates=changing("lr", lambda x: x[..., None]))),
    gate_number=(ShapeError, lambda: call(gates=having(lr=0.1))),
    param_missing=(ShapeError, lambda: call(params=without("gamma"))),
    param_unknown=(ShapeError, lambda: call(params=having(alpha=torch.ones(3)))),
    param_shape=(ShapeError, lambda: call(params=changing("gamma", lambda x: x[:, :2]))),
    param_per_batch_element=(ShapeError, lambda: call(params=changing("gamma", lambda x: x.expand(2, 3, 3)))),
    token_unknown=(ShapeError, lambda: call(tokens={"target": torch.ones(2, 5, 3, 3)})),
    state_unknown=(ShapeError, lambda: call(state=having(W2=torch.ones(3, 3)))),
    state_shape=(ShapeError, lambda: call(state=changing("W1", lambda x: x[..., :2]))),
    state_heads=(ShapeError, lambda: call(state=changing("W1", lambda x: x[:, :2]))),
    state_of_another_batch=(ShapeError, lambda: call(state=of_three(state_after(mini_batch=4)))),
    state_of_another_mini_batch=(
        StateMismatch,
        lambda: call(compiled("TTTLinear", mini_batch=1), state=state_after(mini_batch=8)),
    ),
    state_inside_a_mini_batch_read_at_its_end=(
        StateMismatch,
        lambda: call(compiled("TTTLinear", mini_batch=4, read="end"), state=state_after(mini_batch=4, read="end")),
    ),
    nan_in_lr=(NonFinite, lambda: call(gates=changing("lr", spoiled(float("nan"))), check=True)),
    infinity_in_q_and_state=(
        NonFinite,
        lambda: call(q=spoiled(float("inf")), state=changing("W1", spoiled(float("-inf"))), check=True),
    ),
)


@pytest.mark.parametrize("case", CALLS)
def test_a_call_is_refused(case, golden):
    refused(case, golden, case.run)


# -- compile ------------------------------------------------------------------------------------------------


def compile_linear(dims=None, dtype=torch.float64, variant=TTTLinear, **settings):
    return tttc.compile(variant, {"D": 3} if dims is None else dims, dtype, **settings)


COMPILES = cases(
    dim_missing=(ShapeError, lambda: compile_linear({}, variant=TTTMLP)),
    one_dim_missing=(ShapeError, lambda: compile_linear({"D": 3}, variant=TTTMLP)),
    dim_zero=(ShapeError, lambda: compile_linear({"D": 0})),
    dim_negative=(ShapeError, lambda: compile_linear({"D": -3})),
    dim_float=(ShapeError, lambda: compile_linear({"D": 3.0})),
    dim_bool=(ShapeError, lambda: compile_linear({"D": True})),
    dim_text=(ShapeError, lambda: compile_linear({"D": "3"})),
    dtype_integer=(DeclarationError, lambda: compile_linear(dtype=torch.int64)),
    backend_unknown=(BackendRefusal, lambda: compile_linear(backend="cuda")),
    chunk_zero=(ShapeError, lambda: compile_linear(chunk=0)),
    chunk_negative=(ShapeError, lambda: compile_linear(chunk=-1)),
    chunk_float=(ShapeError, lambda: compile_linear(chunk=2.0)),
    chunk_text=(ShapeError, lambda: compile_linear(chunk="auto")),
    chunk_bool=(ShapeError, lambda: compile_linear(chunk=True)),
    checkpoint_negative=(ShapeError, lambda: compile_linear(checkpoint=-1)),
    checkpoint_text=(ShapeError, lambda: compile_linear(checkpoint="all")),
    checkpoint_float=(ShapeError, lambda: compile_linear(checkpoint=1.5)),
    checkpoint_bool=(ShapeError, lambda: compile_linear(checkpoint=True)),
    setting_unknown=(DeclarationError, lambda: TTTLinear.replace(minibatch=4)),
    mini_batch_zero=(DeclarationError, lambda: compile_linear(variant=TTTLinear.replace(mini_batch=0))),
    mini_batch_float=(DeclarationError, lambda: compile_linear(variant=TTTLinear.replace(mini_batch=4.0))),
    mini_batch_text=(DeclarationError, lambda: compile_linear(variant=TTTLinear.replace(mini_batch="none"))),
    mini_batch_bool=(DeclarationError, lambda: compile_linear(variant=TTTLinear.replace(mini_batch=True))),
    read_unknown=(DeclarationError, lambda: compile_linear(variant=TTTLinear.replace(read="during"))),
    steps=(DeclarationError, lambda: compile_linear(variant=TTTLinear.replace(steps=2))),
    steps_half=(DeclarationError, lambda: compile_linear(variant=TTTLinear.replace(steps=1.5))),
    anchor_token=(DeclarationError, lambda: compile_linear(variant=TTTLinear.replace(anchor="token"))),
    anchor_unknown=(DeclarationError, lambda: compile_linear(variant=TTTLinear.replace(anchor="chunk"))),
    update_unknown=(DeclarationError, lambda: compile_linear(variant=TTTLinear.replace(update=0.1))),
)


@pytest.mark.parametrize("case", COMPILES)
def test_a_compilation_is_refused(case, golden):
    refused(case, golden, case.run)


# -- declarations -------------------------------------------------------------------------------------------


class Good(tttc.Variant):
    """What the declarations below change in one place."""

    W = tttc.state("D", "D")

    def learner(self, x):
        return x @ self.W

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


class ManyMistakes(Good):
    """Six problems, none of which hides another."""

    mini_batch = 0
    read = "sometimes"
    W = tttc.state("key width", "D")
    B = tttc.state("T")
    speed = tttc.gate("my rate")
    output = tttc.param("D")
    update = tttc.sgd(lr={"W": 0.1})


class BothFunctionsWrong(Good):
    """A mistake in `loss` does not hide one in `output`."""

    W2 = tttc.state("D", "F")

    def loss(self, k, v):
        return tttc.sum(k @ self.W2 - v)

    def output(self, q):
        return q @ self.W2 @ self.W


class NoState(tttc.Variant):
    def learner(self, x):
        return x

    def loss(self, k, v):
        return tttc.dot(k, v)


class NoLearner(tttc.Variant):
    W = tttc.state("D", "D")


class NoLoss(tttc.Variant):
    W = tttc.state("D", "D")

    def learner(self, x):
        return x @ self.W


class ShapesInLearner(Good):
    W2 = tttc.state("D", "F")

    def learner(self, x):
        h = x @ self.W2
        return tttc.tanh(h) + x


class ContractionInLearner(Good):
    W2 = tttc.state("D", "F")

    def learner(self, x):
        return x @ self.W2 @ self.W


class PythonIf(Good):
    def learner(self, x):
        z = x @ self.W
        return z if tttc.sum(z) > 0 else -z


class Indexing(Good):
    def learner(self, x):
        return x[0] * self.W


class Looping(Good):
    def learner(self, x):
        return sum(w for w in x @ self.W)


class AsNumber(Good):
    def learner(self, x):
        return x @ self.W * float(tttc.sum(x))


class OwnMethod(Good):
    def learner(self, x):
        return (x @ self.W).relu()


class VectorLoss(Good):
    def loss(self, k, v):
        return (self.learner(k) - v) ** 2


class LossWithoutState(Good):
    def loss(self, k, v):
        return tttc.dot(k, v)


class LossOfNothing(Good):
    def loss(self, k, v):
        return None


class UnknownAttribute(Good):
    def learner(self, x):
        return x @ self.W + self.bias


class RaisesItself(Good):
    def learner(self, x):
        raise RuntimeError("not today")


class NormWithoutEps(Good):
    def learner(self, x):
        return tttc.l2_norm(x @ self.W)


class TorchFunction(Good):
    def learner(self, x):
        return torch.tanh(x @ self.W)


class TensorConstant(Good):
    def learner(self, x):
        return x @ self.W + torch.ones(3)


class GateTwice(Good):
    mask = tttc.gate("lr", per="channel")


class GateAsRatePerChannel(Good):
    update = tttc.sgd(lr=tttc.gate("lr", per="channel", axis="F"))


class RateOfOneStateMissing(Good):
    b = tttc.state("D")
    update = tttc.sgd(lr={"W": tttc.gate("lr")})


class RateOfUnknownState(Good):
    update = tttc.sgd(lr={"W": 0.1, "V": 0.1})


class RateIsText(Good):
    update = tttc.sgd(lr="fast")


class RateIsVectorParam(Good):
    rate = tttc.param("D", init=0.1)
    update = tttc.sgd(lr=rate)


class RateIsStrayParam(Good):
    update = tttc.sgd(lr=tttc.param(init=0.1))


class NonsenseElementwise(Good):
    def learner(self, x):
        import sympy

        return tttc.elementwise(sympy.gamma(sympy.Symbol("a")))(x @ self.W)


def compiling(variant):
    return lambda: tttc.compile(variant, {"D": 3, "F": 4}, torch.float64)


DECLARATIONS = cases(
    many_mistakes=(DeclarationError, compiling(ManyMistakes)),
    both_functions_wrong=(DeclarationError, compiling(BothFunctionsWrong)),
    no_state=(DeclarationError, compiling(NoState)),
    no_learner=(DeclarationError, compiling(NoLearner)),
    no_loss=(DeclarationError, compiling(NoLoss)),
    shapes_in_learner=(DeclarationError, compiling(ShapesInLearner)),
    contraction_in_learner=(DeclarationError, compiling(ContractionInLearner)),
    python_if=(DeclarationError, compiling(PythonIf)),
    indexing=(DeclarationError, compiling(Indexing)),
    looping=(DeclarationError, compiling(Looping)),
    as_number=(DeclarationError, compiling(AsNumber)),
    own_method=(DeclarationError, compiling(OwnMethod)),
    vector_loss=(DeclarationError, compiling(VectorLoss)),
    loss_without_state=(NotDifferentiable, compiling(LossWithoutState)),
    loss_of_nothing=(DeclarationError, compiling(LossOfNothing)),
    unknown_attribute=(DeclarationError, compiling(UnknownAttribute)),
    raises_itself=(DeclarationError, compiling(RaisesItself)),
    norm_without_eps=(DeclarationError, compiling(NormWithoutEps)),
    torch_function=(DeclarationError, compiling(TorchFunction)),
    tensor_constant=(DeclarationError, compiling(TensorConstant)),
    gate_twice=(DeclarationError, compiling(GateTwice)),
    gate_as_rate_per_channel=(DeclarationError, compiling(GateAsRatePerChannel)),
    rate_of_one_state_missing=(DeclarationError, compiling(RateOfOneStateMissing)),
    rate_of_unknown_state=(DeclarationError, compiling(RateOfUnknownState)),
    rate_is_text=(DeclarationError, compiling(RateIsText)),
    rate_is_vector_param=(DeclarationError, compiling(RateIsVectorParam)),
    rate_is_stray_param=(DeclarationError, compiling(RateIsStrayParam)),
    nonsense_elementwise=(DeclarationError, compiling(NonsenseElementwise)),
)


@pytest.mark.parametrize("case", DECLARATIONS)
def test_a_declaration_is_refused(case, golden):
    refused(case, golden, case.run)


def message(variant):
    with pytest.raises(TTTCError) as caught:
        compiling(variant)()
    return str(caught.value)


def test_all_problems_are_reported_at_once():
    text = message(ManyMistakes)
    assert "has 6 problems" in text
    for word in (
        "mini_batch is 0",
        "read is 'sometimes'",
        "param `output` is also",
        "('key width', 'D')",
        "gate `my rate`",
        "lr is given for W",
    ):
        assert word in text


def test_the_file_of_a_class_is_parsed_for_a_problem_only(monkeypatch):
    """That takes ten times as long as tracing a small class."""
    for module in ("rule_checks", "value_checks"):
        monkeypatch.setattr(f"tttc.declare.{module}.class_line", lambda variant: 1 / 0)
    assert not tttc.check(LinearAttention)
    with pytest.raises(ZeroDivisionError):
        tttc.check(LinearAttention.replace(read="sometimes"))


def test_a_shape_error_names_the_line_and_both_shapes():
    text = message(ShapesInLearner)
    assert "return tttc.tanh(h) + x" in text
    assert "[F]" in text
    assert "[D]" in text
    assert re.search(r"test_errors\.py:\d+", text)
    line, caret = next((a, c) for a, c in zip(text.splitlines(), text.splitlines()[1:], strict=False) if "^" in c)
    assert line[caret.index("^") : caret.rindex("^") + 1] == "tttc.tanh(h) + x"


def test_check_lists_the_problems_without_compiling():
    assert tttc.check(Good) == []
    assert len(tttc.check(ManyMistakes)) == 6
    assert len(tttc.check(BothFunctionsWrong)) == 2
    assert len(tttc.check(LossWithoutState)) == 1
    for variant in VARIANTS.values():
        assert tttc.check(variant) == []


@pytest.mark.parametrize("error", [ShapeError, StateMismatch, NonFinite])
def test_wrong_values_are_value_errors(error):
    assert issubclass(error, ValueError)
    assert issubclass(error, TTTCError)


# -- input that is unusual, and right -----------------------------------------------------------------------


def test_nan_without_check_is_nan_where_it_is_seen():
    """A NaN learning rate of the second mini-batch poisons what comes after it, and nothing before."""
    z, state = call(gates=changing("lr", lambda x: poisoned_token(x, 4)))
    assert torch.isfinite(z[:, :4]).all()
    assert torch.isnan(z[0, 4, 0]).all()
    assert torch.isfinite(z[1]).all()
    assert torch.isnan(state["b1"][0, 0]).all()
    assert torch.isfinite(state["b1"][1]).all()


def poisoned_token(x, t):
    x = x.detach().clone()
    x[0, t, 0] = float("nan")
    return x


@pytest.mark.parametrize("name", VARIANTS)
def test_non_contiguous_inputs(name):
    """Every input a transposed view of memory in another order; the gradients too."""
    layer = compiled(name, mini_batch=4)
    inputs = inputs_for(layer, 6, batch=2, heads=3)
    plain = layer_result(layer, inputs)
    turned = {kind: scattered(getattr(inputs, kind)) for kind in ("q", "k", "v", "gates", "params", "state")}
    z, state = layer(turned.pop("q"), turned.pop("k"), turned.pop("v"), **turned)
    assert relative_error(z, plain.z) <= OUTPUT_TOLERANCE
    for n, w in plain.final.items():
        assert relative_error(state[n], w) <= OUTPUT_TOLERANCE


def scattered(x):
    """The same values with strides in the reverse order and gaps between them."""
    if isinstance(x, dict):
        return {n: scattered(y) for n, y in x.items()}
    wide = torch.full((*x.shape[::-1], 2), float("nan"), dtype=x.dtype)
    wide[..., 0] = x.detach().permute(*reversed(range(x.dim())))
    found = wide[..., 0].permute(*reversed(range(x.dim())))
    assert x.dim() < 2 or not found.is_contiguous()
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_expanded_inputs(name):
    """Views that repeat memory (stride 0) are read, never written, and get the sum of the gradients."""
    layer = compiled(name, mini_batch=4)
    inputs = inputs_for(layer, 6, batch=2, heads=3)
    one = inputs.k.detach()[:, :1, :1].clone().requires_grad_()
    wide = inputs.__class__(**{**vars(inputs), "k": one.expand_as(inputs.k)})
    assert not differences(layer_result(layer, wide), oracle_result(layer.signature.variant, wide))


@pytest.mark.parametrize("name", VARIANTS)
def test_inputs_are_left_alone(name):
    """No tensor of a call is changed, by the forward or by the backward."""
    layer = compiled(name, mini_batch=4)
    inputs = inputs_for(layer, 6)
    before = {n: x.detach().clone() for n, x in inputs.named().items()}
    layer_result(layer, inputs)
    for n, x in inputs.named().items():
        assert torch.equal(x, before[n])
        assert x.grad is None


def test_returned_tensors_are_not_the_inputs():
    """Writing into a result in place must not reach back into the caller's state, or into the next call."""
    layer = compiled("LinearAttention", mini_batch=4)
    inputs = inputs_for(layer, 4)
    with torch.no_grad():
        first, state = layer(inputs.q, inputs.k, inputs.v, state=inputs.state)
        state["W"].fill_(0.0)
        again, _ = layer(inputs.q, inputs.k, inputs.v, state=inputs.state)
    assert torch.equal(first, again)


def test_params_and_state_may_be_left_out():
    """They start at their declared `init`."""
    layer = compiled("TTTLinear", mini_batch=4)
    inputs = inputs_for(layer, 6)
    z, _ = layer(inputs.q, inputs.k, inputs.v, gates=inputs.gates)
    given, _ = layer(
        inputs.q, inputs.k, inputs.v, gates=inputs.gates, params=layer.init_params(), state=layer.init_state()
    )
    assert torch.equal(z, given)


def test_inputs_of_lower_precision():
    """bfloat16 in and out, float32 within: no worse than the rounding of inputs and outputs to 8 bits, 1.5e-2 in
    all.
    """
    layer = tttc.compile(LinearAttention, {"D": 16}, torch.bfloat16)
    inputs = inputs_for(compiled("LinearAttention", D=16), 40)
    q, k, v = (x.detach().to(torch.bfloat16) for x in (inputs.q, inputs.k, inputs.v))
    state = {n: w.detach().float() for n, w in inputs.state.items()}
    z, final = layer(q, k, v, state=state)
    assert z.dtype == torch.bfloat16
    assert final["W"].dtype == torch.float32
    wanted = oracle_result(LinearAttention, inputs)
    assert relative_error(z.double(), wanted.z) <= 1.5e-2


def test_float32():
    """5e-6: float32 rounds at 6e-8, over a few dozen dependent steps."""
    for name, variant in VARIANTS.items():
        exact = compiled(name, D=16, mini_batch=4)
        inputs = inputs_for(exact, 20)
        layer = tttc.compile(variant.replace(mini_batch=4), exact.dims, torch.float32)
        single = {kind: narrowed(getattr(inputs, kind)) for kind in ("q", "k", "v", "gates", "params", "state")}
        z, _ = layer(single.pop("q"), single.pop("k"), single.pop("v"), **single)
        assert z.dtype == torch.float32
        assert relative_error(z.double(), layer_result(exact, inputs).z) <= 5e-6, name


def narrowed(x):
    return {n: narrowed(y) for n, y in x.items()} if isinstance(x, dict) else x.detach().float()


def test_every_golden_text_has_a_case():
    """A text that no case produces any more would be read by nobody."""
    names = {parameter.values[0].name for parameter in (*CALLS, *COMPILES, *DECLARATIONS)}
    assert {path.stem for path in (GOLDEN / "errors").glob("*.txt")} == names
