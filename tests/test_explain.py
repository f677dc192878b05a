"""What `explain` says: the class and the chunk with their reasons, every stage as it is, LaTeX that closes."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sympy

import tttc
from tests.helpers import LIBRARY, compiled, dims_of, inputs_for, keywords
from tttc.explain.chunk_form import chunk_formulas
from tttc.explain.costs import StageCost, layer_cost, program_costs
from tttc.explain.report import explain, summary
from tttc.explain.update_rule import StateRule, end_equations, rules, token_equations
from tttc.ir import build as b
from tttc.ir import cost
from tttc.ir.expr import Axis, Expr, leaf
from tttc.ir.latex import LatexPrinter, name_latex, program_latex
from tttc.ir.program import S_AXIS, T_AXIS
from tttc.library import TTTMLP, GatedThreeLayer, LinearAttention, TTTLinear
from tttc.runtime.layer import Layer

LR, MOMENTUM, DECAY = tttc.gate("lr"), tttc.gate("momentum"), tttc.gate("decay")


class Regression(LinearAttention):
    """A gradient that is affine in the weights, frozen."""

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)


VARIANTS = LIBRARY | {
    "linear": TTTLinear,
    "mlp": TTTMLP,
    "attention": LinearAttention,
    "gated": GatedThreeLayer,
    "end": TTTLinear.replace(read="end"),
    "start": TTTMLP.replace(read="start"),
    "all": TTTLinear.replace(mini_batch="all"),
    "all at the end": TTTLinear.replace(mini_batch="all", read="end"),
    "before": TTTMLP.replace(read="before", mini_batch=4),
    "clipped": Regression.replace(update=tttc.sgd(lr=LR, clip=0.5)),
    "clipped online": Regression.replace(update=tttc.sgd(lr=LR, clip=0.5), anchor="token"),
    "online": TTTMLP.replace(mini_batch=1),
    "single": Regression.replace(read="start", mini_batch=1),
    "averaged": Regression.replace(update=tttc.sgd(lr=LR, decay=DECAY, average=tttc.gate("rho"))),
    "nesterov": Regression.replace(update=tttc.sgd(lr=LR, decay=0.9, momentum=MOMENTUM, nesterov=True)),
    "ema": Regression.replace(update=tttc.sgd(lr=LR, momentum=MOMENTUM, ema=True)),
    "clip_norm": TTTMLP.replace(read="end", update=tttc.sgd(lr=LR, at_end=tttc.clip_norm(1.0, "all"))),
}


@cache
def layer(name: str) -> Layer:
    return tttc.compile(VARIANTS[name], dims_of(VARIANTS[name], 8))


@cache
def flat(name: str) -> str:
    """The head of the explanation, without its line breaks."""
    head, _, _ = explain(layer(name)).partition("# stage 1 of")
    return " ".join(head.replace("#", " ").split())


# -- what it says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("linear", "dW1, db1: nonlinear in W1, b1, made so by x ** 2"),
        ("linear", "the chunk is the mini-batch"),
        ("linear", "2 dependent contractions per chunk, T/8 in a call"),
        ("linear", "torch: TTTC_BACKEND asks for it"),
        ("linear", "U_t = U_(t-1) + lr_t * g_t W_t = W_start - tau_t * U_t"),
        ("linear", "A[t, s] = lr_s where s <= t, else 0"),
        ("linear", "of a mini-batch of 16 tokens, W being each of W1, b1:"),
        ("mlp", "4 dependent contractions per chunk"),
        ("attention", "64 tokens; the gradients do not depend on the weights: the chunk is free"),
        ("attention", "no contraction waits for the one of an earlier chunk"),
        ("end", "not causal"),
        ("end", 'read="end": every token reads the end of its mini-batch'),
        ("end", "z_t from W_start - tau_t * U, with the values at the end"),
        ("start", "no token reads what another of its mini-batch taught"),
        ("all", "the mini-batch is the whole sequence: it is cut into tiles"),
        ("all", "a chunk is a tile of its mini-batch"),
        ("all", "2 dependent contractions per mini-batch, 2 in a call"),
        ("all at the end", "chunk the whole sequence"),
        ("before", "z_t from W_start - tau_t * U_(t-1)"),
        ("gated", "lr is lr for W1, W2, W3, lr_gate for Wg"),
        ("clipped", "scaled down to the norm 0.5, that of all states together"),
        ("clipped", "before clipping they are, in the weights, affine"),
        ("clipped online", "token by token: every gradient waits"),
        (
            "online",
            "class sequential: a gradient is a product of several values that depend on the weights: one token "
            "after the other; in the weights they are nonlinear, made so by x1 = gelu(x)",
        ),
        ("online", "the gradients of a chunk come first, one token after the other"),
        ("online", "6 more for each further token, 6*T in a call"),
        ("clipped online", "chunk 1 token; "),
        ("clipped online", "3 dependent contractions per token, 3*T in a call"),
        ("single", '"start", in a mini-batch of a single token "before": z_t from W_(t-1)'),
        ("averaged", "V_t = (1 - rho_t) * V_(t-1) + rho_t * W_t"),
        ("averaged", "A = P(1 - rho) @ diag(rho) @ P(decay) @ diag(lr)"),
        ("nesterov", "W_t = 0.9 * W_(t-1) - (lr_t * g_t + momentum_t * S_t)"),
        ("nesterov", "A = P(0.9) @ (diag(lr) + diag(momentum) @ P(momentum) @ diag(lr))"),
        ("ema", "S_t = momentum_t * S_(t-1) + (1 - momentum_t) * g_t W_t = W_(t-1) - lr_t * S_t"),
        ("clip_norm", 'U = clip_norm(1, "all") of U, of all states together W = W_start - U'),
        ("Titans", "S_t = momentum_t * S_(t-1) + lr_t * g_t W_t = decay_t * W_(t-1) - S_t"),
        ("Titans", "A = P(decay) @ P(momentum) @ diag(lr)"),
        ("GatedDeltaNet", "at decay_t * W_(t-1)"),
        ("GatedDeltaNet", "one system (I + N) u = r"),
        ("GatedDeltaNet", "3 dependent contractions per chunk, a triangular solve counted as one of them"),
        ("KDA", "decay has one value for each entry of D"),
        ("Longhorn", "u_s = rate * (k @ W - v)"),
        ("LaCT", "S = mean(momentum) * S + U U = S U = muon(5) of U W = W_start - U W = weight_norm(axis=0) of W"),
        ("LaCT", "lr is lr0 for W0, lr1 for W1, lr2 for W2"),
        ("Moneta", "A = a * A - U W = power_norm(4) of A"),
        ("MTTT", "2 steps on each mini-batch"),
        ("ViTTT", "every token reads the weights that the mini-batch hands on"),
        ("RetNet", "W_t = gamma * W_(t-1) - g_t"),
    ],
)
def test_says(name: str, said: str) -> None:
    assert said in flat(name)


CONSTANT = "constant: the gradients do not depend on the weights"
AFFINE = "affine: the gradients are affine in the weights: one triangular system per chunk; made so by k @ W - v"
FROZEN = "frozen: gradients are taken at the mini-batch's start; in the weights they are nonlinear, made so by "
CLASSES = dict.fromkeys(("LinearAttention", "RetNet", "Mamba2", "GLA"), CONSTANT)
CLASSES |= dict.fromkeys(("DeltaNet", "GatedDeltaNet", "KDA", "MomentumDeltaNet", "Longhorn"), AFFINE)
CLASSES |= dict.fromkeys(("Titans", "Yaad", "Moneta"), FROZEN + "x = gelu(p)")
CLASSES |= dict.fromkeys(("TTTMLP", "TTTVideo"), FROZEN + "x1 = gelu(x)")
CLASSES |= {
    "TTTLinear": FROZEN + "x ** 2",
    "LaCT": FROZEN + "p * p1",
    "MTTT": FROZEN + "x2 ** 2; a further step takes them where it begins",
    "ViTTT": FROZEN + "silu(p)",
    "GatedThreeLayer": FROZEN + "x = silu(p)",
}


@pytest.mark.parametrize("name", LIBRARY)
def test_class_and_the_operation_that_decided_it(name: str) -> None:
    assert f"class {CLASSES[name]} " in flat(name)


@pytest.mark.parametrize("name", ["GatedDeltaNet", "Titans", "LaCT"])
def test_the_head_of_an_explanation_word_for_word(name: str, golden: Callable[[str, str], None]) -> None:
    """`--update-golden` accepts the new text; that of the stages is golden elsewhere."""
    golden(f"explain/{name}", explain(layer(name), stages=[]))


@pytest.mark.parametrize("name", LIBRARY)
def test_the_summary_is_a_page_that_says_what_the_whole_says(name: str) -> None:
    """The rule, the class, the form, the costs and the backend, each as the explanation has it."""
    text = summary(layer(name))
    assert len(text.splitlines()) <= 60
    items = re.split(r"^(?=\w)", text.partition("\n\n")[2], flags=re.MULTILINE)
    said = {item[:15].strip(): " ".join(item[15:].split()) for item in items if item}
    own = {"loss", "output", "costs", "token by token"}
    assert own | {"update", "read", "class", "form", "backend", "forward", "backward", "state"} <= set(said)
    assert [item for item, words in said.items() if item not in own and f"{item} {words}" not in flat(name)] == []


def test_the_summary_has_the_loss_and_the_output_as_formulas() -> None:
    lines = summary(layer("TTTLinear")).splitlines()
    assert "loss           0.5 * sum((k + layer_norm(k @ W1 + b1, gamma, beta, eps=1e-06) - v) ** 2)" in lines
    assert "output         q + layer_norm(q @ W1 + b1, gamma, beta, eps=1e-06)" in lines


@pytest.mark.parametrize("name", VARIANTS)
def test_stages_are_verbatim_and_all_else_is_comment(name: str) -> None:
    text = explain(layer(name))
    for entry in layer(name).stages:
        assert str(entry) in text
        ast.parse(str(entry))
        text = text.replace(str(entry), "\n")
    assert all(line.startswith("#") for line in text.splitlines() if line)
    assert max(len(line) for line in text.splitlines()) <= 110


def test_stages_can_be_chosen() -> None:
    text = explain(layer("mlp"), stages=["emit"])
    assert layer("mlp").source in text
    assert str(layer("mlp").stages["dualize"]) not in text
    with pytest.raises(KeyError, match="no stage 'dual'"):
        explain(layer("mlp"), stages=["dual"])


def test_layer_explains_itself() -> None:
    assert layer("mlp").explain() == explain(layer("mlp"))
    assert layer("mlp").explain(latex=True).startswith("\\documentclass")


# -- the formulas hold -------------------------------------------------------------------------------------------------

TOKENS = 5
RATES = {"lr": LR, "momentum": MOMENTUM, "decay": DECAY, "average": tttc.gate("rho"), "read_scale": tttc.gate("tau")}
RULES = {
    "plain": ("lr",),
    "momentum": ("lr", "momentum"),
    "decay": ("lr", "decay"),
    "momentum, decay": ("lr", "momentum", "decay"),
    "average": ("lr", "average"),
    "average, momentum, decay": ("lr", "average", "momentum", "decay"),
    "tau": ("lr", "read_scale"),
    "tau, decay": ("lr", "read_scale", "decay"),
    "tau, momentum, decay": ("lr", "read_scale", "momentum", "decay"),
}
FORMS = ("plain", "nesterov", "ema")
CASES = [(name, form) for name, parts in RULES.items() for form in FORMS if form == "plain" or "momentum" in parts]
GIVEN = {"W": 0.7, "S": -0.4, "V": 0.2}


def rule_of(parts: tuple[str, ...], numbers: bool = False, **settings: object) -> StateRule:
    """The rule with gates, or with the number 0.9 for everything but tau."""
    rates = {role: 0.9 if numbers and role != "read_scale" else RATES[role] for role in parts}
    variant = Regression.replace(update=tttc.sgd(**rates, **settings), mini_batch=TOKENS, read="end")
    (rule,) = rules(tttc.compile(variant, {"D": 2}).stages.program.update)
    return rule


def rate_values(numbers: bool) -> dict[str, np.ndarray]:
    """One value per token for every gate, and the gradients."""
    generator = np.random.default_rng(0)
    names = ("lr", "momentum", "decay", "rho", "tau", "g")
    drawn = {n: generator.uniform(0.2, 1.0, TOKENS) for n in names}
    return {n: np.full(TOKENS, 0.9) if numbers and n not in ("tau", "g") else x for n, x in drawn.items()}


def definition(parts: tuple[str, ...], form: str, at: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values after each token, by the definition, on numbers instead of tensors."""
    mu, decay, rho, tau = (
        at[n] if role in parts else None
        for role, n in (("momentum", "momentum"), ("decay", "decay"), ("average", "rho"), ("read_scale", "tau"))
    )
    S, V, U, a = GIVEN["S"], GIVEN["V"], 0.0, 1.0
    found: dict[str, list[float]] = {n: [] for n in "WSUV"}
    for t in range(TOKENS):
        step = at["lr"][t] * at["g"][t]
        if mu is not None and form == "ema":
            S = mu[t] * S + (1 - mu[t]) * at["g"][t]
            step = at["lr"][t] * S
        elif mu is not None:
            S = mu[t] * S + step
            step = step + mu[t] * S if form == "nesterov" else S
        U, a = (U, a) if decay is None else (decay[t] * U, decay[t] * a)
        U += step
        W = a * GIVEN["W"] - (1 if tau is None else tau[t]) * U
        V = V if rho is None else (1 - rho[t]) * V + rho[t] * W
        for n, value in (("W", W), ("S", S), ("U", U), ("V", V)):
            found[n].append(value)
    return {n: np.array(values) for n, values in found.items()}


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_equations_of_a_token_are_the_rule(name: str, form: str, numbers: bool) -> None:
    """The printed lines are run, one token after the other."""
    parts, at = RULES[name], rate_values(numbers)
    equations = token_equations(rule_of(parts, numbers, **{form: True} if form != "plain" else {}))
    wanted = definition(parts, form, at)
    now = {**GIVEN, "U": 0.0, "a": 1.0}
    for t in range(TOKENS):
        before = now
        now = {n: x[t] for n, x in at.items()} | {"W_start": GIVEN["W"]}
        for equation in equations:
            target, _, value = equation.partition(" = ")
            value = re.sub(r"(\w+)_\(t-1\)", r"before['\1']", value)
            value = re.sub(r"\b(\w+)_t\b", r"now['\1']", value).replace("W_start", "now['W_start']")
            now[target.removesuffix("_t")] = eval(value, {"before": before, "now": now})
        for n in set(now) & set("WSUV"):
            assert now[n] == pytest.approx(wanted[n][t], rel=1e-12)
    assert {"W"} | ({"S"} if "momentum" in parts else set()) <= set(now)


