"""The declaration: what a user writes to define a Test-Time-Training variant.

A `Variant` subclass lists its fast weights (`state`), slow weights (`param`) and per-token inputs (`gate`, `token`),
and defines `learner` and `loss`. The class runs: bound to float64 torch tensors it *is* the definition of correct
(`tttc/reference.py`); bound to traced values it gives the compiler the same two functions (`tttc/declare/tracer.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tttc.declare.declared import Declared
from tttc.declare.number import number, whole
from tttc.declare.suggest import near
from tttc.declare.update_rules import ROLES, SGD, AtEnd, NoChunkForm, Rate, sgd
from tttc.declare.values import SETTINGS, declaration_class, evaluated_scale, short, value_problems
from tttc.errors import DeclarationError, Problem, SourceLine, refusal
from tttc.ir.names import apart

__all__ = ["READS", "SGD", "GateSpec", "ParamSpec", "Rate", "Signature", "StateSpec", "TokenSpec", "Variant", "sgd"]

READS = ("after", "before", "start", "end")
ANCHORS = ("mini_batch", "token")
Init = float | Callable[..., Any]


@dataclass(frozen=True, eq=False)
class StateSpec(Declared):
    """A fast weight: axes by dim name, and where it starts when no state is given."""

    dims: tuple[str, ...]
    init: Init
    where: SourceLine | None = None


@dataclass(frozen=True, eq=False)
class ParamSpec(Declared):
    """A slow weight of the inner loop: used by it, trained by the outer loop."""

    dims: tuple[str, ...]
    init: Init
    where: SourceLine | None = None


@dataclass(frozen=True, eq=False)
class TokenSpec(Declared):
    """A per-token vector; `q`, `k` and `v` are tokens of axis D unless declared otherwise.

    With a `window`, `given` is what a call passes for each token, and `dims` what the functions see: the last tokens.
    """

    given: tuple[str, ...]
    window: str | None = None
    where: SourceLine | None = None

    @property
    def dims(self) -> tuple[str, ...]:
        return self.given if self.window is None else (self.window, *self.given)


@dataclass(frozen=True, eq=False)
class GateSpec(Declared):
    """A per-token input, [B, T, H] or [B, T, H, axis], and how `tttc.nn.TTT` makes it from the hidden states."""

    name: str
    per: str = "token"
    axis: str = "D"
    activation: str = "sigmoid"
    scale: float | str = 1.0
    by: str = "hidden"
    where: SourceLine | None = None
    init: float | None = None
    low: float = 0.0

    @property
    def dims(self) -> tuple[str, ...]:
        return (self.axis,) if self.per == "channel" else ()

    def scale_value(self, dims: Mapping[str, int]) -> float:
        """`scale` as a number; a string such as "1/D" is an expression of the dims."""
        if not isinstance(self.scale, str):
            return float(self.scale)
        try:
            return float(evaluated_scale(self.scale, dims))
        except Exception as error:  # whatever the user's expression raises
            given = ", ".join(f"{d}={n}" for d, n in dims.items())
            raise DeclarationError(
                f"gate `{self.name}`: the scale {self.scale!r} is no number with {given}: {error}."
            ) from None


Spec = StateSpec | ParamSpec | TokenSpec | GateSpec


def state(*dims: str, init: Init = 0.0) -> Any:
    """Declare a fast weight, trained at test time: `W = tttc.state("D", "F")`.

    `dims` are the names of its axes. `init` (a number, or a function `init(shape, generator)` such as
    `tttc.normal(0.02)`) is where it starts when a call gives no state.
    """
    return StateSpec(_named(dims), init, _declared_at())


def param(*dims: str, init: Init = 0.0) -> Any:
    """Declare a slow weight of the inner loop, trained by the outer loop: `gamma = tttc.param("D", init=1.0)`."""
    return ParamSpec(_named(dims), init, _declared_at())


def token(*dims: str, window: str | None = None) -> Any:
    """Declare a per-token vector, [B, T, H, *dims]: `v = tttc.token("E")` gives values a width of their own.

    With `window="K"` the functions see the last K tokens, [K, *dims], the present one last and zeros before the first:
    the input of a causal convolution. A call still passes one vector for each token; the state carries the K - 1 last.
    """
    return TokenSpec(_named(dims), window, _declared_at())


def gate(
    name: str,
    per: str = "token",
    *,
    axis: str = "D",
    activation: str = "sigmoid",
    scale: float | str = 1.0,
    by: str = "hidden",
    init: float | None = None,
    low: float = 0.0,
) -> Any:
    """Declare a per-token input named `name`: [B, T, H], or [B, T, H, axis] with `per="channel"`.

    The keywords say how `tttc.nn.TTT` makes it: `by="hidden"`, low + scale * activation(hidden @ weight + bias), or
    `by="position"`, max(1 / i + learned_i, 0) for the i-th token of a mini-batch (arXiv:2407.04620). `activation` is
    one of sigmoid, softplus, tanh, exp, none; `scale` a number or an expression of the dims such as "1/D". `init` is
    the gate's value where training begins, which the bias is set for: a sigmoid decay without it forgets half of the
    weights at every token. Without it the bias is 0.
    """
    if not isinstance(name, str):
        line = _declared_at()
        raise DeclarationError(f'the name of a gate is {short(name)}.\n{line.shown()}\n  Write tttc.gate("lr").')
    return GateSpec(name, per, axis, activation, scale, by, _declared_at(), init, low)


def normal(std: float) -> Init:
    """Initial values drawn from N(0, std^2)."""

    def init(shape: tuple[int, ...], generator: Any) -> Any:
        import torch

        return torch.randn(shape, generator=generator, dtype=torch.float64) * std

    init.__name__ = f"normal({std})"
    return init


def _named(dims: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dims as they are given, where lists are given too: what is no name is reported later."""
    return tuple(tuple(d) if isinstance(d, list) else d for d in dims)


