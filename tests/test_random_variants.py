"""Random declarations against the oracle: learners, losses, rules and reads that nobody wrote by hand.

Each is refused exactly where tests/draws/refusals.py says that it must be, or equals the oracle: outputs, final weights
and every gradient, in chunks of any length, and cut into calls anywhere. `make soak` draws without end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import pytest

from tests.draws import recipe as recipes
from tests.draws.comparison import Call, outcome
from tests.draws.drawing import drawn
from tests.draws.recipe import Recipe
from tests.draws.refusals import refusals


def check(recipe: Recipe, call: Call, backend: str = "torch") -> str:
    """What became of the declaration: "refused" as it must be, or "equal"; by a backend also "backend"."""
    found = outcome(recipe, call, backend)
    assert not found.fails, f"{recipe}\n{call}\n{found.text}"
    return found.kind


# -- drawn -------------------------------------------------------------------------------------------------------------


def outcomes(draws: int, *seeds: int, backend: str = "torch") -> Counter[str]:
    """What became of as many declarations from each seed."""
    small = backend != "torch"
    return Counter(check(*drawn(seed, n, small), backend) for seed in seeds for n in range(draws))


@pytest.mark.parametrize("number", range(3))
def test_random_declarations(number):
    outcomes(8, number)


@pytest.mark.parametrize("backend", ["tvm", "triton"])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # beyond the ends of an interpreter's blocks
def test_random_declarations_as_kernels(backend, monkeypatch, tmp_path):
    """A few small ones; those of Triton in its interpreter, in float32."""
    if find_spec(backend) is None:
        pytest.skip(f"there is no {backend}")
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    assert outcomes(3, 1, backend=backend)["equal"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_random_declarations(part):
    """Many are refused, most are not."""
    counted = outcomes(13, *range(100 + 10 * part, 110 + 10 * part))
    assert counted.total() == 130
    assert counted["refused"] >= counted.total() / 10
    assert counted["equal"] >= counted.total() / 2


# -- one by one --------------------------------------------------------------------------------------------------------


def batched(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Two by two."""
    return [tuple(names[i : i + 2]) for i in range(0, len(names), 2)]