def segments(x: object) -> np.ndarray:
    """P(x) of the printed form."""
    x = np.broadcast_to(np.asarray(x, float), TOKENS)
    rows = range(TOKENS)
    return np.array([[np.prod(x[s + 1 : t + 1]) if s <= t else 0.0 for s in rows] for t in rows])


NUMPY = {
    "P": segments,
    "I": np.eye(TOKENS),
    "ones": np.ones(TOKENS),
    "diag": lambda x: np.diag(np.broadcast_to(x, TOKENS)),
    "cumprod": lambda x: np.cumprod(np.broadcast_to(x, TOKENS)),
    "cumsum": np.cumsum,
}


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_matrix_of_a_chunk_is_the_rule(name: str, form: str, numbers: bool, tiled: bool) -> None:
    """The printed formulas are run on the values of all tokens at once."""
    parts, at = RULES[name], rate_values(numbers)
    rule = rule_of(parts, numbers, **{form: True} if form != "plain" else {})
    made = chunk_formulas(rule, tiled)
    scope = NUMPY | at | GIVEN | {"U": 0.3}
    entries = re.fullmatch(r"A\[t, s\] = (.*) where s <= t, else 0", made.matrix)
    text = made.matrix.removeprefix("A = ") if entries is None else f"P(1) @ diag({entries[1].replace('_s', '')})"
    scope["A"] = eval(text, scope)
    scope |= {letter: eval(value, scope) for letter, value in made.letters.items()}
    formula = re.sub(r"\b([a-h])_t\b", r"\1", made.formula.replace("sum over s of A[t, s] * g_s", "(A @ g)"))
    wanted = definition(parts, form, at)[made.target]
    if "U" in made.found:  # what the tiles before have added
        wanted = wanted + 0.3 * (np.cumprod(at["decay"]) if "decay" in parts else 1.0)
    np.testing.assert_allclose(eval(formula, scope), wanted, rtol=1e-12)
    assert ("U" in made.found) == (tiled and "read_scale" in parts)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("parts", [("lr", "momentum"), ("lr", "momentum", "decay"), ("lr", "momentum", "read_scale")])
