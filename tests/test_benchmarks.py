"""The benchmarks: hand-written forms are right, FLOPs are those that a hand counts, and who is wrong is not timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import tttc
from benchmarks import cpu, measure, onnx, present
from benchmarks.by_hand import FORMS, run, run_whole
from benchmarks.contenders import Disagreement, backward_step, by_hand, check, forward_step, ours
from benchmarks.flops import useful_flops
from benchmarks.workloads import HEADLINE, Case, case, cases, inputs
from tests.helpers import LIBRARY, differences, oracle_result, result_of
from tttc.export import onnx as export
from tttc.verification.comparison import Inputs, random_inputs

KNOWN = {c.name: c for c in cases().values()}
TOKENS = 32


def small(name: str) -> tuple[Case, Inputs]:
    """The variant at a tiny size, and inputs of unit scale in float64."""
    c = case(name, KNOWN[name].variant, D=3, F=5, T=TOKENS, H=2)
    return c, random_inputs(c.declared, c.dims, 1, c.T, c.H)


def groups(found: Inputs) -> tuple[dict[str, torch.Tensor], ...]:
    sequences = {"q": found.q, "k": found.k, "v": found.v, **found.tokens, **found.gates}
    return sequences, found.params, found.state


@pytest.mark.parametrize(
    ("name", "chunk"), [(n, c) for n, form in FORMS.items() for c in (16, 8)[: 1 + form.chunk_free]]
)
def test_the_hand_written_form_is_the_definition(name: str, chunk: int) -> None:
    """Outputs, final states and every gradient, in float64; at another chunk where that is free."""
    c, x = small(name)
    found = result_of(*run(FORMS[name].step, *groups(x), chunk), x)
    assert differences(found, oracle_result(c.variant, x)) == ""


@pytest.mark.parametrize("chunk", [16, 8, TOKENS])
@pytest.mark.parametrize("name", [n for n, form in FORMS.items() if form.whole])
def test_the_form_without_a_loop_is_the_definition(name: str, chunk: int) -> None:
    c, x = small(name)
    whole = FORMS[name].whole
    assert whole is not None
    found = result_of(*run_whole(whole, *groups(x), chunk), x)
    assert differences(found, oracle_result(c.variant, x)) == ""


def per_token(name: str, backward: bool = False, **sizes: int) -> float:
    c = case(name, KNOWN[name].variant, **sizes)
    found = useful_flops(tttc.compile(c.variant, c.dims, backend="torch"), 2, 3, c.T, backward=backward)
    assert found is not None
    return found / (2 * 3 * c.T)


def test_the_flops_of_ttt_linear_counted_by_hand() -> None:
    """k @ W, q @ W and k.T @ g; q @ k.T and A @ g, of which half is needed."""
    for D in (64, 128):
        assert per_token("TTTLinear", D=D) == 3 * 2 * D * D + 2 * 16 * D


def test_the_flops_of_ttt_mlp_counted_by_hand() -> None:
    """For each of two layers three products by its weights, and one that takes the gradient back; two Gram matrices and
    two products by them.
    """
    D, F, C = 64, 256, 16
    assert per_token("TTTMLP", D=D, F=F) == 7 * 2 * D * F + C * (D + D) + C * (F + F)


def test_the_flops_of_the_gated_delta_rule_counted_by_hand() -> None:
    """Three products by or of the weights; k @ k.T, q @ k.T, A @ u and the solve, each half of a product."""
    D, C = 64, 64
    assert per_token("GatedDeltaNet", D=D) == 3 * 2 * D * D + 4 * C * D


def test_the_flops_of_linear_attention_and_its_backward_counted_by_hand() -> None:
    """z = q @ W + tril(q @ k.T) @ v, W' = W + k.T @ v; in the backward two products for every one of the forward."""
    D, C = 64, 64
    forward = 2 * 2 * D * D + 2 * C * D
    assert per_token("LinearAttention") == forward
    backward = 4 * 2 * D * D + 4 * C * D  # dz @ W.T, dz.T @ q, v @ dW.T, k @ dW; dA, dA @ k, dA.T @ q, A.T @ dz
    assert per_token("LinearAttention", backward=True) == forward + backward


def test_the_square_of_a_vector_is_no_matrix_product() -> None:
    """Longhorn is the delta rule with a rate that |k|^2 is part of."""
    assert per_token("Longhorn") == per_token("DeltaNet")


