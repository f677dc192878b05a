"""What a chunk computes in place of single weights, in formulas: the rule itself, evaluated on words.

A = P(decay) @ P(momentum) @ diag(lr)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from tttc.explain.update_rule import RATES, Line, StateRule, channel_rates, heading, listed, rate_text, rules
from tttc.ir.expr import Expr, is_const, leaves
from tttc.ir.program import GradientClass, Plan, Update
from tttc.ir.text import Text
from tttc.ir.update import Advanced, Carried, advance, is_staged


class Coefficient(NamedTuple):
    sign: int
    text: Text


Words = Mapping[str, Coefficient]
"""A value along the tokens of a chunk: "g" has the matrix before the gradients, other letters the coefficients of what
the chunk found. An empty text is the identity, or ones."""

GRADIENT_WORDS: Words = {"g": Coefficient(1, Text(""))}


class ChunkWords:
    """The algebra of `ChunkAlgebra` (ir/response.py) on text: every matrix by the name of what it is made of."""

    def recur(self, before: Words | None, decay: Expr | None, added: Words) -> Words:
        rate = "1" if decay is None else rate_text(decay)
        result = {k: Coefficient(c.sign, _propagated(k, rate, c.text)) for k, c in added.items()}
        for k, c in (before or {}).items():
            result[k] = c if decay is None else Coefficient(c.sign, Text(f"cumprod({rate})"))
        return result

    def scaled(self, x: Words, rate: Expr) -> Words:
        if is_const(rate, 1):
            return x
        return {k: Coefficient(c.sign, _scaled(k, rate, c.text)) for k, c in x.items()}

    def plus(self, x: Words, y: Words) -> Words:
        result = dict(x)
        for k, c in y.items():
            one = result.get(k)
            result[k] = c if one is None else Coefficient(one.sign, _sum(one.text, c.text))
        return result

    def minus(self, x: Words, y: Words) -> Words:
        return self.plus(x, {k: Coefficient(-c.sign, c.text) for k, c in y.items()})

    def started(self, scale: None, decay: Expr | None, start: str) -> tuple[None, Words]:
        return None, {start: Coefficient(1, Text("" if decay is None else f"cumprod({rate_text(decay)})"))}


def _propagated(letter: str, rate: str, inner: Text) -> Text:
    if letter == "g":
        return Text(f"P({rate}) @ {inner.at_least(2)}", 2) if inner.text else Text(f"P({rate})")
    return Text(f"cumsum({inner.text})") if rate == "1" else Text(f"P({rate}) @ {inner.at_least(3)}", 2)


def _scaled(letter: str, rate: Expr, inner: Text) -> Text:
    name, varies = rate_text(rate), any(e.role == "gate" for e in leaves([rate]))
    if letter == "g":
        return Text(f"diag({name}) @ {inner.at_least(2)}", 2) if inner.text else Text(f"diag({name})")
    if inner.text or not varies:
        return Text(f"{name} * {inner.at_least(3) if inner.text else 'ones'}", 2)
    return Text(name, 5 if rate.op == "leaf" else 2)


def _sum(x: Text, y: Text) -> Text:
    return Text(f"{x.text or 'I'} + {y.text or 'I'}", 1)


@dataclass(frozen=True)
class ChunkFormulas:
    """What one chunk computes for states of one rule: `target` in terms of A, and what A and the other letters are."""

    target: str
    formula: str
    matrix: str
    letters: Mapping[str, str]
    found: tuple[str, ...]
    """What the chunk finds: W the weights, S momentum, U what its mini-batch has added, V the average."""

    @property
    def lines(self) -> list[str]:
        """As text."""
        letters = ", ".join(f"{letter} = {text}" for letter, text in self.letters.items())
        return [f"{self.target}_t = {self.formula}", self.matrix, *([letters] if letters else [])]


def chunk_formulas(rule: StateRule, tiled: bool) -> ChunkFormulas:
    """The rule over a chunk: U, or the weights W, or their average V."""
    advanced = _advanced(rule, tiled)
    target = "V" if "average" in rule.rates else "U" if rule.summed else "W"
    words: Words = {"V": advanced.average, "U": advanced.added, "W": advanced.weights}[target]
    letters: dict[str, str] = {}
    terms = []
    found = tuple(k for k in "VWSU" if k in words)
    for k in found:
        text = words[k].text.text
        letter = next((n for n, t in letters.items() if t == text), None) or "cdefh"[len(letters)]
        if text:
            letters[letter] = text
        terms.append((words[k].sign, f"{letter}_t * {k}" if text else k))
    terms.append((words["g"].sign, "sum over s of A[t, s] * g_s"))
    return ChunkFormulas(target, _signed(terms), _matrix_text(rule, words["g"].text.text), letters, found)


def _advanced(rule: StateRule, tiled: bool) -> Advanced:
    """The rule on words; a tile of an open mini-batch finds what that has added, too."""

    def given(letter: str, present: bool) -> Words | None:
        return {letter: Coefficient(1, Text(""))} if present else None

    name = rule.names[0]
    rates: dict[str, dict[str, Expr | None]] = {role: {name: rule.rates.get(role)} for role in RATES}
    update = replace(rule.update, **rates)  # type: ignore[arg-type]
    momentum = given("S", rule.each_token("momentum") is not None)
    carried = Carried("W", given("U", tiled and rule.summed), None, momentum, given("V", "average" in rule.rates))
    return advance(update, name, carried, GRADIENT_WORDS, ChunkWords())


def _signed(terms: list[tuple[int, str]]) -> str:
    text = ""
    for sign, term in terms:
        text += (f" {'+' if sign > 0 else '-'} " if text else "" if sign > 0 else "-") + term
    return text


def _matrix_text(rule: StateRule, matrix: str) -> str:
    """A triangle of ones times a diagonal by its entries, anything else as a product."""
    recurs = rule.each_token("momentum") or rule.each_token("decay") or rule.rates.get("average")
    return f"A = {matrix}" if recurs else f"A[t, s] = {rate_text(rule.rates['lr'], '_s')} where s <= t, else 0"


_ROWS = {
    "after": "token t reads with row t of A: what s <= t taught",
    "before": "token t reads with row t - 1 of A: what s < t taught",
    "start": "no token reads what another of its mini-batch taught: the last row of A makes what is handed on",
    "end": "every token reads with the last row of A: what the whole mini-batch taught",
}


def form_lines(update: Update, kind: GradientClass, plan: Plan, unknown: str) -> list[Line]:
    """How a chunk is computed; `unknown` is the part of an online gradient that depends on the weights."""
    if kind.sequential and not plan.substitution:
        return [Line("token by token: every gradient waits for the weights that the token before left")]
    lines = [Line("dual: a chunk at once in matrix products, the weights of no single token")]
    found = rules(update)
    formulas = [(rule, chunk_formulas(rule, plan.tiled)) for rule in found]
    for rule, made in formulas:
        lines += heading(rule, found)
        lines += [Line(text, deep=True) for text in made.lines]
    written = " ".join(text for _, made in formulas for text in made.lines)
    if "P(" in written:
        lines.append(Line("P(x)[t, s] = x_(s+1) * ... * x_t where s <= t, else 0", deep=True))
    if channel_rates(update):
        lines.append(Line("what a rate of channels is part of has an entry for each channel, and is no single matrix"))
    if kind.kind == "affine":
        lines.append(Line(_system_text(unknown)))
    if plan.substitution:
        lines.append(Line(_SUBSTITUTION))
    letters = [letter for letter in "VWSU" if any(letter in made.found for _, made in formulas)]
    handed_on = update.read == "end" and is_staged(update)
    reading = "every token reads the weights that the mini-batch hands on" if handed_on else _ROWS[update.read]
    return [*lines, *_pieces(update, plan, letters), Line(reading)]


_SUBSTITUTION = (
    "the gradients of a chunk come first, one token after the other: that of token s is taken at what row s - 1 of A "
    "and the gradients before it make of W"
)


def _system_text(unknown: str) -> str:
    return (
        f"gradients of a chunk: u_s = {unknown} depends on the u of earlier tokens through row s - 1 of A, which makes "
        "one system (I + N) u = r; N is strictly lower triangular, r what u would be if the chunk taught nothing"
    )


def _pieces(update: Update, plan: Plan, found: list[str]) -> list[Line]:
    """What the letters of a chunk stand for, and what a longer mini-batch hands from one piece of it to the next."""
    lines = [Line(f"{listed(found)}: as the chunk finds {'them' if found[1:] else 'it'}")] if found else []
    if plan.tiled:
        lines.append(Line("a chunk is a tile of its mini-batch, and hands on what that has added so far"))
    if update.steps > 1:
        lines.append(Line("so for each step, with the gradients of that step and the W that the one before left"))
    return lines