def test_the_equations_of_the_end_of_a_mini_batch_are_the_rule(parts: tuple[str, ...], nesterov: bool) -> None:
    """per="mini_batch": momentum and decay act once, with the means of their gates."""
    at = rate_values(False)
    U = float(at["lr"] @ at["g"])
    scope = {"S": GIVEN["S"], "U": U, "W_start": GIVEN["W"], "mean": np.mean, "tau_t": at["tau"][-1], **at}
    for equation in end_equations(rule_of(parts, nesterov=nesterov, per="mini_batch")):
        target, _, value = equation.partition(" = ")
        scope[target] = eval(value, scope)
    mu, decay = at["momentum"].mean(), at["decay"].mean() if "decay" in parts else 1.0
    S = mu * GIVEN["S"] + U
    step = (U + mu * S if nesterov else S) * (at["tau"][-1] if "read_scale" in parts else 1.0)
    assert scope["S"] == pytest.approx(S)
    assert scope["W"] == pytest.approx(decay * GIVEN["W"] - step)


# -- costs as data -----------------------------------------------------------------------------------------------------


def cost_of(name: str, stage: str, function: str) -> StageCost:
    costs = (c for entry in layer(name).stages for c in program_costs(entry.program))
    return next(c for c in costs if (c.stage, c.function) == (stage, function))