def _declared_at() -> SourceLine:
    frame = sys._getframe(2)
    return SourceLine(frame.f_code.co_filename, frame.f_lineno)


class Variant:
    """Base class of every declaration; see the README for a 15-line example."""

    mini_batch: int | str = 16
    read: str = "after"
    anchor: str = "mini_batch"
    steps: int = 1
    qk_norm: bool = False
    """Whether the rule wants q and k of length one. `tttc.nn.TTT` makes them so; the compiled layer takes them as they
    come.
    """
    update: SGD = SGD(lr=1.0)

    def learner(self, x: Any) -> Any:
        """The inner-loop model on one token x: [D]."""
        raise DeclarationError(f"variant `{type(self).__name__}` declares no `learner(self, x)`")

    def loss(self, k: Any, v: Any) -> Any:
        """The self-supervised task on one token, a scalar."""
        raise DeclarationError(f"variant `{type(self).__name__}` declares no `loss(self, k, v)`")

    def output(self, q: Any) -> Any:
        """What a token reads; the learner itself unless overridden."""
        return self.learner(q)

    @classmethod
    def bind(cls, values: Mapping[str, Any]) -> Any:
        """An instance whose states, params, gates and extra tokens are `values`: its functions then run on them."""
        return bind(cls, values)

    @classmethod
    def replace(cls, **settings: Any) -> type[Variant]:
        """The same declaration with other settings: `TTTLinear.replace(mini_batch=4, read="before")`."""
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            found = [m for n in unknown if (m := near(n, SETTINGS, 0.6))]
            meant = f"Is it {', '.join(found)}? " if found else ""
            raise DeclarationError(
                f"variant `{cls.__name__}`: no such setting: {', '.join(unknown)}.\n"
                f"  {meant}The settings are {', '.join(SETTINGS)}."
            )
        about = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__replaced__": settings}
        return type(cls.__name__, (cls,), {**settings, **about})


def bind(variant: type[Variant], values: Mapping[str, Any]) -> Any:
    """The same as `variant.bind`, also where a declared value is called `bind`."""
    bound = object.__new__(variant)
    bound.__dict__.update(values)
    return bound


@dataclass(frozen=True)
class Signature:
    """What a declaration takes and keeps, read off the class once."""

    variant: type[Variant]
    states: dict[str, StateSpec]
    params: dict[str, ParamSpec]
    gates: dict[str, GateSpec]
    tokens: dict[str, TokenSpec]
    attributes: dict[str, str]  # attribute on `self` -> name of the gate it reads
    mini_batch: int | str
    read: str
    anchor: str
    steps: int
    update: SGD
    qk_norm: bool = False

    @property
    def name(self) -> str:
        return self.variant.__name__

    @property
    def specs(self) -> tuple[Spec, ...]:
        """Everything declared with axes: tokens (q, k and v first), states, params, gates."""
        return (*self.tokens.values(), *self.states.values(), *self.params.values(), *self.gates.values())

    @property
    def dims(self) -> tuple[str, ...]:
        """Every dim name that the declaration mentions, those of q, k and v first."""
        return tuple(dict.fromkeys(dim for spec in self.specs for dim in spec.dims))

    def identity(self, role: str, name: str) -> str:
        """What a declared value is called in the IR: so, unless a gate has a name that an attribute has as well."""
        taken = role == "gate" and any(name in group for group in (self.states, self.params, self.tokens))
        return apart(name, role) if taken else name

    def rate_name(self, rate: ParamSpec) -> str:
        """The attribute that a `param` used inside `update` was declared as."""
        return next(name for name, spec in self.params.items() if spec is rate)


