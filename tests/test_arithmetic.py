"""A scale that is text is calculated, never run."""

from __future__ import annotations

import math

import pytest

import tttc
from tttc.declare.arithmetic import NotArithmetic, calculated


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1/D", 1 / 64),
        ("0.1/D", 0.1 / 64),
        ("1/sqrt(D * F)", 1 / math.sqrt(64 * 256)),
        (" -D ** -0.5 + 2e-3", 2e-3 - 1 / 8),
    ],
)
def test_its_value_is_that_of_arithmetic(text: str, value: float) -> None:
    assert calculated(text, {"D": 64, "F": 256}) == value


CODE = [
    "__import__('os').system('true')",
    "().__class__.__base__.__subclasses__()",
    "D.__class__",
    "D.real",
    "sqrt.__globals__",
    "sqrt",
    "exec('1')",
    "sqrt(D, 2)",
    "sqrt(x=D)",
    "(lambda: 1)()",
    "[D for D in (1,)][0]",
    "(D := 3)",
    "f'{D}'",
    "'1'",
    "True",
    "1j",
    "D if D else 1",
    "D << 2",
    "1;2",
    "",
    "(" * 5000,
    "-" * 200_000 + "1",
    "1\0",
]


@pytest.mark.parametrize("text", CODE, ids=range(len(CODE)))
def test_what_is_no_arithmetic_is_refused_and_not_run(text: str) -> None:
    with pytest.raises(NotArithmetic):
        calculated(text, {"D": 64})


def test_no_power_takes_long() -> None:
    with pytest.raises(OverflowError):
        calculated("9 ** 9 ** 9 ** 9", {})


def test_a_declaration_says_what_is_no_arithmetic_in_its_scale() -> None:
    class Scaled(tttc.library.TTTLinear):
        update = tttc.sgd(lr=tttc.gate("lr", scale="D.__class__"))

    with pytest.raises(tttc.TTTCError, match=r"has the scale 'D.__class__': `D.__class__` is no number, no dim"):
        tttc.compile(Scaled, {"D": 4})