def test_costs_of_stages_for_the_dims_of_the_layer() -> None:
    width, hidden, chunk = 8, 32, 16
    dual = cost_of("mlp", "dualize", "tttmlp")
    assert dual.unit == "token"
    assert dual.contraction == 14 * width * hidden + 4 * chunk * (width + hidden) + 2 * (width + hidden)
    primal = cost_of("mlp", "primal", "tttmlp")
    assert primal.contraction == 10 * width * hidden
    assert primal.elementwise > 10 * width * hidden  # outer, rate, sum, tau and difference for each of two matrices
    assert cost_of("mlp", "schedule", "tttmlp_close").unit == "mini-batch"
    assert f"# tttmlp: {int(dual.flops):,} FLOPs per token and head, C = 16" in explain(layer("mlp"))


def test_costs_of_a_layer() -> None:
    c = layer_cost(layer("mlp"))
    assert c.state_bytes == 4 * (2 * 8 * 32 + 8 + 32)
    assert c.sequence_bytes == 4 * (4 * 8 + 2)
    assert c.forward.flops == cost_of("mlp", "schedule", "tttmlp").flops
    assert 1.9 < c.backward.contraction / c.forward.contraction < 2.1
    in_memory, on_chip = c.intensity
    assert in_memory < on_chip
    assert c.primal_largest == 8 * 32  # an outer product for each token
    assert f"state {int(c.state_bytes):,} bytes" in flat("mlp")