def signature(variant: type[Variant]) -> Signature:
    """Read the declaration; raises `DeclarationError` with every problem found."""
    found, problems = read_declaration(variant)
    if problems:
        raise refusal(variant.__name__, problems)
    return found


def read_declaration(variant: type[Variant]) -> tuple[Signature, list[Problem]]:
    """The signature and everything wrong with it; used by `signature` and by `tttc check`.

    Raises `DeclarationError` where `variant` is no declaration at all.
    """
    declaration_class(variant)
    declared = {name: spec for base in reversed(variant.__mro__) for name, spec in vars(base).items()}
    states = {name: spec for name, spec in declared.items() if isinstance(spec, StateSpec)}
    params = {name: spec for name, spec in declared.items() if isinstance(spec, ParamSpec)}
    tokens = {name: TokenSpec(("D",)) for name in ("q", "k", "v")}
    tokens |= {name: spec for name, spec in declared.items() if isinstance(spec, TokenSpec)}
    attribute_gates: dict[str, GateSpec] = {name: spec for name, spec in declared.items() if isinstance(spec, GateSpec)}

    update = variant.update
    problems = list(_setting_problems(variant, states))
    rates = _rates(update) if isinstance(update, SGD) else []
    gates: dict[str, GateSpec] = {}
    for spec in [*attribute_gates.values(), *(r for _, r in rates if isinstance(r, GateSpec))]:
        known = gates.setdefault(spec.name, spec)
        if known.dims != spec.dims:
            problems.append(
                Problem(
                    f"gate `{spec.name}` is declared twice, per {known.per} and per {spec.per}.",
                    "Give one of them another name.",
                    spec.where,
                )
            )
    problems += _rate_problems(update, rates, states, params) if isinstance(update, SGD) else []
    problems += _rule_problems(variant, update, states) if isinstance(update, SGD) else []
    problems += _name_problems(states, params, tokens, gates)
    attributes = {name: spec.name for name, spec in attribute_gates.items()}
    b = variant.mini_batch if (n := whole(variant.mini_batch)) is None else n
    settings = (b, variant.read, variant.anchor, whole(variant.steps) or 0, update, variant.qk_norm)
    found = Signature(variant, states, params, gates, tokens, attributes, *settings)
    return found, [*problems, *value_problems(found)]


def _rates(update: SGD) -> list[tuple[str, Rate]]:
    used: list[tuple[str, Rate]] = []
    for role in ROLES:
        rates = getattr(update, role)
        if rates is not None:
            used += [(role, rate) for rate in (rates.values() if isinstance(rates, Mapping) else [rates])]
    return [(role, rate) for role, rate in used if rate is not None]


def _setting_problems(variant: type[Variant], states: Mapping[str, StateSpec]) -> list[Problem]:
    problems = []
    if not states:
        problems.append(
            Problem(
                "no fast weight is declared.", 'Declare at least one: W = tttc.state("D", "D").', class_line(variant)
            )
        )
    b, update = variant.mini_batch, variant.update
    if not (b == "all" if isinstance(b, str) else (whole(b) or 0) >= 1):
        problems.append(Problem(f"mini_batch is {b!r}.", 'It must be a positive int or "all".', class_line(variant)))
    if variant.read not in READS:
        problems.append(
            Problem(f"read is {variant.read!r}.", f"It must be one of {', '.join(READS)}.", class_line(variant))
        )
    if variant.anchor not in ANCHORS:
        remedy = (
            'It must be "mini_batch" (gradients at the weights that the mini-batch started from) or "token" '
            "(at the weights that the token before left)."
        )
        problems.append(Problem(f"anchor is {variant.anchor!r}.", remedy, class_line(variant)))
    if (whole(variant.steps) or 0) < 1:
        problems.append(Problem(f"steps is {variant.steps!r}.", "It must be a positive int.", class_line(variant)))
    if not isinstance(variant.qk_norm, bool):
        remedy = "It must be True, for q and k of length one, or False."
        problems.append(Problem(f"qk_norm is {variant.qk_norm!r}.", remedy, class_line(variant)))
    if isinstance(update, NoChunkForm):
        problems.append(
            Problem(f"{update.name} has no exact chunked form: {update.reason}.", update.instead, update.where, True)
        )
    elif isinstance(update, AtEnd):
        remedy = f'Use it where the mini-batch ends: tttc.sgd(lr=..., at_end={update.label}), read="start" or "end".'
        problems.append(
            Problem(
                f"{update.label} is not linear in the gradients: token by token it would take a weight matrix each.",
                remedy,
                update.where,
                True,
            )
        )
    elif not isinstance(update, SGD):
        problems.append(
            Problem(
                f"update is {short(update)}.",
                'It must be made by tttc.sgd: tttc.sgd(lr=tttc.gate("lr")).',
                class_line(variant),
            )
        )
    return problems


