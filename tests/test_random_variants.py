"""Random declarations against the oracle: learners, losses, rules and reads that nobody wrote by hand.

Each is refused exactly where tests/random_declarations.py says that it must be, or equals the oracle: outputs, final
weights and every gradient, in chunks of any length, and cut into calls anywhere.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

import tttc
from tests import random_declarations as drawn
from tests.helpers import Result, differences, layer_result, oracle_result, result_of, split_call
from tests.random_declarations import Recipe, declaration, refusals
from tttc.errors import DeclarationError, Problem
from tttc.layer import Layer
from tttc.verify import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Inputs, gradient_errors, random_inputs, relative_error

ROUNDING = 1e-15  # a few units in the last place of float64
MOST_NOISE = 1e4  # times the tolerances: 1e-8 of an output; no declaration here may be worse conditioned


class Call(NamedTuple):
    """How a declaration is compiled and called; `cut` is where the sequence is cut into two calls."""

    dims: dict[str, int]
    tokens: int
    chunk: int | None
    checkpoint: int | str | None
    cut: int
    seed: int


calls = st.builds(
    Call,
    dims=st.fixed_dictionaries({d: st.integers(1, 5) for d in "DEFG"}),
    tokens=st.integers(0, 9),
    chunk=st.sampled_from([None, 1, 2, 3, 100]),
    checkpoint=st.sampled_from([None, 1, 2, "auto"]),
    cut=st.integers(0, 9),
    seed=st.integers(0, 9),
)


def check(recipe: Recipe, call: Call) -> str:
    """Compile and compare; what became of the declaration: "refused" or "compiled"."""
    variant, wanted, shown = declaration(recipe), refusals(recipe), f"{recipe}\n{call}"
    problems = tttc.check(variant)
    layer, message = compiled(variant, call)
    if layer is None:
        assert wanted, f"refused without a reason: {shown}\n{message}"
        assert_well_refused(message, wanted, problems)
        return "refused"
    assert not wanted, f"compiled, in spite of {wanted}: {shown}"
    assert not problems, f"compiled, in spite of what tttc.check says, {problems}: {shown}"
    assert_equals_the_oracle(layer, call, shown)
    return "compiled"


def compiled(variant: type[tttc.Variant], call: Call) -> tuple[Layer | None, str]:
    """The layer, or why there is none; any other error than a refusal is one of the compiler."""
    try:
        layer = tttc.compile(variant, call.dims, torch.float64, chunk=call.chunk, checkpoint=call.checkpoint)
    except DeclarationError as refusal:
        return None, str(refusal)
    return layer, ""


def assert_well_refused(message: str, wanted: list[str], problems: list[Problem]) -> None:
    """A refusal names the variant, every reason, and the way out of each; `tttc.check` says the same."""
    assert message.startswith("variant `Drawn`")
    for reason in wanted:
        assert reason in message, f"nothing says {reason!r}:\n{message}"
    assert problems, f"tttc.check has no problem with it:\n{message}"
    for problem in problems:
        assert problem.what in message
        assert problem.remedy.strip()
        assert f"\n  {problem.remedy}" in message


def assert_equals_the_oracle(layer: Layer, call: Call, shown: str) -> None:
    inputs = random_inputs(layer.signature, layer.dims, 1, call.tokens, 1, call.seed)
    wanted, found = oracle_result(layer.signature.variant, inputs), layer_result(layer, inputs)
    pairs = {"": (found, wanted)}
    if layer.signature.read != "end":  # what others read, a cut would hide from them
        cut = min(call.cut, call.tokens)
        pairs[f"cut at {cut}: "] = (result_of(*split_call(layer, inputs, [cut]), inputs), found)
    for where, (one, other) in pairs.items():
        if differences(one, other):
            text = differences(one, other, *allowed(layer, inputs, wanted))
            assert not text, f"{where}{shown}\n{text}"


def allowed(layer: Layer, inputs: Inputs, wanted: Result) -> tuple[float, float]:
    """The tolerances where the oracle itself is worse conditioned than these: Muon magnifies small singular values
    about 500 times. Ten times of what rounding the inputs does to it.
    """
    generator = torch.Generator().manual_seed(0)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return (x.detach() * (1.0 + ROUNDING * noise)).requires_grad_()

    groups = {n: {k: rounded(x) for k, x in getattr(inputs, n).items()} for n in ("gates", "params", "state", "tokens")}
    other = replace(inputs, q=rounded(inputs.q), k=rounded(inputs.k), v=rounded(inputs.v), **groups)
    moved = oracle_result(layer.signature.variant, other)
    outputs = [relative_error(moved.z, wanted.z), *(relative_error(moved.final[n], w) for n, w in wanted.final.items())]
    gradients = gradient_errors(moved.gradients, wanted.gradients).values()
    noise = 10 * max(max(outputs) / OUTPUT_TOLERANCE, max(gradients) / GRADIENT_TOLERANCE)
    factor = min(max(noise, 1.0), MOST_NOISE)
    return factor * OUTPUT_TOLERANCE, factor * GRADIENT_TOLERANCE


# -- drawn -------------------------------------------------------------------------------------------------------------


def outcomes(examples: int, *seeds: int) -> Counter[str]:
    """What became of as many declarations from each seed: many short runs differ more than a long one, whose examples
    are made of earlier ones.
    """
    counted: Counter[str] = Counter()
    for number in seeds:

        @seed(number)
        @settings(max_examples=examples, phases=[Phase.generate])  # a recipe is short; to shrink one takes minutes
        @given(drawn.recipes(), calls)
        def run(recipe: Recipe, call: Call) -> None:
            counted[check(recipe, call)] += 1

        run()
    return counted


@pytest.mark.parametrize("number", range(3))
def test_random_declarations(number):
    outcomes(10, number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_random_declarations(part):
    """Many are refused, most are not."""
    counted = outcomes(13, *range(100 + 10 * part, 110 + 10 * part))
    assert counted.total() >= 125
    assert counted["refused"] >= counted.total() / 10
    assert counted["compiled"] >= counted.total() / 2


# -- one by one --------------------------------------------------------------------------------------------------------

PLAIN = Recipe(hidden=("tanh",), residual=True)
LINEAR = Recipe(bias="plain", other_width=True)
ONE_BY_ONE: dict[str, list[Recipe]] = {
    "activation": [replace(PLAIN, hidden=(name,)) for name in drawn.ACTIVATIONS],
    "loss": [replace(PLAIN, loss=name) for name in drawn.LOSSES],
    "target": [replace(PLAIN, target=name) for name in drawn.TARGETS],
    "use": [replace(PLAIN, use=name, read="start") for name in drawn.USES],
    "use by one token": [replace(PLAIN, use=name, mini_batch=1) for name in drawn.USES],
    "learner": [
        *(replace(PLAIN, norm=name) for name in drawn.NORMS),
        *(replace(PLAIN, keep=name) for name in ("token", "channel")),
        *(replace(PLAIN, branch=name) for name in ("state", "param")),
        *(replace(PLAIN, scaled=name) for name in ("input", "output")),
        *(replace(PLAIN, bias=name) for name in ("plain", "tanh")),
        replace(PLAIN, first="diagonal"),
        replace(PLAIN, shared=True),
        replace(PLAIN, other_width=True),
        replace(PLAIN, own_output=True),
        replace(PLAIN, weighted=True),
        replace(PLAIN, hidden=("tanh", "silu"), bias="plain"),
    ],
    "gains": [replace(PLAIN, lr=kind, read_scale=kind) for kind in drawn.RATES],
    "recurrences": [replace(PLAIN, momentum=kind, decay=kind) for kind in drawn.RATES],
    "average": [replace(PLAIN, average=kind) for kind in drawn.RATES],
    "form": [
        replace(PLAIN, momentum="gate", nesterov=True),
        replace(PLAIN, momentum="gate", ema=True),
        replace(PLAIN, momentum="gate", decay="gate", average="gate", clip=0.1),
        replace(PLAIN, clip=0.1),
        replace(PLAIN, per="mini_batch", momentum="gate", decay="gate", read="end"),
        replace(PLAIN, steps=3, decay="gate", read="end"),
        replace(PLAIN, anchor="token", decay="gate", decay_first=True),
        replace(LINEAR, anchor="token", decay="channel", decay_first=True, mini_batch=3),
    ],
    "stage": [replace(PLAIN, at_end=(name,), read="start") for name in drawn.STAGES],
    "stages": [replace(PLAIN, at_end=pair) for pair in drawn.PAIRS],
    "reading": [
        replace(recipe, read=read, anchor=anchor, mini_batch=3)
        for recipe in (PLAIN, LINEAR)
        for anchor in ("mini_batch", "token")
        for read in ("after", "before", "start", "end")
        if not refusals(replace(recipe, read=read, anchor=anchor, mini_batch=3))
    ],
}
REFUSED = [
    *(replace(PLAIN, rule=name) for name in drawn.BAD_RULES),
    *(replace(PLAIN, lr=kind) for kind in drawn.BAD_RATES),
    *(replace(PLAIN, loss=name) for name in drawn.BAD_LOSSES),
    *(replace(LINEAR, at_end=(name,)) for name in drawn.BAD_STAGES),
    *(replace(PLAIN, at_end=(name,), read=read) for name in drawn.VIEWS for read in ("after", "before")),
    *(replace(PLAIN, at_end=(name,), read="end", anchor="token") for name in drawn.VIEWS),
    *(replace(PLAIN, use=name, read=r) for name in drawn.USES for r in ("after", "before") if name not in drawn.LINEAR),
    replace(PLAIN, use="tanh", read="end", read_scale="gate"),
    replace(PLAIN, anchor="token", read="end"),
    replace(LINEAR, anchor="token", read="end", clip=0.1),
    replace(PLAIN, at_end=drawn.VIEWS[:2], read="start"),
    replace(PLAIN, nesterov=True),
    replace(PLAIN, ema=True),
    replace(PLAIN, momentum="gate", ema=True, nesterov=True),
    replace(PLAIN, decay_first=True),
    replace(PLAIN, decay="gate", decay_first=True),
    replace(PLAIN, decay="gate", decay_first=True, mini_batch=1, read="start", steps=2),
    replace(PLAIN, read_scale="gate", anchor="token"),
    replace(PLAIN, average="gate", read_scale="gate"),
    replace(PLAIN, average="gate", at_end=("sign",)),
    replace(PLAIN, average="gate", read="start"),
    replace(PLAIN, average="gate", read="end", steps=2),
    replace(PLAIN, steps=2),
    replace(PLAIN, steps=2, read="end", anchor="token"),
    replace(PLAIN, steps=2, read="end", momentum="gate"),
    replace(PLAIN, steps=2, read="end", at_end=drawn.VIEWS[:1]),
    replace(PLAIN, per="mini_batch"),
    replace(PLAIN, per="mini_batch", read="end", anchor="token"),
    replace(PLAIN, per="mini_batch", read="end", momentum="gate", ema=True),
    replace(PLAIN, per="mini_batch", read="end", average="gate"),
    replace(PLAIN, per="sequence"),
    replace(PLAIN, clip=0.0),
    replace(PLAIN, mini_batch=0),
    replace(PLAIN, mini_batch="some"),
    replace(PLAIN, read="sometimes"),
    replace(PLAIN, anchor="sequence"),
    replace(PLAIN, steps=0),
    replace(PLAIN, mini_batch=0, read="sometimes", clip=-1.0, nesterov=True),
]
SMALL = Call({"D": 3, "E": 2, "F": 4, "G": 5}, 5, None, "auto", 3, 0)


@pytest.mark.parametrize("group", ONE_BY_ONE)
def test_what_can_be_drawn_is_drawn(group):
    """Each choice on its own, whatever the examples above happened to be."""
    assert {check(recipe, SMALL) for recipe in ONE_BY_ONE[group]} == {"compiled"}


def test_what_must_be_refused_is_refused():
    assert {check(recipe, SMALL) for recipe in REFUSED} == {"refused"}