@pytest.mark.parametrize("name", LIBRARY)
def test_the_bytes_of_a_state_are_those_that_a_call_returns(name: str) -> None:
    """After a whole mini-batch, and with one that lacks its last token."""
    b_ = LIBRARY[name].mini_batch
    b_ = b_ if b_ == "all" else min(16, int(b_))
    found = compiled(name, mini_batch=b_)
    costs = layer_cost(found)
    for tokens in (5,) if b_ == "all" else (b_, b_ - 1):
        inputs = inputs_for(found, tokens)
        _, state = found(inputs.q, inputs.k, inputs.v, **keywords(inputs))
        groups = (state.weights, state.start, state.summed, state.memory, state.rows, state.taps)
        held = sum(x.numel() * x.element_size() for group in groups for x in group.values())
        said = costs.open_bytes if state.position else costs.state_bytes
        assert sympy.sympify(said).subs(cost.TOKENS, tokens) == held


@pytest.mark.parametrize("decode", ["rows", "sums"])
def test_what_decoding_keeps_is_said(decode: str) -> None:
    found = tttc.compile(TTTLinear, {"D": 8}, decode=decode)
    text = " ".join(explain(found, stages=[]).replace("#", " ").split())
    kept = {"rows": "q, k, v, lr, tau (its tokens)", "sums": "S_W1, S_b1 (what it has added)"}[decode]
    assert (
        f'when decoding inside a mini-batch (decode="{decode}"): also W1, b1 (the weights at its start); {kept}' in text
    )
    weights = 4 * (8 * 8 + 8)
    assert layer_cost(found).open_bytes == 2 * weights + {"rows": 4 * 15 * (3 * 8 + 2), "sums": weights}[decode]


