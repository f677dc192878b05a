"""A recipe and a call from a random generator: settings that suit each other, one time in four some that may not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from tests.draws.comparison import Call
from tests.draws.declaration import declaration
from tests.draws.recipe import (
    ACTIVATIONS,
    BAD_LOSSES,
    BAD_RATES,
    BAD_RULES,
    BAD_STAGES,
    FIRST,
    HARD_NAMES,
    IDLE,
    LINEAR,
    LOSSES,
    NORMS,
    OUTPUTS,
    PAIRS,
    RATES,
    STAGES,
    TARGETS,
    TERMS,
    TITLES,
    USES,
    VIEWS,
    WINDOWS,
    Recipe,
)
from tttc.declare.read import read_declaration

DIMS = "DEFGJKM"
CHANGES: dict[str, tuple[Any, ...]] = {
    "rule": tuple(BAD_RULES),
    "lr": BAD_RATES,
    "loss": tuple(BAD_LOSSES),
    "use": ("tanh", "square", "product", "normalised"),
    "read_scale": ("gate", "number"),
    "momentum": ("none", "gate"),
    "nesterov": (True,),
    "ema": (True,),
    "decay": ("none", "gate"),
    "decay_first": (True,),
    "average": ("gate", "number"),
    "clip": (0.0, -1.0),
    "per": ("mini_batch", "sequence"),
    "at_end": (*((n,) for n in (*BAD_STAGES, *VIEWS)), VIEWS[:2], ("soft_clip", VIEWS[0])),
    "mini_batch": (0, "some", 1),
    "read": ("after", "before", "start", "end", "sometimes"),
    "anchor": ("token", "sequence"),
    "steps": (0, 2),
}


class Draw:
    """Choices from a generator that is known by its seed and number; `small` ones for kernels that compile slowly."""

    def __init__(self, seed: object, number: int, small: bool = False) -> None:
        self.random, self.small = Random(f"{seed}, {number}"), small

    def one(self, kinds: Sequence[Any]) -> Any:
        return self.random.choice(kinds)

    def chance(self, of: int) -> bool:
        """True one time in `of`."""
        return self.random.randrange(of) == 0

    def maybe(self, kinds: Sequence[Any], allowed: bool = True, absent: Any = "none", of: int = 3) -> Any:
        """One of the kinds, one time in `of`, where it is allowed."""
        return self.one(kinds) if allowed and self.chance(of) else absent

    def some(self, kinds: Sequence[Any], least: int, most: int) -> tuple[Any, ...]:
        """So many different ones."""
        return tuple(self.random.sample(kinds, self.random.randint(least, most)))


def drawn(seed: object, number: int, small: bool = False) -> tuple[Recipe, Call]:
    """The draw of this number from this seed: the same at all times."""
    draw = Draw(seed, number, small)
    recipe = sensible(draw)
    if draw.chance(4):  # up to two of its settings are changed, whatever the others are
        for name in draw.some([*CHANGES], 1, 2):
            recipe = replace(recipe, **{name: draw.one(CHANGES[name])})
    if draw.chance(3):
        recipe = renamed(draw, recipe)
    return recipe, call(draw, recipe)


def sensible(draw: Draw) -> Recipe:
    """A recipe whose settings suit each other."""
    maybe = draw.maybe
    read = draw.one(["after", "before", "start", "end"])
    anchor = draw.one(["mini_batch", "mini_batch", "token"])
    mini_batch = draw.one([1, 2, 3, 4, "all"])
    inside, online, alone = read in ("after", "before"), anchor == "token", mini_batch == 1
    whole = not inside and not online
    average = maybe(RATES, read != "start", of=5)
    averaged = average != "none"
    at_end = maybe([*((n,) for n in STAGES if n not in VIEWS), *PAIRS], not averaged, (), of=3)
    steps = maybe([2, 3], whole and not averaged, 1)
    momentum = maybe(RATES, steps == 1)
    form = draw.one(["plain", "nesterov", "ema"]) if momentum != "none" else "plain"
    views = whole and steps == 1 and not averaged
    at_end = maybe([(v,) for v in VIEWS] + [("soft_clip", VIEWS[1])], views, at_end, of=5)
    decay = maybe(RATES)
    return Recipe(
        **learner(draw, nonlinear=alone or online or not inside),
        **loss(draw),
        lr=draw.one(RATES),
        read_scale=maybe(RATES, not averaged and (alone or not online)),
        momentum=momentum,
        nesterov=form == "nesterov",
        ema=form == "ema",
        decay=decay,
        decay_first=maybe([True], decay != "none" and (online or (alone and steps == 1)), False, of=2),
        average=average,
        clip=maybe([0.05, 0.3, 5.0], absent=None, of=5),
        per=maybe(["mini_batch"], whole and form != "ema" and not averaged, "token"),
        at_end=at_end,
        mini_batch=mini_batch,
        read=read,
        anchor=anchor,
        steps=steps,
    )


def learner(draw: Draw, nonlinear: bool) -> dict[str, Any]:
    """The learner's part of a recipe; one in three is simple enough for a linear one to be drawn."""
    one, maybe = draw.one, draw.maybe
    rows = draw.chance(6)
    found = dict(
        first=maybe(FIRST if rows else FIRST[:3], absent="dense", of=2),
        use=one([*USES] if nonlinear else LINEAR),
        bias=one(["no", "plain"]),
        branch=maybe(["param", "experts"], absent="no"),
        keep=one(["no", "token", "channel"]),
        residual=draw.chance(2),
        other_width=draw.chance(2),
        idle=maybe(IDLE[1:], absent="no", of=8),
        rows=rows,
        window=maybe(WINDOWS[1:], not rows, "no", of=8),
        own_output=maybe(OUTPUTS[1:], absent="no", of=6),
    )
    if draw.chance(2 if draw.small else 3):
        return found
    return found | dict(
        hidden=tuple(one([*ACTIVATIONS]) for _ in range(draw.random.randint(0, 1 if draw.small else 2))),
        last=one(["none", "none", *ACTIVATIONS]),
        bias=one(["no", "plain", "tanh"]),
        branch=maybe(["state", "param", "experts"], absent="no", of=2),
        scaled=maybe(["input", "output", "number"], absent="no", of=2),
        shared=draw.chance(2),
        norm=one(NORMS),
    )


