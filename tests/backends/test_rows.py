"""A row that is taken out of a backend's table is a refusal that names the operation, for every one of them; but where
the operation is made of others it is computed as these, and is the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tttc
from tests.helpers import differences, inputs_for, keywords, layer_result, oracle_result
from tests.ir.test_ops import EXAMPLES
from tests.test_family import as_dtype, leaves_of
from tttc.backends.registry import named, units
from tttc.backends.rows import PRINTED, _values
from tttc.backends.torch.printer import TorchPrinter
from tttc.backends.triton.printer import TritonPrinter
from tttc.compiler.driver import untuned
from tttc.declare import functions, suggest
from tttc.errors import BackendRefusal
from tttc.ir.expr import OPS, postorder
from tttc.ir.program import AdjointProgram, Assign
from tttc.ir.scalars import SCALARS, Scalar, softplus, tanh, x
from tttc.ir.spec import SPECS
from tttc.library import LinearAttention
from tttc.verification.comparison import relative_error

OPERATIONS = list(dict.fromkeys((*SCALARS, *OPS)))
COMPOSITES = [name for name, op in OPS.items() if op.lower is not None]
DEFINED = ["silu", "gelu", "huber"]  # by the formulas of their rows in ir/scalars.py
PACKAGES = {
    "torch": "tttc.backends.torch",
    "triton": "tttc.backends.triton",
    "tvm_cpu": "tttc.backends.tvm_cpu",
    "tvm_cuda": "tttc.backends.tvm_cuda",
    "onnx": "tttc.backends.onnx",
    "toy": "tests.backends.toy",
}


@cache
def program() -> AdjointProgram:
    return tttc.compile(LinearAttention, {"D": 3}, torch.float32, backend="torch").stages.program


def using(op: str) -> AdjointProgram:
    """A program with an example of an operation in its first scan."""
    scan = program().scans[0]
    more = tuple(Assign(scan.outputs[0].target, e) for e in EXAMPLES[op])
    return replace(program(), scans=(replace(scan, outputs=(*scan.outputs, *more)), *program().scans[1:]))


def tables() -> Iterator[tuple[str, ModuleType, ModuleType]]:
    for name, package in PACKAGES.items():
        yield name, import_module(package), import_module(f"{package}.ops")


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_row_is_a_refusal(monkeypatch: pytest.MonkeyPatch, name: str, op: str) -> None:
    package, table = import_module(PACKAGES[name]), import_module(f"{PACKAGES[name]}.ops")
    assert not package.refusals(using(op))
    if op in (*COMPOSITES, *DEFINED):  # looked up as what it consists of
        monkeypatch.delitem(table.ROWS, op, raising=False)
        assert not package.refusals(using(op))
        return
    monkeypatch.delitem(table.ROWS, op)
    said = f"it has no row for the operation `{op}`: add one to "
    assert any(reason.startswith(said) and reason.endswith("/ops.py") for reason in package.refusals(using(op)))


def test_every_operation_has_a_row_in_every_backend() -> None:
    every = {op for op in (*SCALARS, *OPS) if op not in COMPOSITES}
    assert {name: every - set(table.ROWS) for name, _, table in tables()} == {name: set() for name in PACKAGES}


@pytest.mark.parametrize("op", DEFINED)
@pytest.mark.parametrize("name", PACKAGES)
def test_what_its_formula_needs_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, op: str) -> None:
    package, table = import_module(PACKAGES[name]), import_module(f"{PACKAGES[name]}.ops")
    needed = {"silu": "sigmoid", "gelu": "tanh", "huber": "select"}[op]
    monkeypatch.delitem(table.ROWS, op)
    monkeypatch.delitem(table.ROWS, needed)
    assert any(f"the operation `{needed}`" in reason for reason in package.refusals(using(op)))


def test_these_are_what_is_defined_by_a_formula() -> None:
    assert [name for name, row in SCALARS.items() if row.definition is not None] == DEFINED


@pytest.fixture
def without_rows(monkeypatch: pytest.MonkeyPatch) -> type[tttc.Variant]:
    """A declaration of operations that no backend has a row for: those above, and a new one, which is a row of
    ir/scalars.py and its meaning on tensors (its name in tttc/public.py is no matter here).
    """
    mish = Scalar("mish", x * tanh(softplus(x)), lambda a: a * np.tanh(np.logaddexp(0, a)))
    monkeypatch.setitem(SCALARS, mish.name, mish)
    monkeypatch.setitem(OPS, mish.name, replace(OPS["tanh"], name=mish.name))
    for stage, spec in SPECS.items():  # made when the tables are read
        monkeypatch.setitem(SPECS, stage, replace(spec, ops=spec.ops | {mish.name}))
    monkeypatch.setattr(suggest, "OPERATIONS", list(suggest.OPERATIONS))
    named = functions._dispatch(mish.name, F.mish, "x * tanh(log(1 + exp(x))).")
    for _, _, table in list(tables()):  # one is made of another when it is imported
        for op in DEFINED:
            monkeypatch.delitem(table.ROWS, op)

    class Unknown(tttc.Variant):
        W, V = tttc.state("D", "D", init=tttc.normal(0.3)), tttc.state("D", "D", init=tttc.normal(0.3))
        mini_batch = 4

        def learner(self, k: Any) -> Any:
            h = named(k @ self.W)
            return k + (tttc.gelu(h) + tttc.silu(h)) @ self.V

        def loss(self, k: Any, v: Any) -> Any:
            return tttc.mean(tttc.huber(self.learner(k) - v, 0.5))

        update = tttc.sgd(lr=tttc.gate("lr"))

    return Unknown


def missing(*packages: str) -> Any:
    return pytest.mark.skipif(not all(map(find_spec, packages)), reason=f"{', '.join(packages)}: not installed")


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # beyond the ends of Triton's blocks
@pytest.mark.parametrize(
    "backend",
    [
        *("torch", "toy"),
        pytest.param("tvm", marks=missing("tvm")),
        pytest.param("triton", marks=missing("triton")),
        pytest.param("onnx", marks=missing("onnx", "onnxruntime")),
    ],
)
def test_what_no_backend_has_a_row_for_is_computed_by_its_formula(without_rows: Any, backend: str) -> None:
    """Outputs, states and gradients are those of the definition on tensors; the stages agree with one another."""
    single = backend in ("triton", "onnx")
    layer = tttc.compile(without_rows, {"D": 4}, torch.float32 if single else torch.float64, backend=backend)
    inputs = inputs_for(tttc.compile(without_rows, {"D": 4}, torch.float64, backend="torch"), 6, heads=2)
    wanted = oracle_result(without_rows, inputs)
    given = leaves_of(as_dtype(inputs, layer.dtype))
    if backend == "onnx":  # forward alone
        with torch.no_grad():
            z, final = layer(given.q, given.k, given.v, **keywords(given))
        pairs = [(z, wanted.z), *((final[n], w) for n, w in wanted.final.items())]
        assert max(relative_error(a, b) for a, b in pairs) <= 5e-6
    else:
        allowed = (5e-6, 1e-5) if single else ()  # float32 rounds at 6e-8
        assert not differences(layer_result(layer, given), wanted, *allowed)
    assert not {e.op for e in postorder(_values(layer.stages.program))} & {"mish", *DEFINED}


def test_it_is_written_in_every_language(without_rows: Any) -> None:
    """Also where it cannot run here; and every stage of the compiler keeps its value."""
    for name in ("triton", "tvm_cuda"):
        if find_spec(name.partition("_")[0]) is not None:
            package = import_module(PACKAGES[name])
            source = package.emit_source(untuned(without_rows, {"D": 4}, package)).text
            assert "tanh(" in source
            assert ("def mish(x):" in source) == (name == "triton")


def test_a_new_function_is_interpreted(without_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTTC_CHECK", "1")
    layer = tttc.compile(without_rows, {"D": 3}, torch.float64, backend="torch")
    assert "mish(" in str(layer.stages["dualize"])
    assert "def mish(x):" in str(layer.stages["adjoint"])


@pytest.mark.parametrize("printer", [TorchPrinter, TritonPrinter])
def test_what_every_printer_writes_has_its_method(printer: type) -> None:
    assert [name for name in PRINTED.values() if not hasattr(printer, name)] == []


def test_a_user_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(import_module("tttc.backends.torch.ops").ROWS, "contract")
    with pytest.raises(BackendRefusal, match=r"no row for the operation `contract`: add one to backends/torch/ops\.py"):
        tttc.compile(LinearAttention, {"D": 3}, backend="torch")


@pytest.mark.parametrize("name", ["tvm_cuda", "triton"])
def test_what_compiles_for_absent_gpus_names_its_own_table(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delitem(import_module(f"{PACKAGES[name]}.ops").ROWS, "erf")
    reasons = import_module(f"{PACKAGES[name]}.aot").unbuildable(using("erf"), "sm_90")
    assert f"it has no row for the operation `erf`: add one to backends/{name}/ops.py" in reasons


def test_the_toy_stays_small() -> None:
    assert sum(len(f.read_text().splitlines()) for f in (Path(__file__).parent / "toy").glob("*.py")) <= 150


def test_the_registered_backends_are_these() -> None:
    found = {u.backend.__name__ for u in units()}  # type: ignore[attr-defined]
    assert found == set(PACKAGES.values())
    assert named("toy", torch.device("cpu")).backend.here().startswith("NumPy")