def test_telemetry_is_said_and_counted() -> None:
    found = tttc.compile(TTTLinear, {"D": 8}, telemetry=True)
    assert "telemetry      loss_before, loss_after" in explain(found, stages=[])
    assert layer_cost(found).forward.flops > layer_cost(layer("linear")).forward.flops


def test_double_precision_doubles_the_bytes() -> None:
    import torch

    wide = tttc.compile(TTTLinear, {"D": 8}, torch.float64)
    assert layer_cost(wide).state_bytes == 2 * layer_cost(layer("linear")).state_bytes


# -- LaTeX -------------------------------------------------------------------------------------------------------------

D_AXIS, F_AXIS = Axis("D", "D"), Axis("F", "F")
K = leaf("k", "token", (S_AXIS, D_AXIS), "c")
Q = leaf("q", "token", (T_AXIS, D_AXIS), "c")
ROW = leaf("k", "token", (D_AXIS,))
W1 = leaf("W1", "state", (D_AXIS, F_AXIS))
B1 = leaf("b1", "state", (F_AXIS,))
G = leaf("g", "token", (S_AXIS, F_AXIS), "c")
TAU = leaf("tau", "gate", (T_AXIS,), "c")
GRAM = b.contract((Q, K), (D_AXIS,))
SEGMENTS = b.segprod(TAU, T_AXIS, S_AXIS)


@pytest.mark.parametrize(
    ("e", "latex"),
    [
        (b.contract((ROW, W1), (D_AXIS,)), r"k W_{1}"),
        (b.contract((ROW, B1), ()), r"k^{\top} b_{1}"),
        (GRAM, r"q_{c} k_{c}^{\top}"),
        (b.contract((K, G), (S_AXIS,)), r"k_{c}^{\top} g_{c}"),
        (b.mask(GRAM, T_AXIS, S_AXIS), r"\operatorname{tril}\left(q_{c} k_{c}^{\top}\right)"),
        (b.mask(GRAM, T_AXIS, S_AXIS, strict=True), r"\operatorname{tril}_{-1}\left(q_{c} k_{c}^{\top}\right)"),
        (b.add(b.contract((K, W1), (D_AXIS,)), B1), r"k_{c} W_{1} + \mathbf{1} b_{1}"),
        (b.mul(TAU, Q), r"\operatorname{diag}\left(\tau_{c}\right) \, q_{c}"),
        (b.total(b.power(ROW, 2), (D_AXIS,)), r"\left\lVert k \right\rVert^{2}"),
        (
            b.contract((b.mul(GRAM, GRAM), K), (S_AXIS,)),
            r"\left(q_{c} k_{c}^{\top} \odot q_{c} k_{c}^{\top}\right) k_{c}",
        ),
        (b.sub(ROW, b.add(ROW, ROW)), r"k - \left(k + k\right)"),
        (b.apply("rsqrt", leaf("x", "token")), r"\frac{1}{\sqrt{x}}"),
        (b.segprod(TAU, T_AXIS, S_AXIS), r"\operatorname{segprod}\left(\tau_{c}\right)"),
        (b.last(SEGMENTS, T_AXIS), r"\operatorname{last}\left(\operatorname{segprod}\left(\tau_{c}\right)\right)"),
        (b.cumprod(Q, T_AXIS), r"\operatorname{cumprod}\left(q_{c}\right)"),
        (b.shift(TAU, T_AXIS, 1.0), r"\operatorname{shift}_{1}\left(\tau_{c}\right)"),
        (b.shift_back(TAU, T_AXIS), r"\operatorname{shift}_{0}^{\top}\left(\tau_{c}\right)"),
        (
            b.solve(SEGMENTS, b.mul(TAU, Q), T_AXIS, S_AXIS),
            r"\left(I + \operatorname{tril}_{-1}\left(\operatorname{segprod}\left(\tau_{c}\right)\right)\right)^{-1} "
            r"\operatorname{diag}\left(\tau_{c}\right) \, q_{c}",
        ),
        (
            b.solve(GRAM, K, S_AXIS, T_AXIS),  # backwards in time
            r"\left(I + \operatorname{triu}_{1}\left(k_{c} q_{c}^{\top}\right)\right)^{-1} k_{c}",
        ),
        (
            b.contract((Q, b.segprod(Q, T_AXIS, S_AXIS)), (D_AXIS,)),
            r"\textstyle\sum_{D} \left[q_{c}\right]_{tD} \, "
            r"\left[\operatorname{segprod}\left(\left[q_{c}\right]_{tD}\right)\right]_{tsD}",
        ),
    ],
)
def test_expressions(e: Expr, latex: str) -> None:
    assert LatexPrinter()(e) == latex


