"""Errors at the right place: bad values are refused before they are used, a refusal underlines the line that it means,
and what does not exist is told from what is not declared. The wording is that of tests/golden/values.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tttc
from tests.test_errors import GOLDEN, cases, refused
from tttc.errors import DeclarationError, NotDualizable, ShapeError, StateMismatch, TTTCError
from tttc.library import DeltaNet, TTTLinear

NAN, INFINITY = float("nan"), float("inf")


class Memory(tttc.Variant):
    """What the declarations below change in one place."""

    mini_batch = 4
    W = tttc.state("D", "D")

    def learner(self, x):
        return x @ self.W

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


def compiled(variant, **settings):
    return tttc.compile(variant, {"D": 3}, backend="torch", **settings)


def having(**changed):
    """Compile the declaration with these attributes; a function makes the value when it is asked for."""

    def run():
        made = {n: value() if n in ("W", "update", "g", "lr") else value for n, value in changed.items()}
        return compiled(type("Changed", (Memory,), made))

    return run


def initial(init):
    return lambda: compiled(type("Changed", (Memory,), {"W": tttc.state("D", "D", init=init)})).init_state()


def short_of_one(shape):
    return torch.zeros(shape)


def zeros_of_numpy(shape, generator):
    return np.zeros(shape)


def zeros_of_two(shape, generator):
    return torch.zeros(2)


def another_decode():
    x, gates = torch.randn(1, 6, 1, 3), {n: torch.rand(1, 6, 1) for n in ("lr", "tau")}
    rows, sums = (compiled(TTTLinear.replace(mini_batch=4), decode=d) for d in ("rows", "sums"))
    sums(x, x, x, gates=gates, state=rows(x, x, x, gates=gates)[1])


VALUES = cases(
    instance_for_the_class=(DeclarationError, lambda: compiled(DeltaNet())),
    instance_for_the_class_in_verify=(DeclarationError, lambda: tttc.verify(Memory())),
    name_for_the_class=(DeclarationError, lambda: compiled("delta_net")),
    name_for_the_class_in_check=(DeclarationError, lambda: tttc.check("TTTLiner")),
    another_class=(DeclarationError, lambda: tttc.tune(torch.nn.Linear, {"D": 3})),
    rate_nan=(DeclarationError, having(update=lambda: tttc.sgd(lr=NAN))),
    rate_infinite_of_one_state=(DeclarationError, having(update=lambda: tttc.sgd(lr={"W": np.float32("inf")}))),
    rate_none=(DeclarationError, having(update=lambda: tttc.sgd(lr=None))),
    rate_that_is_trained=(DeclarationError, having(update=lambda: tttc.sgd(lr=torch.nn.Parameter(torch.ones(()))))),
    decay_nan=(DeclarationError, having(update=lambda: tttc.sgd(lr=0.1, decay=NAN))),
    clip_infinite=(DeclarationError, having(update=lambda: tttc.sgd(lr=0.1, clip=INFINITY))),
    stage_uncalled=(DeclarationError, having(update=lambda: tttc.sgd(lr=0.1, at_end=tttc.muon))),
    muon_steps=(DeclarationError, lambda: tttc.muon(steps=-1)),
    clip_norm_nan=(DeclarationError, lambda: tttc.clip_norm(NAN)),
    clip_norm_scope=(DeclarationError, lambda: tttc.clip_norm(1.0, scope="al")),
    init_tensor=(DeclarationError, initial(torch.eye(3))),
    init_text=(DeclarationError, initial("orthogonal")),
    init_nan=(DeclarationError, initial(NAN)),
    init_of_the_shape_alone=(DeclarationError, initial(short_of_one)),
    init_returns_numpy=(DeclarationError, initial(zeros_of_numpy)),
    init_returns_another_shape=(ShapeError, initial(zeros_of_two)),
    scale_of_an_unknown_dim=(DeclarationError, having(update=lambda: tttc.sgd(lr=tttc.gate("lr", scale="1/X")))),
    scale_that_is_no_expression=(DeclarationError, having(g=lambda: tttc.gate("g", scale="1/"))),
    gate_per_head=(DeclarationError, having(g=lambda: tttc.gate("g", per="head"))),
    gate_activation=(DeclarationError, having(g=lambda: tttc.gate("g", activation="sigmoi"))),
    gate_by=(DeclarationError, having(g=lambda: tttc.gate("g", by="place"))),
    gate_without_a_name=(DeclarationError, having(g=lambda: tttc.gate(5))),
    gate_times_a_number=(DeclarationError, having(update=lambda: tttc.sgd(lr=0.1 * tttc.gate("lr")))),
    gate_from_one=(DeclarationError, having(update=lambda: tttc.sgd(lr=0.1, decay=1 - tttc.gate("forget")))),
    gate_in_a_function=(DeclarationError, having(update=lambda: tttc.sgd(lr=tttc.sigmoid(tttc.gate("lr"))))),
    param_times_a_number=(DeclarationError, having(g=lambda: 2.0 * tttc.param("D"))),
    setting_misspelt=(DeclarationError, having(reed="before")),
    setting_run_together=(DeclarationError, having(minibatch=4)),
    method_misspelt=(DeclarationError, having(outputs=lambda self, q: q)),
    mini_batch_al=(DeclarationError, having(mini_batch="al")),
    steps_negative=(DeclarationError, having(steps=-2)),
    steps_text=(DeclarationError, having(steps="2")),
    dims_number=(ShapeError, lambda: tttc.compile(Memory, 64)),
    device=(DeclarationError, lambda: compiled(Memory, device="gpu")),
    width_of_a_layer=(ShapeError, lambda: tttc.nn.TTT(Memory, 8.0, 2)),
    state_of_another_decode=(StateMismatch, another_decode),
    many=(
        DeclarationError,
        having(
            reed="before",
            mini_batch="al",
            W=lambda: tttc.state("D", "D", init="orthogonal"),
            g=lambda: tttc.gate("g", per="head", scale="1/X"),
            update=lambda: tttc.sgd(lr=NAN),
        ),
    ),
)


@pytest.mark.parametrize("case", VALUES)
def test_a_value_is_refused_before_it_is_used(case, golden):
    refused(case, golden, case.run, "values")


def test_all_that_is_wrong_is_reported_at_once():
    with pytest.raises(DeclarationError, match="has 6 problems"):
        next(c.values[0] for c in VALUES if c.values[0].name == "many").run()


# -- places ------------------------------------------------------------------------------------------------------------


class SquaredBelow(Memory):
    def learner(self, x):
        y = 2.0 * x
        return y @ (self.W * self.W)


class SquaredInAHelper(Memory):
    def learner(self, x):
        return 2.0 * (3.0 * x @ squared(self.W))


def squared(W):
    half = 0.5 * W
    return half * W


class DividedBelow(Memory):
    b = tttc.param("D")

    def learner(self, x):
        y = x / (1.0 + tttc.abs(self.b))
        return y @ (self.W / (2.0 + self.W))


class MissingFunction(Memory):
    def learner(self, x):
        return tttc.leaky_relu(x @ self.W)


class MissingSine(Memory):
    def learner(self, x):
        return tttc.sin(x @ self.W)


class MisspeltFunction(Memory):
    def learner(self, x):
        return tttc.sigmod(x @ self.W)


class MissingInTorch(Memory):
    def learner(self, x):
        return torch.nn.functional.gelu_exact(x @ self.W)


class MissingInAnObject(Memory):
    def learner(self, x):
        return "scale".nowhere * (x @ self.W)


class Undeclared(Memory):
    def learner(self, x):
        return x @ self.W1


PLACES = cases(
    squared_below=(NotDualizable, lambda: compiled(SquaredBelow)),
    squared_in_a_helper=(NotDualizable, lambda: compiled(SquaredInAHelper)),
    divided_below=(NotDualizable, lambda: compiled(DividedBelow)),
    missing_function=(DeclarationError, lambda: compiled(MissingFunction)),
    missing_sine=(DeclarationError, lambda: compiled(MissingSine)),
    misspelt_function=(DeclarationError, lambda: compiled(MisspeltFunction)),
    missing_in_torch=(DeclarationError, lambda: compiled(MissingInTorch)),
    missing_in_an_object=(DeclarationError, lambda: compiled(MissingInAnObject)),
    undeclared=(DeclarationError, lambda: compiled(Undeclared)),
)


@pytest.mark.parametrize("case", PLACES)
def test_a_refusal_is_at_the_place_that_it_means(case, golden):
    refused(case, golden, case.run, "values")


@pytest.mark.parametrize(
    ("variant", "underlined"),
    [(SquaredBelow, "self.W * self.W"), (SquaredInAHelper, "half * W"), (DividedBelow, "self.W / (2.0 + self.W)")],
)
def test_the_caret_underlines_the_operation(variant, underlined):
    for text in (str(tttc.check(variant)[0]), _message(lambda: compiled(variant))):
        line, caret = next((a, c) for a, c in zip(text.splitlines(), text.splitlines()[1:], strict=False) if "^" in c)
        assert line[caret.index("^") : caret.rindex("^") + 1] == underlined


def _message(run):
    with pytest.raises(TTTCError) as caught:
        run()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("leaky_relu", "tttc.where(x > 0"),
        ("sin", "tttc.elementwise(sympy.sin(x))"),
        ("mse", "tttc.mean((x - y) ** 2)"),
        ("stat", "Is it tttc.state?"),
        ("Variannt", "Is it tttc.Variant?"),
        ("sofmax", "Is it tttc.softmax?"),
    ],
)
def test_what_tttc_does_not_have(name, said):
    with pytest.raises(AttributeError, match=f"tttc has no `{name}`") as caught:
        getattr(tttc, name)
    assert said in str(caught.value)
    assert not hasattr(tttc, "_nothing")


def test_a_helper_that_is_near_no_setting_is_fine():
    helpers = {"head": 3, "note": "x", "step": lambda self: 3, "reads": 2.0, "features": lambda self, x: x}
    assert tttc.check(type("Helped", (Memory,), helpers)) == []


# -- numbers of others -------------------------------------------------------------------------------------------------

FOUR = [np.int64(4), np.int8(4), np.array(4), torch.tensor(4)]
TENTH = [np.float32(0.1), np.float64(0.1), np.array(0.1), torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)]


@pytest.mark.parametrize("four", FOUR, ids=repr)
def test_whole_numbers_are_those_of_numpy_and_torch_too(four):
    variant = Memory.replace(mini_batch=four, read="start", steps=four, update=tttc.sgd(lr=0.1, at_end=tttc.muon(four)))
    layer = tttc.compile(variant, {"D": four}, backend="torch")
    assert (layer.signature.mini_batch, layer.signature.steps, layer.dims) == (4, 4, {"D": 4})
    assert all(type(n) is int for n in (layer.signature.mini_batch, layer.signature.steps, layer.dims["D"]))
    assert tttc.compile(DeltaNet, {"D": four}, backend="torch", chunk=four, checkpoint=four).checkpoint == 4
    x = torch.randn(1, 5, 16)
    block = tttc.nn.TTT(tttc.library.TTTMLP, np.int64(16), four, dims={"F": four}, backend="torch")
    assert block(x).shape == x.shape
    assert tttc.verify(Memory, {"D": four}, tokens=5).ok


@pytest.mark.parametrize("tenth", TENTH, ids=repr)
def test_numbers_are_those_of_numpy_and_torch_too(tenth):
    x = torch.randn(1, 5, 1, 3)

    def made(n):
        class Numbers(Memory):
            W = tttc.state("D", "D", init=n)

            def learner(self, x):
                return n * (x @ self.W) + n

            update = tttc.sgd(lr=n, momentum={"W": n}, decay=n, clip=n)

        return tttc.compile(Numbers.replace(read="start"), {"D": 3}, backend="torch")(x, x, x)[0]

    assert torch.equal(made(tenth), made(float(tenth)))


@pytest.mark.parametrize(
    "other", [True, np.bool_(True), torch.tensor(True), "4", 4.5, np.array([4]), torch.ones(1), None]
)
def test_what_is_no_number_is_none(other):
    for run in (lambda: tttc.compile(DeltaNet, {"D": other}), lambda: compiled(Memory.replace(mini_batch=other))):
        with pytest.raises(TTTCError):
            run()


def test_every_golden_text_has_a_case():
    """A text that no case produces any more would be read by nobody."""
    names = {parameter.values[0].name for parameter in (*VALUES, *PLACES)}
    assert {path.stem for path in (GOLDEN / "values").glob("*.txt")} == names