def loss(draw: Draw) -> dict[str, Any]:
    """The loss's part of a recipe."""
    return dict(
        loss=draw.one([*LOSSES]),
        target=draw.one([*TARGETS]),
        weighted=draw.chance(2),
        terms=draw.some(TERMS, 1, 3) if draw.chance(3) else (),
    )


def renamed(draw: Draw, recipe: Recipe) -> Recipe:
    """The same declaration, with names that generated code may have uses for."""
    variant = declaration(recipe)
    known, _ = read_declaration(variant)
    plain = [*known.states, *known.params, *known.gates, *(n for n in known.tokens if n not in ("q", "k", "v"))]
    free = [n for n in HARD_NAMES if n not in plain and n not in vars(variant)]  # which may declare q, k and v itself
    changed = draw.some(plain, 1, min(len(plain), 4))
    names = zip(changed, draw.random.sample(free, len(changed)), strict=True)
    return replace(recipe, names=tuple(names), title=draw.one(TITLES))


def call(draw: Draw, recipe: Recipe) -> Call:
    """How it is compiled and called; one in four has dims of 1, together or alone."""
    random = draw.random
    dims = {d: random.randint(1, 4) for d in DIMS}
    if draw.chance(4):
        ones = draw.some(DIMS, 1, len(DIMS))
        dims |= dict.fromkeys(ones if draw.chance(2) else DIMS, 1)
    tokens = draw.one([0, 1, 1, *range(2, 6 if draw.small else 9)])
    return Call(
        dims=dims,
        tokens=tokens,
        chunk=draw.one([None, None, 1, 2, 3, 100]),
        checkpoint=draw.one([None, 1, 2, "auto"]),
        cuts=tuple(sorted(random.randint(0, tokens) for _ in range(random.randint(1, 2)))),
        seed=random.randint(0, 999),
        batch=draw.maybe([2], absent=1, of=8),
        heads=draw.maybe([2], absent=1, of=8),
        group=draw.maybe([2], absent=1, of=8),
        decode=draw.maybe(["sums", "rows"], absent="auto"),
        derivative=draw.maybe(["second", "forward"], absent="first", of=20 if draw.small else 5),
    )