def test_a_named_value_is_not_spelled_out() -> None:
    printer = LatexPrinter({GRAM: name_latex("A1")})
    assert printer(b.contract((GRAM, K), (S_AXIS,))) == "A_{1} k_{c}"
    transposed = b.contract((GRAM, leaf("y", "token", (T_AXIS, F_AXIS), "c")), (T_AXIS,))
    assert printer(transposed) == r"A_{1}^{\top} y_{c}"


@pytest.mark.parametrize(
    ("name", "latex"),
    [
        ("W1", "W_{1}"),
        ("S_W1", "S_{W_{1}}"),
        ("gamma", r"\gamma"),
        ("beta2", r"\beta_{2}"),
        ("lr", r"\mathrm{lr}"),
        ("W1_start", r"W_{1,\mathrm{start}}"),
        ("dW1", r"\mathrm{d}W_{1}"),
        ("d_z", "d_{z}"),
    ],
)
def test_names(name: str, latex: str) -> None:
    assert name_latex(name) == latex


@pytest.mark.parametrize("name", VARIANTS)
def test_latex_of_every_stage_closes_what_it_opens(name: str) -> None:
    for entry in layer(name).stages:
        if entry.name != "emit":
            assert_closed(program_latex(entry.program))
    document = explain(layer(name), latex=True)
    assert_closed(document)
    assert document.count("\\begin{document}") == document.count("\\end{document}") == 1
    assert r"\leftarrow" in document
    body = document[document.index(r"\subsection") :]
    for operation in ("segprod", "cumprod", "shift", "last"):  # what is used is explained above
        assert (rf"$\operatorname{{{operation}}}" in document) == (rf"\operatorname{{{operation}}}" in body)


def assert_closed(text: str) -> None:
    bare = re.sub(r"\\[{}]", "", text)
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    for block in re.findall(r"\\begin\{align\*\}.*?\\end\{align\*\}", text, re.DOTALL):
        for line in block.split(r"\\" + "\n"):
            assert len(re.findall(r"\\left\b", line)) == len(re.findall(r"\\right\b", line))
    assert text.count(r"\begin{align*}") == text.count(r"\end{align*}") > 0
    outside = re.sub(r"\\begin\{align\*\}.*?\\end\{align\*\}", "", bare, flags=re.DOTALL)
    assert outside.count("$") % 2 == 0
    assert not re.search(r"(?<!\\)[_^&]", re.sub(r"\$[^$]*\$", "", outside))  # mathematics is in mathematics


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
@pytest.mark.parametrize("name", VARIANTS)
def test_document_compiles(name: str, tmp_path: Path) -> None:
    (tmp_path / "layer.tex").write_text(explain(layer(name), latex=True), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "layer.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
