"""Names and values that a declaration is given, looked at before they are used: all that is wrong at once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tttc.declare.arithmetic import NotArithmetic, calculated
from tttc.declare.declared import Declared, short
from tttc.declare.gates import RANGES
from tttc.declare.number import number, whole
from tttc.declare.specs import INIT, GateSpec
from tttc.declare.suggest import near
from tttc.declare.update_rules import ROLES, SGD, AtEnd, NoChunkForm
from tttc.declare.variant import ANCHORS, READS, VARIANT_SETTINGS, Signature, Variant, class_line, is_dim
from tttc.errors import Problem

METHODS = ("learner", "loss", "output")


def name_problems(declared: Signature) -> Iterator[Problem]:
    """Attributes of a class have names of their own; a state may be called as a token that every declaration has: q."""
    groups = (
        ("state", declared.states),
        ("param", declared.params),
        ("token", declared.tokens),
        ("gate", declared.gates),
    )
    for role, name, spec in ((role, n, s) for role, specs in groups for n, s in specs.items()):
        if role == "gate" and not (isinstance(name, str) and name.isidentifier()):
            what = f"gate `{name}` is not a name that a variable can have."
            yield Problem(what, "Give it another name.", spec.where)
        elif role != "gate" and _is_of_every_declaration(name):
            what = f"{role} `{name}` is also what every declaration has under that name."
            yield Problem(what, "Give it another name.", spec.where)
        if not all(map(is_dim, spec.dims)):
            remedy = 'A dim is a name, such as "D"; its size is given to tttc.compile.'
            yield Problem(f"{role} `{name}` has the dims {spec.dims!r}.", remedy, spec.where)


def _is_of_every_declaration(name: str) -> bool:
    """Whether an attribute of the class is a setting or a function that a declaration defines."""
    return name in vars(Variant) and not isinstance(vars(Variant)[name], classmethod)


def value_problems(declared: Signature) -> list[Problem]:
    """Of the class's own attributes, the rates, the initial values and the gates."""
    return [
        *_misspelt(declared.variant),
        *_rate_problems(declared.update),
        *(p for n, s in declared.states.items() for p in _init_problems("state", n, s)),
        *(p for n, s in declared.params.items() for p in _init_problems("param", n, s)),
        *(p for g in declared.gates.values() for p in _gate_problems(g, declared)),
    ]


# -- settings ----------------------------------------------------------------------------------------------------------


def _misspelt(variant: type[Variant]) -> Iterator[Problem]:
    """Attributes that nothing reads and that are one slip from those that are read."""
    known = (*VARIANT_SETTINGS, *METHODS)
    for c in variant.__mro__:
        if not (issubclass(c, Variant) and c is not Variant):
            continue
        for name, value in vars(c).items():
            if name.startswith("__") or isinstance(value, Declared) or name in known:
                continue
            found = [m for m in known if m not in vars(c) and _one_slip(name, m) and _fits(m, value)]
            if found:
                what = f"`{name}` is no setting, and nothing reads it."
                yield Problem(what, f"Is it `{found[0]}`? Otherwise call it something else.", class_line(c))


def _fits(setting: str, value: Any) -> bool:
    """Whether a value is of the kind that a setting takes: `head = 3` is no `read`."""
    if setting in METHODS:
        return inspect.isroutine(value)
    if setting == "update":
        return isinstance(value, SGD | AtEnd | NoChunkForm)
    if setting in ("read", "anchor"):
        return isinstance(value, str) and near(value, READS if setting == "read" else ANCHORS) is not None
    return whole(value) is not None or (setting == "mini_batch" and isinstance(value, str))


