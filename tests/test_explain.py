"""What `explain` says: the class and the chunk with their reasons, every stage as it is, LaTeX that closes."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

import tttc
from tttc.explain import StageCost, explain, layer_cost, stage_costs
from tttc.ir import build as b
from tttc.ir.expr import Axis, Expr, leaf
from tttc.ir.latex import expression_latex, name_latex, program_latex
from tttc.ir.program import S_AXIS, T_AXIS
from tttc.layer import Layer
from tttc.library import TTTMLP, GatedThreeLayer, LinearAttention, TTTLinear

VARIANTS = {
    "linear": TTTLinear,
    "mlp": TTTMLP,
    "attention": LinearAttention,
    "gated": GatedThreeLayer,
    "end": TTTLinear.replace(read="end"),
    "start": TTTMLP.replace(read="start"),
    "all": TTTLinear.replace(mini_batch="all"),
    "all at the end": TTTLinear.replace(mini_batch="all", read="end"),
    "before": TTTMLP.replace(read="before", mini_batch=1),
}


@cache
def layer(name: str) -> Layer:
    variant = VARIANTS[name]
    return tttc.compile(variant, {"D": 8, "F": 32} if issubclass(variant, TTTMLP | GatedThreeLayer) else {"D": 8})


@cache
def flat(name: str) -> str:
    """The head of the explanation, without its line breaks."""
    head, _, _ = explain(layer(name)).partition("# stage 1 of")
    return " ".join(head.replace("#", " ").split())


# -- what it says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("linear", "class nonlinear in the weights"),
        ("linear", "dW1, db1: nonlinear in W1, b1, made so by x ** 2"),
        ("linear", "the chunk is the mini-batch"),
        ("linear", "2 dependent contractions per chunk, T/8 in a call"),
        ("linear", "torch: runs every program"),
        ("linear", "W_t = W_start - tau_t * sum of lr_s * g_s"),
        ("mlp", "made so by x1 = gelu(x)"),
        ("mlp", "4 dependent contractions per chunk"),
        ("attention", "class constant"),
        ("attention", "64 tokens; the gradients do not depend on the weights: the chunk is free"),
        ("attention", "no contraction waits for the one of an earlier chunk"),
        ("end", "not causal"),
        ("end", 'read="end": every token reads the end of its mini-batch'),
        ("start", "no token reads what another of its mini-batch taught"),
        ("all", "the mini-batch is the whole sequence: it is cut into tiles"),
        ("all", "2 dependent contractions per mini-batch, 2 in a call"),
        ("all at the end", "chunk the whole sequence"),
        ("gated", "(by state: sum of lr_s * g_s; sum of lr_gate_s * g_s)"),
    ],
)
def test_says(name: str, said: str) -> None:
    assert said in flat(name)


def test_an_affine_gradient_is_told_from_a_nonlinear_one() -> None:
    class Regression(LinearAttention):
        def loss(self, k, v):
            return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    text = explain(tttc.compile(Regression, {"D": 4}))
    assert "affine in the weights" in text
    assert "dW: affine in W, made so by dz = z - v" in text or "dW: affine in W, made so by" in text
    assert "nonlinear" not in text.partition("# stage 1 of")[0]


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


# -- costs as data -----------------------------------------------------------------------------------------------------


def cost_of(name: str, stage: str, function: str) -> StageCost:
    return next(c for c in stage_costs(layer(name)) if (c.stage, c.function) == (stage, function))


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
    ],
)
def test_expressions(e: Expr, latex: str) -> None:
    assert expression_latex(e) == latex


def test_a_named_value_is_not_spelled_out() -> None:
    assert expression_latex(b.contract((GRAM, K), (S_AXIS,)), {GRAM: "A1"}) == "A_{1} k_{c}"
    transposed = b.contract((GRAM, leaf("y", "token", (T_AXIS, F_AXIS), "c")), (T_AXIS,))
    assert expression_latex(transposed, {GRAM: "A1"}) == r"A_{1}^{\top} y_{c}"


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
        if entry.program is not None:
            assert_closed(program_latex(entry.program))
    document = explain(layer(name), latex=True)
    assert_closed(document)
    assert document.count("\\begin{document}") == document.count("\\end{document}") == 1
    assert r"\leftarrow" in document


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