def test_every_variant_of_the_library_is_measured_and_counted() -> None:
    assert set(LIBRARY) <= set(KNOWN)
    assert set(HEADLINE) <= set(cases())
    for c in cases().values():
        flops = useful_flops(tttc.compile(c.variant, c.dims, backend="torch"), c.B, c.H, c.T, backward=True)
        assert flops, c.label
        assert flops > 0


@pytest.mark.parametrize("make", [forward_step, backward_step])
def test_who_is_wrong_is_not_timed(make: Any) -> None:
    c = case("TTTLinear", KNOWN["TTTLinear"].variant, D=4, T=32, H=2)
    x = inputs(c)
    exact = {n: t.detach().double().requires_grad_() for n, t in x.items()}
    wanted = make(ours(c, "torch", torch.float64)[1], exact)()
    right = by_hand(c)["eager 16"]
    assert check({"right": make(right, x)}, wanted)["right"] < 1e-5

    def wrong(x: Any) -> Any:
        z, final = right({**x, "k": x["k"] * 1.01})
        return z, final

    with pytest.raises(Disagreement, match=r"wrong: .* is off by"):
        check({"wrong": make(wrong, x)}, wanted)


def test_every_contender_runs_in_every_round_after_a_call_that_is_not_timed() -> None:
    calls: list[str] = []
    found = measure.interleaved({n: lambda n=n: calls.append(n) for n in "ab"}, 3)
    assert calls == ["a", "a", "b", "b"] * 3
    assert {len(s) for s in found.values()} == {3}


def test_ratios_are_taken_round_by_round() -> None:
    found = measure.ratios([2.0, 8.0, 30.0], [1.0, 2.0, 10.0])
    assert found == {"median": 3.0, "quartile_1": 2.5, "quartile_3": 3.5, "min": 2.0, "max": 4.0}


def test_a_measured_row_is_a_line_of_the_table(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tiny row from the measurement to Markdown and picture, the torch backend in the place of TVM."""
    monkeypatch.setattr(cpu, "ours", lambda c, backend="torch": ours(c, "torch"))
    c = replace(case("LinearAttention", KNOWN["LinearAttention"].variant, D=4, T=64, H=1), asked=True)
    rows = [cpu.measured(c, backward, cpu.Effort(3, 0.0, False)) for backward in (False, True)]
    rows[1]["peak_MiB"] = {"tttc": 1.0, "torch backend": 2.0, "eager 16": 4.0}
    report = {
        **measure.about("a test"),
        "rows": rows,
        "start_seconds": {"LinearAttention": {"fresh": 1, "cached": 0.1}},
    }
    report = json.loads(json.dumps(report))
    assert set(rows[0]["times_faster_than"]) == {"torch backend", "eager 16", "eager 64", "eager, no loop"}
    assert present.best_eager(rows[0]) <= present.first_eager(rows[0])
    line = next(s for s in present.markdown(report).splitlines() if s.startswith("| `LinearAttention` T=64, H=1, D=4 "))
    assert line.count("|") == 12
    assert line.endswith("| 0.25 |")
    present.picture(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_row_without_agreement_has_no_number() -> None:
    row = {"label": "X", "pass": "forward", "sizes": {"D": 4}, "refused": "tttc: z is off by 1.0e+00"}
    assert present.cells(row)[2] == "disagrees"
    assert not any(any(ch.isdigit() for ch in cell) for cell in present.cells(row))


@pytest.mark.parametrize("name", ["GatedDeltaNet", "TTTLinear"])
def test_the_graphs_that_are_timed_are_the_definition(name: str) -> None:
    """As one call, and token by token."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is an extra: pip install 'tttc[onnx]'")
    c = case(name, KNOWN[name].variant, D=3, T=20, H=2)
    x = {n: t.detach() for n, t in inputs(c).items()}
    layer = tttc.compile(c.variant, c.dims, backend="torch")
    session = onnx.of_session(c, export.Session(export.model(layer).SerializeToString()))
    wanted, _ = onnx.results(onnx.of_layer(c, layer), x, 1)
    for calls in (1, 20):
        check({name: lambda calls=calls: onnx.results(session, x, calls)[0]}, wanted)  # type: ignore[misc]


def test_the_gpu_benchmark_runs_without_one() -> None:
    """Every contender that a CPU can run, by Triton's interpreter, against the definition."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "LinearAttention", "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=measure.ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "LinearAttention, tttc: agrees" in done.stdout
