"""The settings of a declaration and its update rule: what contradicts what, and what exists only at the ends of
mini-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tttc.declare.declared import short
from tttc.declare.number import number, whole
from tttc.declare.specs import GateSpec, ParamSpec
from tttc.declare.update_rules import ROLES, SGD, AtEnd, NoChunkForm, Rate
from tttc.declare.variant import ANCHORS, READS, Signature, class_line
from tttc.errors import Problem


def rates_of(update: Any) -> list[tuple[str, Rate]]:
    """Every rate that a rule is given, with its role; none of what is no such rule."""
    given = [(role, getattr(update, role)) for role in ROLES] if isinstance(update, SGD) else []
    each = [(role, r) for role, rates in given for r in (rates.values() if isinstance(rates, Mapping) else [rates])]
    return [(role, rate) for role, rate in each if rate is not None]


def setting_problems(declared: Signature) -> list[Problem]:
    """Of what is written beside the functions."""
    variant = declared.variant
    problems = [Problem(what, remedy, class_line(variant)) for what, remedy in _of_settings(declared)]
    return [*problems, *_other_rules(variant)]


Found = Iterator[tuple[str, str]]
"""What is wrong, and the way out."""


def _of_settings(declared: Signature) -> Found:
    variant, b = declared.variant, declared.variant.mini_batch
    if not declared.states:
        yield "no fast weight is declared.", 'Declare at least one: W = tttc.state("D", "D").'
    if not (b == "all" if isinstance(b, str) else (whole(b) or 0) >= 1):
        yield f"mini_batch is {b!r}.", 'It must be a positive int or "all".'
    if variant.read not in READS:
        yield f"read is {variant.read!r}.", f"It must be one of {', '.join(READS)}."
    if variant.anchor not in ANCHORS:
        online = '"token" (at the weights that the token before left)'
        remedy = f'It must be "mini_batch" (gradients at the weights that the mini-batch started from) or {online}.'
        yield f"anchor is {variant.anchor!r}.", remedy
    if (whole(variant.steps) or 0) < 1:
        yield f"steps is {variant.steps!r}.", "It must be a positive int."
    if not isinstance(variant.qk_norm, bool):
        yield f"qk_norm is {variant.qk_norm!r}.", "It must be True, for q and k of length one, or False."


def _other_rules(variant: Any) -> Iterator[Problem]:
    """What is no rule of `tttc.sgd`."""
    update = variant.update
    if isinstance(update, NoChunkForm):
        what = f"{update.name} has no exact chunked form: {update.reason}."
        yield Problem(what, update.instead, update.where, True)
    elif isinstance(update, AtEnd):
        what = f"{update.label} is not linear in the gradients: token by token it would take a weight matrix each."
        remedy = f'Use it where the mini-batch ends: tttc.sgd(lr=..., at_end={update.label}), read="start" or "end".'
        yield Problem(what, remedy, update.where, True)
    elif not isinstance(update, SGD):
        remedy = 'It must be made by tttc.sgd: tttc.sgd(lr=tttc.gate("lr")).'
        yield Problem(f"update is {short(update)}.", remedy, class_line(variant))


def rule_problems(declared: Signature) -> list[Problem]:
    """Of the rates, of settings that contradict each other, and of what acts where a mini-batch ends."""
    if not isinstance(declared.update, SGD):
        return []
    return [
        *_rates_of_no_kind(declared),
        *_rates_of_other_states(declared),
        *_contradictions(declared.update, declared),
        *_stage_problems(declared),
    ]


def _contradictions(update: SGD, declared: Signature) -> list[Problem]:
    kinds = (_of_momentum_and_decay, _of_read_scale_and_average, _of_steps, _of_per)
    return [Problem(what, remedy, update.where) for found in kinds for what, remedy in found(update, declared)]


def _of_momentum_and_decay(update: SGD, declared: Signature) -> Found:
    if (update.nesterov or update.ema) and update.momentum is None:
        yield f"{'nesterov' if update.nesterov else 'ema'} is set, but there is no momentum.", "Give momentum=."
    if update.nesterov and update.ema:
        yield "nesterov and ema are both set.", "They are two forms of momentum: choose one."
    online = declared.anchor == "token" or (declared.mini_batch == 1 and declared.steps == 1)
    if update.decay_first and (update.decay is None or not online):
        why = "there is no decay." if update.decay is None else 'anchor is "mini_batch".'
        what = f"decay_first says that an online gradient is taken at the decayed weights, but {why}"
        yield what, "Leave it out." if update.decay is None else 'Set anchor = "token", or leave it out.'


def _of_read_scale_and_average(update: SGD, declared: Signature) -> Found:
    if update.read_scale is not None and declared.anchor == "token" and declared.mini_batch != 1:
        what = 'read_scale scales what a mini-batch adds, but anchor="token" takes each gradient at the token before.'
        yield what, 'Fold it into lr, or set anchor = "mini_batch".'
    several = (declared.steps or 1) > 1
    if update.average is not None and (update.read_scale is not None or several or update.at_end):
        what = "average is combined with read_scale, steps or at_end."
        yield what, "An averaged reading takes the rule as it is, once per token: leave the others out."


def _of_steps(update: SGD, declared: Signature) -> Found:
    steps = declared.steps or 1
    views = any(isinstance(s, AtEnd) and s.on == "view" for s in update.at_end)
    if steps > 1 and (declared.anchor == "token" or declared.read in ("after", "before")):
        what = f'steps is {steps}, with read="{declared.read}" and anchor="{declared.anchor}".'
        remedy = 'Several steps are taken on a whole mini-batch: set read = "end" or "start", anchor = "mini_batch".'
        yield what, remedy
    if steps > 1 and (update.momentum is not None or views):
        what = f"steps is {steps}, and the rule carries more than weights from step to step."
        yield what, "Leave momentum and views out, or set steps = 1."
    if update.average is not None and declared.read == "start":
        what = 'read="start" reads the weights before the mini-batch, average the mean of all so far.'
        yield what, 'Set read = "before" or "after", or leave average out.'


def _of_per(update: SGD, declared: Signature) -> Found:
    once = update.per == "mini_batch"
    if update.per not in ("token", "mini_batch"):
        yield f"per is {update.per!r}.", 'It must be "token" or "mini_batch".'
    if once and (declared.anchor == "token" or declared.read in ("after", "before")):
        what = 'per="mini_batch" takes the mean of the gates over the mini-batch: a token inside it cannot know that.'
        yield what, 'Set read = "start" or "end" and anchor = "mini_batch", or per="token".'
    if once and (update.ema or update.average is not None):
        yield 'per="mini_batch" has no ema and no average.', "Use momentum and decay."
    if update.clip is not None and not (number(update.clip) or 0) > 0:
        yield f"clip is {short(update.clip)}.", "It must be a positive number."


# -- stages ------------------------------------------------------------------------------------------------------------


def _stage_problems(declared: Signature) -> list[Problem]:
    update, states = declared.update, declared.states
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
        if declared.read not in ("start", "end") or declared.anchor == "token":
            what = (
                f"{stage.label} makes the weights a nonlinear function of what the rule accumulates, and "
                f'read="{declared.read}", anchor="{declared.anchor}" use the weights of single tokens.'
            )
            remedy = 'Apply it where the mini-batch ends: set read = "start" or "end", anchor = "mini_batch".'
            problems.append(Problem(what, remedy, where, True))
        again = sorted(viewed & set(stage.of(states)))
        if again:
            problems.append(Problem(f"{', '.join(again)} is given two views.", "Give each state one.", where))
        viewed |= set(stage.of(states))
    return problems


# -- rates -------------------------------------------------------------------------------------------------------------


def _rates_of_no_kind(declared: Signature) -> Iterator[Problem]:
    for role, rate in rates_of(declared.update):
        if isinstance(rate, ParamSpec) and (rate.dims or not any(rate is p for p in declared.params.values())):
            what = f"{role} is a param that is {'not a single number' if rate.dims else 'not declared on the class'}."
            remedy = "Declare it without axes as a class attribute, above: rate = tttc.param(init=0.1)."
            yield Problem(what, remedy, rate.where)
        elif not isinstance(rate, GateSpec | ParamSpec) and number(rate) is None:
            remedy = "It must be a gate, a number or a param without axes."
            yield Problem(f"{role} is {short(rate)}.", remedy, declared.update.where)


def _rates_of_other_states(declared: Signature) -> Iterator[Problem]:
    """Rates for each state that are not for each, and channels of an axis that a state does not have."""
    update, states = declared.update, declared.states
    for role in ROLES:
        per_state = getattr(update, role)
        if isinstance(per_state, Mapping) and set(per_state) != set(states):
            given = ", ".join(sorted(per_state)) or "nothing"
            what = f"{role} is given for {given}, but the states are {', '.join(states)}."
            yield Problem(what, f"Give {role} for each state, or one for all of them.", update.where)
            continue
        for name, spec in states.items():
            found = update.of(role, name)
            if isinstance(found, GateSpec) and found.per == "channel" and found.axis not in spec.dims:
                yield Problem(
                    f"{role} is the gate `{found.name}`, one value per channel of {found.axis}, "
                    f"and state `{name}` has the axes {', '.join(spec.dims) or 'none'}.",
                    f"Give {role} for each state with a dict, or choose its axis: "
                    f'tttc.gate("{found.name}", per="channel", axis=...).',
                    found.where,
                )
