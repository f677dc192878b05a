"""Tracing is the user's function: what comes out is what the definition computes, or it is refused with the way out."""

from __future__ import annotations

import itertools
import math
import random
import re

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F

import tttc
from tttc.errors import TTTCError

D = 3


class Memory(tttc.Variant):
    """What the declarations below change in one place."""

    mini_batch = 4
    W = tttc.state("D", "D")
    flag = tttc.gate("flag")

    def learner(self, x):
        return x @ self.W

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


def learning(function, **changed):
    """The declaration with this learner."""
    return type("Learning", (Memory,), {"learner": function, **changed})


def losing(function, **changed):
    return type("Losing", (Memory,), {"loss": function, **changed})


def refusal(variant):
    with pytest.raises(TTTCError) as caught:
        tttc.compile(variant, {"D": D}, torch.float64, backend="torch")
    return str(caught.value)


# -- right -------------------------------------------------------------------------------------------------------------


def switched(self, k, v):
    error = 0.5 * tttc.sum((self.learner(k) - v) ** 2)
    return tttc.where(self.flag == 1, error, 2.0 * error)


def both_ways(self, x):
    y = x @ self.W
    return tttc.where((y > 0.2) & ~(y > 1.0) | (y != y), y, 0.1 * y)


def accumulated(self, x):
    total = 0.0
    for scale in (1.0, 2.0):
        total += scale * (x @ self.W)
    total *= 0.5
    return total


def aliased(self, x):
    y = x @ self.W
    z = y
    z += 1.0
    return y * 2.0 + z


def cached_on_self(self, x):
    if not hasattr(self, "h"):
        self.h = tttc.tanh(x)
    return self.h @ self.W