def _rule_problems(variant: type[Variant], update: SGD, states: Mapping[str, StateSpec]) -> list[Problem]:
    """Settings that contradict each other, and what exists only where a mini-batch ends."""
    problems: list[Problem] = []

    def refuse(what: str, remedy: str) -> None:
        problems.append(Problem(what, remedy, update.where))

    steps = whole(variant.steps) or 1
    online, inside = variant.anchor == "token", variant.read in ("after", "before")
    if (update.nesterov or update.ema) and update.momentum is None:
        refuse(f"{'nesterov' if update.nesterov else 'ema'} is set, but there is no momentum.", "Give momentum=.")
    if update.nesterov and update.ema:
        refuse("nesterov and ema are both set.", "They are two forms of momentum: choose one.")
    single = variant.mini_batch == 1 and steps == 1
    if update.decay_first and (update.decay is None or not (online or single)):
        refuse(
            "decay_first says that an online gradient is taken at the decayed weights, "
            + ("but there is no decay." if update.decay is None else 'but anchor is "mini_batch".'),
            "Leave it out." if update.decay is None else 'Set anchor = "token", or leave it out.',
        )
    if update.read_scale is not None and online and variant.mini_batch != 1:
        refuse(
            'read_scale scales what a mini-batch adds, but anchor="token" takes each gradient at the token before.',
            'Fold it into lr, or set anchor = "mini_batch".',
        )
    if update.average is not None and (update.read_scale is not None or steps > 1 or update.at_end):
        refuse(
            "average is combined with read_scale, steps or at_end.",
            "An averaged reading takes the rule as it is, once per token: leave the others out.",
        )
    if steps > 1 and (online or inside):
        refuse(
            f'steps is {steps}, with read="{variant.read}" and anchor="{variant.anchor}".',
            'Several steps are taken on a whole mini-batch: set read = "end" or "start", anchor = "mini_batch".',
        )
    views = any(isinstance(s, AtEnd) and s.on == "view" for s in update.at_end)
    if steps > 1 and (update.momentum is not None or views):
        refuse(
            f"steps is {steps}, and the rule carries more than weights from step to step.",
            "Leave momentum and views out, or set steps = 1.",
        )
    if update.average is not None and variant.read == "start":
        refuse(
            'read="start" reads the weights before the mini-batch, average the mean of all so far.',
            'Set read = "before" or "after", or leave average out.',
        )
    if update.per not in ("token", "mini_batch"):
        refuse(f"per is {update.per!r}.", 'It must be "token" or "mini_batch".')
    elif update.per == "mini_batch":
        if inside or online:
            refuse(
                'per="mini_batch" takes the mean of the gates over the mini-batch: a token inside it cannot know that.',
                'Set read = "start" or "end" and anchor = "mini_batch", or per="token".',
            )
        if update.ema or update.average is not None:
            refuse('per="mini_batch" has no ema and no average.', "Use momentum and decay.")
    if update.clip is not None and not (number(update.clip) or 0) > 0:
        refuse(f"clip is {short(update.clip)}.", "It must be a positive number.")
    problems += _stage_problems(variant, update, states)
    return problems


def _stage_problems(variant: type[Variant], update: SGD, states: Mapping[str, StateSpec]) -> list[Problem]:
    problems: list[Problem] = []
    viewed: set[str] = set()
    for stage in update.at_end:
        if not isinstance(stage, AtEnd):
            return [Problem(f"at_end holds {short(stage)}.", "Use tttc.muon, tttc.at_end(function), ...", update.where)]
        where = stage.where or update.where
        unknown = [n for n in stage.states or () if n not in states]
        if unknown:
            remedy = f"The states are {', '.join(states)}."
            problems.append(Problem(f"{stage.label} is for {', '.join(unknown)}.", remedy, where))
        if stage.on not in ("update", "weights", "view"):
            problems.append(Problem(f"on is {stage.on!r}.", 'It is "update", "weights" or "view".', where))
        if stage.on != "view":
            continue
        if variant.read not in ("start", "end") or variant.anchor == "token":
            problems.append(
                Problem(
                    f"{stage.label} makes the weights a nonlinear function of what the rule accumulates, and "
                    f'read="{variant.read}", anchor="{variant.anchor}" use the weights of single tokens.',
                    'Apply it where the mini-batch ends: set read = "start" or "end", anchor = "mini_batch".',
                    where,
                    True,
                )
            )
        again = sorted(viewed & set(stage.of(states)))
        if again:
            problems.append(Problem(f"{', '.join(again)} is given two views.", "Give each state one.", where))
        viewed |= set(stage.of(states))
    return problems


