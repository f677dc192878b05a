"""The update rule in formulas: what one token does, what ends a mini-batch, where gradients are taken.

    S_t = momentum_t * S_(t-1) + lr_t * g_t
    W_t = decay_t * W_(t-1) - S_t

Everything is read off the rule and off the class of its gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tttc.ir.expr import Expr, is_const, leaf, leaves, rebuild, transform
from tttc.ir.names import spelled
from tttc.ir.program import SEQUENCE, EndStage, GradientClass, Plan, Update, end_leaf
from tttc.ir.text import Printer
from tttc.ir.update import accumulated, is_staged

RATES = ("lr", "tau", "momentum", "decay", "average")


class Line(NamedTuple):
    """A line of text; `deep` lines are formulas and stand further in."""

    text: str
    deep: bool = False


# -- rates -----------------------------------------------------------------------------------------------------------


def rate_text(rate: Expr, index: str = "") -> str:
    """A rate with an index at what differs from token to token: lr_t, tau_t * lr_t, gamma, 0.9."""
    if rate.op == "sub" and all(is_const(s) for s in rate.src):
        return f"{rate.src[0].arg - rate.src[1].arg:.12g}"

    def visit(e: Expr, src: tuple[Expr, ...]) -> Expr:
        at = index if e.op == "leaf" and e.role == "gate" else ""
        return leaf(f"{spelled(e.name)}{at}", "param", e.axes) if e.op == "leaf" else rebuild(e, src)

    return Printer()(transform([rate], visit)[0])


def _rest(rate: Expr) -> str:
    """1 - rate, at token t."""
    return f"{1 - rate.arg:.12g}" if is_const(rate) else f"(1 - {rate_text(rate, '_t')})"


def _times(rate: Expr | None, text: str) -> str:
    """rate_t * text; no rate is 1."""
    return text if rate is None or is_const(rate, 1) else f"{rate_text(rate, '_t')} * {text}"


# -- rules of states that are alike ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateRule:
    """The rule of states that have the same parts; where their rates differ, a rate is called by its role."""

    update: Update
    names: tuple[str, ...]
    rates: Mapping[str, Expr]
    base: str
    """What the rule adds to: the weights W, or the accumulator A that they are a view of."""

    @property
    def once(self) -> bool:
        """Whether momentum and decay act where the mini-batch ends."""
        return self.update.per == "mini_batch"

    @property
    def summed(self) -> bool:
        """Whether what the mini-batch has added is kept apart from the weights that it began with."""
        return "tau" in self.rates or is_staged(self.update)

    def each_token(self, role: str) -> Expr | None:
        """The momentum or the decay of single tokens."""
        return None if self.once else self.rates.get(role)


def rules(update: Update) -> list[StateRule]:
    """The states, those of one shape of rule together."""
    alike: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for w in update.states:
        n = w.name
        roles = tuple(role for role in RATES if getattr(update, role).get(n) is not None)
        alike.setdefault((roles, "W" if accumulated(update, w) is w else "A"), []).append(n)
    return [
        StateRule(update, tuple(names), {role: _shared_rate(update, role, names) for role in roles}, base)
        for (roles, base), names in alike.items()
    ]


def _shared_rate(update: Update, role: str, names: list[str]) -> Expr:
    given = dict.fromkeys(getattr(update, role)[n] for n in names)
    return next(iter(given)) if len(given) == 1 else leaf(role, "gate")


def _rates_by_state(rule: StateRule) -> list[str]:
    """Which rate is whose, where they differ."""
    said = []
    for role in rule.rates:
        owners: dict[str, list[str]] = {}
        for n in rule.names:
            owners.setdefault(rate_text(getattr(rule.update, role)[n]), []).append(n)
        if len(owners) > 1:
            said.append(f"{role} is {', '.join(f'{rate} for {listed(names)}' for rate, names in owners.items())}")
    return said


def channel_rates(update: Update) -> list[str]:
    """The rates that hold one value for each entry of an axis of their state."""
    found = {rate_text(r): r.axes for r in update.rates if r.axes}
    return [f"{name} has one value for each entry of {listed(a.size for a in axes)}" for name, axes in found.items()]


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)


# -- one token -----------------------------------------------------------------------------------------------------


def update_lines(update: Update, kind: GradientClass, plan: Plan) -> list[Line]:
    """The rule of one token, and of the end of a mini-batch where something acts there."""
    found = rules(update)
    where = "" if plan.free else f" of {_span(update)}"
    lines = [Line(f"for each token t{where}{_named(found[0].names) if len(found) == 1 else ''}:")]
    for rule in found:
        lines += heading(rule, found)
        lines += [Line(equation, deep=True) for equation in token_equations(rule)]
        lines += [Line(said) for said in _rates_by_state(rule)]
    lines += [Line(said) for said in channel_rates(update)]
    lines += [Line(said) for said in (_gradient_text(update, kind), *_beginnings(found), *_steps_text(update))]
    if is_staged(update):
        lines.append(Line(f"where a {_piece(update)} ends, with the values of its last token:"))
        for rule in found:
            lines += heading(rule, found)
            lines += [Line(equation, deep=True) for equation in end_equations(rule)]
    return lines


def _span(update: Update) -> str:
    if update.mini_batch is SEQUENCE:
        return "the sequence, which is one mini-batch"
    return f"a mini-batch of {'a single token' if update.mini_batch == 1 else f'{update.mini_batch} tokens'}"


def _named(names: tuple[str, ...]) -> str:
    """What W stands for, unless it is the name of the only state."""
    if names == ("W",):
        return ""
    return f", W being {names[0]}" if len(names) == 1 else f", W being each of {listed(names)}"


def heading(rule: StateRule, found: list[StateRule]) -> list[Line]:
    """Whose rule follows, where there are several."""
    return [Line(f"for W being {'each of ' if len(rule.names) > 1 else ''}{listed(rule.names)}:")] if found[1:] else []


def token_equations(rule: StateRule) -> list[str]:
    """S: momentum, U: what the mini-batch has added, a: what is left of the weights that it began with, V: average."""
    lines, step = _step_equations(rule)
    decay, tau, average = rule.each_token("decay"), rule.rates.get("tau"), rule.rates.get("average")
    if rule.summed:
        lines.append(f"U_t = {_times(decay, 'U_(t-1)')} + {step}")
        lines += [] if decay is None else [f"a_t = {_times(decay, 'a_(t-1)')}"]
        if not is_staged(rule.update) or rule.update.read in ("after", "before"):
            lines.append(f"W_t = {_started(decay, '_t')} - {_times(tau, 'U_t')}")
    else:
        lines.append(f"W_t = {_times(decay, 'W_(t-1)')} - {f'({step})' if ' + ' in step else step}")
    if average is not None:
        lines.append(f"V_t = {_rest(average)} * V_(t-1) + {_times(average, 'W_t')}")
    return lines


def _step_equations(rule: StateRule) -> tuple[list[str], str]:
    """Momentum, and what a token adds."""
    lr, mu = rule.rates["lr"], rule.each_token("momentum")
    step = _times(lr, "g_t")
    if mu is None:
        return [], step
    if rule.update.ema:
        return [f"S_t = {_times(mu, 'S_(t-1)')} + {_rest(mu)} * g_t"], _times(lr, "S_t")
    momentum = f"S_t = {_times(mu, 'S_(t-1)')} + {step}"
    return [momentum], f"{step} + {_times(mu, 'S_t')}" if rule.update.nesterov else "S_t"


def _started(decay: Expr | None, index: str) -> str:
    """What is left of the weights that the mini-batch began with."""
    return "W_start" if decay is None else f"a{index} * W_start"


def _gradient_text(update: Update, kind: GradientClass) -> str:
    """Where gradients are taken."""
    if kind.kind == "constant":
        where = "which does not depend on W"
    elif update.anchor == "mini_batch":
        where = f"at W_start, the weights that the {_piece(update)} began with"
    else:
        decays = update.decay.values() if update.decay_first else [None]
        where = f"at {' or '.join(dict.fromkeys(_times(r, 'W_(t-1)') for r in decays))}"
    clipped = "" if update.clip is None else f"; scaled down to the norm {update.clip:g}, that of all states together"
    return f"g_t is the gradient of the loss of token t, {where}{clipped}"


def _beginnings(found: list[StateRule]) -> list[str]:
    """What the variables beside the weights begin with."""
    said = []
    carried = ["S = 0"] if any("momentum" in rule.rates for rule in found) else []
    carried += ["V = W"] if any("average" in rule.rates for rule in found) else []
    if carried:
        said.append(f"{' and '.join(carried)} where the sequence begins")
    if any(rule.base == "A" for rule in found):
        said.append("A begins with the sequence, from the W that it is given")
    if any(rule.summed for rule in found):
        scaled = any(rule.summed and rule.each_token("decay") is not None for rule in found)
        said.append(f"U = 0{' and a = 1' if scaled else ''} where a {_piece(found[0].update)} begins")
    return ["; ".join(said)] if said else []


def _piece(update: Update) -> str:
    """What the rule is applied to at a time."""
    return "step" if update.steps > 1 else "mini-batch"


def _steps_text(update: Update) -> list[str]:
    if update.steps == 1:
        return []
    each = "each takes all of its tokens, from the weights that the one before left"
    return [f"{update.steps} steps on each mini-batch: {each}"]


# -- the end of a mini-batch ---------------------------------------------------------------------------------------


def end_equations(rule: StateRule) -> list[str]:
    """What acts where a mini-batch ends, in its order: U is what it added, W what it hands on."""
    lines = _once_equations(rule) if rule.once else []
    if "tau" in rule.rates:
        lines.append(f"U = {_times(rule.rates['tau'], 'U')}")
    lines += [_stage_text(s, "U", "U", rule) for s in _acting(rule) if s.on == "update"]
    decay = rule.rates.get("decay")
    left = f"{rule.base}_start" if rule.base == "W" else rule.base
    if decay is not None:
        left = f"{_mean(decay) if rule.once else 'a'} * {left}"
    lines.append(f"{rule.base} = {left} - U")
    now = rule.base
    for stage in (s for s in _acting(rule) if s.on != "update"):
        lines.append(_stage_text(stage, "W" if stage.on == "view" else now, now, rule))
        now = "W" if stage.on == "view" else now
    return lines


def _once_equations(rule: StateRule) -> list[str]:
    mu = rule.rates.get("momentum")
    if mu is None:
        return []
    lines = [f"S = {_mean(mu)} * S + U"]
    return [*lines, f"U = U + {_mean(mu)} * S" if rule.update.nesterov else "U = S"]


def _mean(rate: Expr) -> str:
    """The mean of a gate over the mini-batch; what is no gate is its own mean."""
    return f"mean({rate_text(rate)})" if rate.op == "leaf" and rate.role == "gate" else rate_text(rate)


def _acting(rule: StateRule) -> list[EndStage]:
    return [s for s in rule.update.at_end if any(n in s.values for n in rule.names)]


def _stage_text(stage: EndStage, target: str, given: str, rule: StateRule) -> str:
    """W = weight_norm(axis=0) of W; for which states, where it is not for all."""
    acted = [n for n in rule.names if n in stage.values]
    only = "" if len(acted) == len(rule.names) else f", for {listed(acted)}"
    kept = f" and of {given} where the sequence began" if stage.begins and stage.on == "weights" else ""
    return f"{target} = {stage.label} of {given}{_jointly(stage, rule.update)}{kept}{only}"


def _jointly(stage: EndStage, update: Update) -> str:
    own = {n: end_leaf(w).name for w in update.states for n in [w.name]}
    read = {n: {e.name for e in leaves([value]) if e.role == "end"} for n, value in stage.values.items()}
    return ", of all states together" if any(names - {own[n]} for n, names in read.items()) else ""


# -- what tokens read ----------------------------------------------------------------------------------------------


def read_text(update: Update, declared: str) -> str:
    """What a token reads; `declared` is what the declaration says, which for a single token may be another name."""
    said: dict[str, list[str]] = {}
    for rule in rules(update):
        said.setdefault(_read_from(rule), []).extend(rule.names)
    text = next(iter(said)) if len(said) == 1 else "; ".join(f"{listed(n)}: {what}" for what, n in said.items())
    single = "" if declared == update.read else f', in a mini-batch of a single token "{update.read}"'
    return f'"{declared}"{single}: {text}'


def _read_from(rule: StateRule) -> str:
    read, staged = rule.update.read, is_staged(rule.update)
    letter = "V" if "average" in rule.rates else "W"
    if read == "start":
        return f"z_t from {'W_start' if rule.update.steps == 1 else 'the weights that the mini-batch began with'}"
    if read == "after":
        return f"z_t from {letter}_t, which has seen token t"
    scaled = "tau" in rule.rates and not (staged and read == "end")
    if read == "before":
        return f"z_t from {_scaled_by_own_tau(rule, '_(t-1)')}" if scaled else f"z_t from {letter}_(t-1)"
    last = "" if rule.update.steps == 1 else ", after its last step"
    end = f"at the end of the mini-batch{last}: not causal inside it"
    if scaled:
        return f"z_t from {_scaled_by_own_tau(rule, '')}, with the values {end}"
    return f"z_t from {'V' if letter == 'V' else 'the weights'} {end}"


def _scaled_by_own_tau(rule: StateRule, index: str) -> str:
    decay = rule.each_token("decay")
    return f"{_started(decay, index)} - {_times(rule.rates['tau'], f'U{index}')}"