RIGHT = {
    "a comparison in where": losing(switched),
    "comparisons combined": learning(both_ways),
    "a comparison as a factor": learning(lambda self, x: (x @ self.W) * (0.1 * (x > 0) + (x <= 0))),
    "a comparison over a number": learning(lambda self, x: x @ self.W + (x > 0.1) / 3.0),
    "a gate as a condition": learning(lambda self, x: tttc.where(self.flag, x, 2.0 * x) @ self.W),
    "numbers in two branches": learning(lambda self, x: (x @ self.W) * tttc.where(x > 0, 1, 0.5)),
    "an accumulator": learning(accumulated),
    "a value under two names": learning(aliased),
    "features kept on self": learning(cached_on_self),
    "the builtin abs": learning(lambda self, x: abs(x @ self.W)),
    "len and shape": learning(lambda self, x: (x @ self.W) / len(x) ** 0.5 / x.shape[0]),
    "a size that decides": learning(lambda self, x: x @ self.W if tttc.size(x) == D else x),
    "a number of NumPy on the left": learning(lambda self, x: np.float32(0.5) * (x @ self.W)),
    "an exponent of NumPy": learning(lambda self, x: (x @ self.W) ** np.int64(2)),
    "a tensor without axes": learning(
        lambda self, x: torch.tensor(0.5, dtype=torch.float64) / (2.0 + (x @ self.W) ** 2)
    ),
    "exponents": learning(lambda self, x: 0.5 ** (x @ self.W)),
    "a value in a string": learning(lambda self, x: (f"{x} and {x @ self.W}", x @ self.W)[1]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_traced_is_what_the_definition_computes(name):
    found = tttc.verify(RIGHT[name], {"D": D}, tokens=6, backend="torch")
    assert found.ok, str(found)


# -- refused -----------------------------------------------------------------------------------------------------------

_calls = itertools.count(1)
_cached = {}
_weights = torch.nn.Parameter(torch.tensor(0.1))


def branching(self, k, v):
    if self.flag == 1:
        return tttc.sum(self.learner(k))
    return tttc.sum(v)


def renewed(self, x):
    return x @ self.W * (1.0 / next(_calls))


def kept_elsewhere(self, x):
    return _cached.setdefault("h", tttc.tanh(x)) @ self.W


def last_of_all(self, x):
    before, _cached["last"] = _cached.get("last", x), x
    return before @ self.W


_steps = [0]


def scheduled(self, x):
    _steps[0] += 1
    return x @ self.W * (1.0 if _steps[0] < 1000 else 0.5)


def counted():
    calls = 0

    def learner(self, x):
        nonlocal calls
        calls += 1
        return x @ self.W

    return learner


def grown(self, x, seen=[]):  # noqa: B006  # what is tested
    seen.append(1)
    return x @ self.W


class _Object:
    calls = 0


_object = _Object()


def counted_by_an_object(self, x):
    _object.calls += 1
    return x @ self.W


_functions = {}


def own_function(self, x):
    """A cache that is filled once."""
    if "softsign" not in _functions:
        a = sympy.Symbol("a")
        _functions["softsign"] = tttc.elementwise(a / (1 + sympy.Abs(a)))
    return _functions["softsign"](x @ self.W)


class Counting(Memory):
    calls = 0

    def learner(self, x):
        type(self).calls += 1
        return x @ self.W if self.calls < 1000 else x


class InTurns(Memory):
    """Every second call is another function: once for the loss, once for the output."""

    def learner(self, x):
        return x @ self.W * float(next(_calls) % 2)


def written_over(self, x):
    x += 1.0
    return x @ self.W


def transposed_and_written(self, x):
    y = self.W * 1.0
    z = y.T
    y += 1.0
    return x @ z


def test_a_cache_that_is_filled_once_is_fine():
    assert tttc.verify(learning(own_function), {"D": D}, tokens=5).ok


REFUSED = {
    "equality in an if": (losing(branching), "tttc.where"),
    "membership": (losing(lambda self, k, v: tttc.sum(self.learner(k)) * (self.flag in [0, 1])), "tttc.where"),
    "the key of a dict": (learning(lambda self, x: {x: x}[x] @ self.W), "key of a dict"),
    "equality with a string": (learning(lambda self, x: (x == "a") * self.W), "a str among the operands"),
    "a remainder": (learning(lambda self, x: (x @ self.W) % 2.0), "`%`"),
    "minus a comparison": (learning(lambda self, x: (1.0 - (x > 0)) @ self.W), "tttc.where(condition, 1.0, 0.0)"),
    "a sum of comparisons": (learning(lambda self, x: ((x > 0) + (x < 1)) * (x @ self.W)), "`&`, `|`"),
    "a product with a comparison": (learning(lambda self, x: (x > 0) @ self.W), "tttc.where(condition, 1.0, 0.0)"),
    "a logarithm to a base": (learning(lambda self, x: tttc.log(x * x + 1.0, 2) @ self.W), "tttc.log with 2 operands"),
    "a norm without a shift": (
        learning(lambda self, x: tttc.layer_norm(x, x, eps=1e-6)),
        "It takes 3 operands, and eps=",
    ),
    "an unknown argument": (learning(lambda self, x: tttc.sum(x, keepdim=True) * x), "It takes axis."),
    "a counter": (learning(renewed), "another expression comes out the second time"),
    "a counter with a period": (InTurns, "another expression comes out the second time"),
    "a value kept elsewhere": (learning(kept_elsewhere), "an earlier call has made"),
    "the value of the call before": (learning(last_of_all), "an earlier call has made"),
    "a counter on the class": (Counting, "`Counting.calls` changes with every call"),
    "a schedule that has not begun": (learning(scheduled), "`_steps` changes with every call"),
    "a variable around it": (learning(counted()), "`calls` changes with every call"),
    "a default that grows": (learning(grown), "changes with every call"),
    "an object that counts": (learning(counted_by_an_object), "`_object` changes with every call"),
    "a random branch": (learning(lambda self, x: x @ self.W * (1.0 if random.random() < 2 else 0.5)), "of Python"),
    "a random branch of NumPy": (learning(lambda self, x: x @ self.W if np.random.rand() < 2 else x), "of NumPy"),
    "a random branch of torch": (learning(lambda self, x: x @ self.W if torch.rand(()) < 2 else x), "of torch"),
    "a random number": (learning(lambda self, x: x @ self.W * float(torch.rand(()))), "another expression"),
    "a trained scalar of another module": (learning(lambda self, x: _weights * (x @ self.W)), "tttc.param"),
    "a tensor": (learning(lambda self, x: torch.ones(D) * (x @ self.W)), "tttc.param"),
    "an array": (learning(lambda self, x: np.ones(D) * (x @ self.W)), "tttc.param"),
    "a function of NumPy": (learning(lambda self, x: np.tanh(x @ self.W)), "Use tttc.tanh."),
    "a reduction of NumPy": (learning(lambda self, x: np.sum(x) * (x @ self.W)), "Use tttc.sum."),
    "an array of a value": (learning(lambda self, x: np.asarray(x) @ self.W), "array of NumPy"),
    "a function of torch": (learning(lambda self, x: torch.tanh(x @ self.W)), "Use tttc.tanh."),
    "a functional of torch": (learning(lambda self, x: F.gelu(x @ self.W)), "Use tttc.gelu."),
    "torch.where": (learning(lambda self, x: torch.where(x > 0, x, x @ self.W)), "Use tttc.where."),
    "torch.stack": (learning(lambda self, x: torch.stack([x, x]) @ self.W), "torch.stack on a value"),
    "a method": (learning(lambda self, x: (x @ self.W).tanh()), "Use tttc.tanh."),
    "a sum by a method": (learning(lambda self, x: x.sum() * (x @ self.W)), "Use tttc.sum."),
    "a number": (learning(lambda self, x: float(x) * (x @ self.W)), "tttc.size"),
    "a format": (learning(lambda self, x: float(f"{x:.2f}") * (x @ self.W)), "turning a value into a number"),
    "a range": (learning(lambda self, x: sum(range(x)) * (x @ self.W)), "turning a value into a number"),
    "math of Python": (learning(lambda self, x: math.tanh(x) * (x @ self.W)), "turning a value into a number"),
    "an index": (learning(lambda self, x: x[0] * (x @ self.W)), "indexing a value"),
    "an index written": (learning(lambda self, x: x.__setitem__(0, 1.0)), "indexing a value"),
    "an argument written over": (learning(written_over), "x = x + y"),
    "a view written over": (learning(transposed_and_written), "x = x + y"),
}


@pytest.fixture(autouse=True)
def nothing_cached():
    _cached.clear()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_users_function_is_refused(name):
    variant, said = REFUSED[name]
    lines = refusal(variant).splitlines()
    shown = [line for line in lines if "test_tracing.py:" in line]
    assert shown
    assert said in "\n".join(line for line in lines if line not in shown)  # the line itself says it too, here


def test_a_function_that_changes_is_told_by_its_line_and_both_values():
    text = refusal(learning(renewed))
    assert re.search(
        r"in loss: another expression comes out the second time, \S+ where the first time it was \S+\.", text
    )
    assert "return x @ self.W * (1.0 / next(_calls))" in text


def test_a_stage_at_the_end_that_changes_is_refused():
    variant = Memory.replace(
        read="start", update=tttc.sgd(lr=1.0, at_end=tttc.at_end(lambda U: U * (1.0 / next(_calls))))
    )
    assert "another expression comes out the second time" in refusal(variant)


def test_sizes_are_those_of_the_call_while_a_declaration_is_examined():
    """A declaration that accepts only some sizes is examined at those that it is given."""

    def learner(self, x):
        assert tttc.size(x) % 4 == 0, "the width must be a multiple of 4"
        return x @ self.W

    tttc.compile(learning(learner), {"D": 8}, backend="torch")
    with pytest.raises(TTTCError, match="a multiple of 4"):
        tttc.compile(learning(learner), {"D": 6}, backend="torch")