def _rate_problems(
    update: SGD, rates: list[tuple[str, Rate]], states: Mapping[str, StateSpec], params: Mapping[str, ParamSpec]
) -> list[Problem]:
    problems = []
    for role, rate in rates:
        if isinstance(rate, ParamSpec) and (rate.dims or not any(rate is p for p in params.values())):
            problems.append(
                Problem(
                    f"{role} is a param that is {'not a single number' if rate.dims else 'not declared on the class'}.",
                    "Declare it without axes as a class attribute, above: rate = tttc.param(init=0.1).",
                    rate.where,
                )
            )
        elif not isinstance(rate, GateSpec | ParamSpec) and number(rate) is None:
            problems.append(
                Problem(
                    f"{role} is {short(rate)}.", "It must be a gate, a number or a param without axes.", update.where
                )
            )
    for role in ROLES:
        per_state = getattr(update, role)
        if isinstance(per_state, Mapping) and set(per_state) != set(states):
            problems.append(
                Problem(
                    f"{role} is given for {', '.join(sorted(per_state)) or 'nothing'}, "
                    f"but the states are {', '.join(states)}.",
                    f"Give {role} for each state, or one for all of them.",
                    update.where,
                )
            )
            continue
        for name, spec in states.items():
            found = update.of(role, name)
            if isinstance(found, GateSpec) and found.per == "channel" and found.axis not in spec.dims:
                problems.append(
                    Problem(
                        f"{role} is the gate `{found.name}`, one value per channel of {found.axis}, "
                        f"and state `{name}` has the axes {', '.join(spec.dims) or 'none'}.",
                        f"Give {role} for each state with a dict, or choose its axis: "
                        f'tttc.gate("{found.name}", per="channel", axis=...).',
                        found.where,
                    )
                )
    return problems


def _name_problems(
    states: Mapping[str, Any], params: Mapping[str, Any], tokens: Mapping[str, Any], gates: Mapping[str, GateSpec]
) -> list[Problem]:
    problems: list[Problem] = []
    attributes: dict[str, str] = {}
    for role, specs in (("state", states), ("param", params), ("token", tokens), ("gate", gates)):
        for name, spec in specs.items():
            if role != "gate" and name in attributes:
                what = f"`{name}` is both a {attributes[name]} and a {role}."
                problems.append(Problem(what, "Give one of them another name.", spec.where))
            elif role == "gate" and not (isinstance(name, str) and name.isidentifier()):
                what = f"gate `{name}` is not a name that a variable can have."
                problems.append(Problem(what, "Give it another name.", spec.where))
            elif role != "gate" and _is_of_every_declaration(name):
                what = f"{role} `{name}` is also what every declaration has under that name."
                problems.append(Problem(what, "Give it another name.", spec.where))
            if role != "gate":
                attributes[name] = role
            if not all(map(is_dim, spec.dims)):
                what = f"{role} `{name}` has the dims {spec.dims!r}."
                remedy = 'A dim is a name, such as "D"; its size is given to tttc.compile.'
                problems.append(Problem(what, remedy, spec.where))
    return problems


def _is_of_every_declaration(name: str) -> bool:
    """Whether an attribute of the class is a setting or a function that a declaration defines."""
    return name in vars(Variant) and not isinstance(vars(Variant)[name], classmethod)


def is_dim(name: Any) -> bool:
    """A dim is a name."""
    return isinstance(name, str) and name.isidentifier()


def class_line(variant: type[Variant]) -> SourceLine | None:
    """Where a class is written, if that is known. Its whole file is parsed for it: asked only for a problem."""
    import inspect

    try:
        file = inspect.getsourcefile(variant)
        _, line = inspect.getsourcelines(variant)
    except (OSError, TypeError, KeyError):  # no file; or, as TVM patches `inspect`, no such module
        return None
    return SourceLine(file, line) if file else None
