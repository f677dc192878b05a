"""The update rule of a network's fast weights: `tttc.sgd`, once per chunk, for each sequence.

    S <- mu S + g                                       momentum, where there is any
    W <- alpha W - rate * lr * stage(S)                 stage: what `at_end` does to updates, such as tttc.clip_norm

g is the gradient of the chunk's mean loss. The stages see the update at rate one, so that a norm is clipped before a
learning rate, which may be warmed up, scales it. Stages on the weights act after that, on what the chunk hands on.
Nothing here is recorded or detached: under autograd every step is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.utils._pytree import register_dataclass, tree_map

from tttc.declare.number import number
from tttc.declare.specs import ParamSpec
from tttc.declare.update_rules import SGD, AtEnd, NoChunkForm, Rates
from tttc.errors import DeclarationError, Problem, problems_text

Tensors = dict[str, torch.Tensor]
USED_ROLES = ("lr", "momentum", "decay")


@dataclass(frozen=True)
class FastWeights:
    """What a sequence has learned: everything a chunk hands to the next, each tensor [B, *shape], by parameter.

    `accumulated` and `begun` are there where the rule has stages that need them: the accumulator that the weights are
    a function of, and what a stage remembers of the weights that a sequence began with.
    """

    weights: Tensors
    momentum: Tensors = field(default_factory=dict)
    accumulated: Tensors = field(default_factory=dict)
    begun: dict[str, Tensors] = field(default_factory=dict)


register_dataclass(FastWeights)


class InnerUpdate:
    """`rule` for the fast weights called `names`: how they begin, and a step."""

    def __init__(self, rule: SGD, names: Sequence[str]) -> None:
        problems = list(_problems(rule))
        if not problems:
            self.rule, self.names = rule, tuple(names)
            self.of = {role: _by_name(getattr(rule, role), names) for role in USED_ROLES}
            problems += _unmatched(rule, names)
        if problems:
            raise DeclarationError(problems_text("EndToEnd", problems))

    def learned_rates(self) -> dict[str, ParamSpec]:
        """The rates that the outer loop trains, `tttc.param`, by a name of their own: lr, or lr.0, lr.1 of several."""
        found: dict[str, ParamSpec] = {}
        for role, rates in self.of.items():
            own = list(dict.fromkeys(r for r in rates.values() if isinstance(r, ParamSpec)))
            found |= {role if len(own) == 1 else f"{role}_{i}": r for i, r in enumerate(own)}
        return found

    def initial_rates(self, like: torch.Tensor) -> Tensors:
        """What they begin with, as parameters beside this one."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        values = {n: float(spec.init) for n, spec in self.learned_rates().items() if not callable(spec.init)}
        return {n: torch.nn.Parameter(like.new_full((), x, dtype=dtype)) for n, x in values.items()}

    def begin(self, weights: Tensors) -> FastWeights:
        """Of weights [B, *shape] that sequences begin with."""
        momentum = {n: torch.zeros_like(w) for n, w in weights.items()} if self.rule.momentum is not None else {}
        accumulated: Tensors = {}
        begun: dict[str, Tensors] = {}
        for i, stage in enumerate(self.rule.at_end):
            own = {n: weights[n] for n in self._acted_on(stage)}
            start = {n: _of_each_sequence(stage.begin, w) for n, w in own.items()} if stage.begin else own
            if stage.on == "view":
                accumulated = accumulated | start
            elif stage.begin:
                begun[str(i)] = start
        return FastWeights(weights, momentum, accumulated, begun)

    def step(self, fast: FastWeights, gradient: Tensors, rate: Any, learned: Mapping[str, torch.Tensor]) -> FastWeights:
        """After a chunk whose mean loss has this gradient, [B, *shape] each. `rate` scales the learning rates;
        `learned` are the values of `learned_rates`.
        """
        rule, rates = self.rule, self._rates(learned)
        momentum, update = self._with_momentum(fast.momentum, gradient, rates["momentum"])
        for stage in rule.at_end:
            if stage.on == "update":
                update = update | self._applied(stage, update)
        before = fast.weights | fast.accumulated
        lr, decay = rates["lr"], rates["decay"]
        weights = {n: _stepped(_scaled(decay[n], w), rate * lr[n], update[n]) for n, w in before.items()}
        accumulated = fast.accumulated
        for i, stage in enumerate(rule.at_end):
            if stage.on == "view":
                accumulated = accumulated | {n: weights[n] for n in self._acted_on(stage)}
            if stage.on != "update":
                weights = weights | self._applied(stage, weights, fast.begun.get(str(i)))
        return FastWeights(weights, momentum, accumulated, fast.begun)

    def _with_momentum(self, before: Tensors, gradient: Tensors, mu: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
        """The momentum after a gradient, and the update that it makes, at rate one."""
        if self.rule.momentum is None:
            return {}, dict(gradient)
        new = {n: (1.0 - mu[n]) * g if self.rule.ema else g for n, g in gradient.items()}
        momentum = {n: mu[n] * before[n] + g for n, g in new.items()}
        if not self.rule.nesterov:
            return momentum, momentum
        return momentum, {n: g + mu[n] * momentum[n] for n, g in gradient.items()}

    def _rates(self, learned: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
        values = {spec: learned[n] for n, spec in self.learned_rates().items()}
        return {role: {n: values.get(r, r) for n, r in rates.items()} for role, rates in self.of.items()}

    def _acted_on(self, stage: AtEnd) -> tuple[str, ...]:
        """The weights that a stage acts on: those that its patterns match, or all."""
        if stage.states is None:
            return self.names
        return tuple(n for n in self.names if any(fnmatchcase(n, p) for p in stage.states))

    def _applied(self, stage: AtEnd, values: Tensors, begun: Tensors | None = None) -> Tensors:
        own = {n: values[n] for n in self._acted_on(stage)}
        if stage.joint:
            return dict(_of_each_sequence(stage.function, own))
        if begun:
            return {n: _of_each_sequence(stage.function, x, begun[n]) for n, x in own.items()}
        return {n: _of_each_sequence(stage.function, x) for n, x in own.items()}


def _scaled(decay: Any, weight: torch.Tensor) -> torch.Tensor:
    return weight if decay is None else decay * weight


def _stepped(weight: torch.Tensor, rate: Any, update: torch.Tensor) -> torch.Tensor:
    """In one pass where the rate is a number."""
    return weight - rate * update if isinstance(rate, torch.Tensor) else weight.sub(update, alpha=rate)


def _of_each_sequence(function: Callable[..., Any], *values: Any) -> Any:
    """`function` of whole weights, for each sequence: [B, *shape] in and out."""
    first = values[0] if isinstance(values[0], torch.Tensor) else next(iter(values[0].values()))
    with numbers_of(first.dtype):
        if len(first) != 1:
            return torch.vmap(function)(*values)
        return tree_map(lambda x: x[None], function(*tree_map(lambda x: x[0], values)))


@contextmanager
def numbers_of(dtype: torch.dtype) -> Iterator[None]:
    """Inside, a comparison times a number has at least this dtype: torch would give (x > 0) * 0.1 only 24 bits."""
    before = torch.get_default_dtype()
    if dtype != torch.float64 or before == dtype:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -- what is no rule of a network --------------------------------------------------------------------------------------


def _problems(rule: Any) -> Iterator[Problem]:
    if isinstance(rule, NoChunkForm):
        yield Problem(f"{rule.name} is not a rule of tttc.sgd.", rule.instead, rule.where)
        return
    if not isinstance(rule, SGD):
        yield Problem(f"update is {rule!r}.", "It is made by tttc.sgd, or None for a network that does not learn.")
        return
    once = "A network has one gradient per chunk of tokens, and"
    for role in USED_ROLES:
        given = getattr(rule, role)
        for rate in given.values() if isinstance(given, Mapping) else (given,):
            if rate is not None and number(rate) is None and not _scalar_param(rate):
                remedy = f"Give `{role}` a number or a tttc.param() without axes, or a dict of these by pattern."
                yield Problem(f"{once} no gate of a token: `{role}` is {rate!r}.", remedy, rule.where)
    if rule.clip is not None:
        remedy = f'Clip the update of a chunk: at_end=tttc.clip_norm({rule.clip:g}, scope="all").'
        yield Problem(f"{once} `clip` is of each token's.", remedy, rule.where)
    if rule.read_scale is not None:
        yield Problem(f"{once} its tokens read the weights before it: `read_scale` scales nothing.", "Leave it out.")
    if rule.decay_first:
        yield Problem(f"{once} takes it at the weights that the chunk read.", "Leave `decay_first` out.", rule.where)
    if rule.average is not None:
        remedy = "Leave `average` out: it would need a second pass per chunk, at the averaged weights."
        yield Problem(f"{once} it is taken where the loss is, at the weights themselves.", remedy, rule.where)


def _scalar_param(rate: Any) -> bool:
    return isinstance(rate, ParamSpec) and not rate.dims and not callable(rate.init)


def _by_name(rates: Rates | None, names: Sequence[str]) -> dict[str, Any]:
    """The rate of each weight: of a dict, that of the first pattern that matches its name."""
    if not isinstance(rates, Mapping):
        return dict.fromkeys(names, rates)
    return {n: next((r for p, r in rates.items() if fnmatchcase(n, p)), None) for n in names}


def _unmatched(rule: SGD, names: Sequence[str]) -> Iterator[Problem]:
    """Patterns that match no fast weight, and weights without a rate."""
    shown = ", ".join(f"`{n}`" for n in names[:3]) + (", ..." if len(names) > 3 else "")
    for role in USED_ROLES:
        given = getattr(rule, role)
        if not isinstance(given, Mapping):
            continue
        for pattern in given:
            if not any(fnmatchcase(n, pattern) for n in names):
                what = f"`{role}` is given for {pattern!r}, which matches no fast weight."
                yield Problem(what, f"The fast weights are {shown}.", rule.where)
        without = [n for n, r in _by_name(given, names).items() if r is None]
        if without:
            what = f"`{role}` says nothing of `{without[0]}`."
            yield Problem(what, 'Add a pattern that matches it, or "*" at the end for all others.', rule.where)
    for stage in rule.at_end:
        for pattern in stage.states or ():
            if not any(fnmatchcase(n, pattern) for n in names):
                what = f"{stage.label} acts on {pattern!r}, which matches no fast weight."
                yield Problem(what, f"The fast weights are {shown}.", stage.where)