PLAIN = Recipe(hidden=("tanh",), residual=True)
LINEAR = Recipe(bias="plain", other_width=True)
_hard = recipes.HARD_NAMES
NAMES = [(_hard[i : i + 3], recipes.TITLES[i // 3 % len(recipes.TITLES)]) for i in range(0, len(_hard) - 2, 3)][::2]
ONE_BY_ONE: dict[str, list[Recipe]] = {
    "activation": [replace(PLAIN, hidden=pair) for pair in batched([*recipes.ACTIVATIONS])],
    "loss": [replace(PLAIN, loss=name) for name in recipes.LOSSES],
    "target": [replace(PLAIN, target=name) for name in recipes.TARGETS],
    "use": [replace(PLAIN, use=name, read="start") for name in recipes.USES],
    "use by one token": [
        *(replace(PLAIN, use=name, mini_batch=1) for name in recipes.USES),
        *(Recipe(loss="dot", use="square", mini_batch=1, read=read) for read in ("after", "start")),
    ],
    "name": [Recipe(bias="plain", names=tuple(zip(("W0", "b0", "lr"), n, strict=True)), title=t) for n, t in NAMES],
    "learner": [
        *(replace(PLAIN, norm=name) for name in recipes.NORMS),
        *(replace(PLAIN, keep=name) for name in ("token", "channel")),
        *(replace(PLAIN, branch=name) for name in ("state", "param", "experts")),
        *(replace(PLAIN, scaled=name) for name in ("input", "output", "number")),
        *(replace(PLAIN, own_output=name) for name in recipes.OUTPUTS),
        *(replace(PLAIN, bias=name) for name in ("plain", "tanh")),
        *(replace(PLAIN, first=name) for name in ("diagonal", "number")),
        replace(PLAIN, shared=True),
        replace(PLAIN, other_width=True),
        replace(PLAIN, weighted=True),
        replace(PLAIN, hidden=("tanh", "silu"), bias="plain"),
    ],
    "states": [
        replace(PLAIN, first="blocks", rows=True),
        *(replace(PLAIN, idle=name) for name in recipes.IDLE),
        *(replace(PLAIN, window=name) for name in recipes.WINDOWS),
        replace(LINEAR, branch="experts"),
    ],
    "term": [
        *(replace(LINEAR, terms=(name,)) for name in recipes.TERMS),
        *(replace(PLAIN, bias="plain", terms=pair, lr="number", anchor="token") for pair in batched(recipes.TERMS)),
    ],
    "rows": [replace(recipe, rows=True) for recipe in (PLAIN, LINEAR, replace(PLAIN, norm="layer_norm"))],
    "gains": [replace(PLAIN, lr=kind, read_scale=kind) for kind in recipes.RATES],
    "recurrences": [replace(PLAIN, momentum=kind, decay=kind) for kind in recipes.RATES],
    "numbers": [
        replace(recipe, lr="number", momentum="edge", decay="number", anchor="token", read="before")
        for recipe in (PLAIN, LINEAR, replace(LINEAR, loss="dot"), replace(LINEAR, first="number", bias="no"))
    ],
    "average": [replace(PLAIN, average=kind) for kind in recipes.RATES],
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
    "stage": [replace(PLAIN, at_end=(name,), read="start") for name in recipes.STAGES],
    "stages": [replace(PLAIN, at_end=pair) for pair in recipes.PAIRS],
    "reading": [
        replace(recipe, read=read, anchor=anchor, mini_batch=3)
        for recipe in (PLAIN, LINEAR)
        for anchor in ("mini_batch", "token")
        for read in ("after", "before", "start", "end")
        if not refusals(replace(recipe, read=read, anchor=anchor, mini_batch=3))
    ],
}
NONLINEAR = [name for name in recipes.USES if name not in recipes.LINEAR]
REFUSED = [
    *(replace(PLAIN, rule=name) for name in recipes.BAD_RULES),
    *(replace(PLAIN, lr=kind) for kind in recipes.BAD_RATES),
    *(replace(PLAIN, loss=name) for name in recipes.BAD_LOSSES),
    *(replace(LINEAR, at_end=(name,)) for name in recipes.BAD_STAGES),
    *(replace(PLAIN, at_end=(name,), read=read) for name in recipes.VIEWS for read in ("after", "before")),
    *(replace(PLAIN, at_end=(name,), read="end", anchor="token") for name in recipes.VIEWS),
    *(replace(PLAIN, use=name, read=r) for name in NONLINEAR for r in ("after", "before")),
    replace(PLAIN, use="tanh", read="end", read_scale="gate"),
    replace(PLAIN, anchor="token", read="end"),
    replace(LINEAR, anchor="token", read="end", clip=0.1),
    replace(PLAIN, at_end=recipes.VIEWS[:2], read="start"),
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
    replace(PLAIN, steps=2, read="end", at_end=recipes.VIEWS[:1]),
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
DIMS = {"D": 3, "E": 2, "F": 4, "G": 5, "J": 2, "K": 3, "M": 2}
CALLS = {
    "ones": Call(dict.fromkeys("DEFGJKM", 1), cuts=(2,)),
    "no token": Call(DIMS, tokens=0, cuts=(0,)),
    "one token": Call(DIMS, tokens=1, cuts=(0,)),
    "second derivatives": Call(DIMS, derivative="second"),
    "forward mode": Call(DIMS, derivative="forward"),
    "groups": Call(DIMS, batch=2, heads=2, group=2, cuts=(3,)),
}
SMALL = Call(DIMS, cuts=(3,))


@pytest.mark.parametrize("group", ONE_BY_ONE)
def test_what_can_be_drawn_is_drawn(group):
    """Each choice on its own, whatever the examples above happened to be."""
    assert {check(recipe, SMALL) for recipe in ONE_BY_ONE[group]} == {"equal"}


@pytest.mark.parametrize("name", CALLS)
def test_what_can_be_called_is_called(name):
    recipes_ = (
        PLAIN,
        LINEAR,
        replace(LINEAR, anchor="token", decay="gate"),
        replace(PLAIN, norm="rms_norm", rows=True),
    )
    assert {check(recipe, CALLS[name]) for recipe in recipes_} == {"equal"}


def test_what_must_be_refused_is_refused():
    assert {check(recipe, SMALL) for recipe in REFUSED} == {"refused"}