def _one_slip(name: str, known: str) -> bool:
    """Whether a name is another but for capitals, underscores and one letter too many, too few, changed or swapped."""
    a, b = (x.lower().replace("_", "") for x in (name, known))
    if a == b:
        return True
    if len(a) == len(b):
        differ = [i for i in range(len(a)) if a[i] != b[i]]
        swapped = len(differ) == 2 and differ[1] == differ[0] + 1 and a[differ[0]] == b[differ[1]]
        return len(differ) == 1 or (swapped and a[differ[1]] == b[differ[0]])
    longer, shorter = sorted((a, b), key=len, reverse=True)
    return len(longer) == len(shorter) + 1 and any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))


# -- rates -------------------------------------------------------------------------------------------------------------


def _rate_problems(update: Any) -> Iterator[Problem]:
    for role in (*ROLES, "clip") if isinstance(update, SGD) else ():
        given = getattr(update, role)
        rates = list(given.values()) if isinstance(given, Mapping) else [given]
        if role == "lr" and any(r is None for r in rates):
            yield Problem("lr is None.", "It is a gate, a number or a param without axes.", update.where)
        for rate in rates:
            n = number(rate)
            if n is not None and not math.isfinite(n):
                yield Problem(f"{role} is {n}.", "A rate is a finite number.", update.where)


# -- initial values ----------------------------------------------------------------------------------------------------


def _init_problems(role: str, name: str, spec: Any) -> list[Problem]:
    init, said = spec.init, f"{role} `{name}` has the init"
    n = number(init)
    if n is not None:
        if math.isfinite(n):
            return []
        return [Problem(f"{said} {n}.", "It is a finite number.", spec.where)]
    if isinstance(init, type) or not callable(init):
        example = "lambda shape, generator: torch.eye(*shape)"
        return [Problem(f"{said} {short(init)}.", f"{INIT}: {example}.", spec.where)]
    if not _takes_two(init):
        return [Problem(f"{said} {short(init)}, which does not take (shape, generator).", f"{INIT}.", spec.where)]
    return []


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind((), None)
    except TypeError:
        return False
    except ValueError:  # a function without a signature
        return True
    return True


# -- gates -------------------------------------------------------------------------------------------------------------


def _gate_problems(gate: GateSpec, declared: Signature) -> Iterator[Problem]:
    def problem(what: str, remedy: str) -> Problem:
        return Problem(f"gate `{gate.name}` {what}.", remedy, gate.where)

    if gate.per not in ("token", "channel"):
        yield problem(f"is per {short(gate.per)}", 'Use per="token" or "channel".')
    if gate.by not in ("hidden", "position"):
        yield problem(f"is made by {short(gate.by)}", 'Use by="hidden" or by="position".')
    if gate.activation not in RANGES:
        yield problem(f"has the activation {short(gate.activation)}", f"Use one of {', '.join(RANGES)}.")
    begins = [("init", gate.init)] if gate.init is not None else []
    for name, value in (*begins, ("low", gate.low)):
        n = number(value)
        if n is None or not math.isfinite(n):
            yield problem(f"has the {name} {short(value)}", "It is a finite number.")
        elif gate.by == "position" and (begins or n):
            remedy = "It begins at 1 / i for the i-th token of a mini-batch: leave it out."
            yield problem(f'is by="position" and has the {name} {n:g}', remedy)
    dims = [*dict.fromkeys(["D", *declared.dims])]
    why = scale_refused(gate.scale, dims)
    if why:
        remedy = f'It is a number or an expression of {", ".join(map(str, dims))}, such as "1/D".'
        yield problem(f"has the scale {short(gate.scale)}: {why}", remedy)


def scale_refused(scale: Any, dims: list[str]) -> str:
    """Why a scale is neither a number nor an expression of these dims; empty where it is."""
    if not isinstance(scale, str):
        n = number(scale)
        return "" if n is not None and math.isfinite(n) else "it is no finite number"
    try:
        value = calculated(scale, dict.fromkeys(dims, 64))
    except NotArithmetic as error:
        return str(error)
    except (ValueError, ArithmeticError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if number(value) is not None else "it is no number"
