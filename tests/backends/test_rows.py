"""A row that is taken out of a backend's table is a refusal that names the operation, for every one of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tttc
from tests.ir.test_ops import EXAMPLES
from tttc.backends.registry import named, units
from tttc.backends.rows import PRINTED
from tttc.backends.torch.printer import TorchPrinter
from tttc.backends.triton.printer import TritonPrinter
from tttc.errors import BackendRefusal
from tttc.ir.expr import OPS
from tttc.ir.program import AdjointProgram, Assign
from tttc.ir.scalars import SCALARS
from tttc.library import LinearAttention

OPERATIONS = list(dict.fromkeys((*SCALARS, *OPS)))
COMPOSITES = [name for name, op in OPS.items() if op.lower is not None]
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
    if op in COMPOSITES:  # looked up as what it consists of
        monkeypatch.setattr(table, "ROWS", table.ROWS)
        monkeypatch.delitem(table.ROWS, op, raising=False)
        assert not package.refusals(using(op))
        return
    monkeypatch.delitem(table.ROWS, op)
    said = f"it has no row for the operation `{op}`: add one to "
    assert any(reason.startswith(said) and reason.endswith("/ops.py") for reason in package.refusals(using(op)))


def test_every_operation_has_a_row_in_every_backend() -> None:
    every = {op for op in (*SCALARS, *OPS) if op not in COMPOSITES}
    assert {name: every - set(table.ROWS) for name, _, table in tables()} == {name: set() for name in PACKAGES}


@pytest.mark.parametrize("printer", [TorchPrinter, TritonPrinter])
def test_what_every_printer_writes_has_its_method(printer: type) -> None:
    assert [name for name in PRINTED.values() if not hasattr(printer, name)] == []


def test_a_user_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(import_module("tttc.backends.torch.ops").ROWS, "contract")
    with pytest.raises(BackendRefusal, match=r"no row for the operation `contract`: add one to backends/torch/ops\.py"):
        tttc.compile(LinearAttention, {"D": 3}, backend="torch")


def test_the_toy_stays_small() -> None:
    assert sum(len(f.read_text().splitlines()) for f in (Path(__file__).parent / "toy").glob("*.py")) <= 150


def test_the_registered_backends_are_these() -> None:
    found = {u.backend.__name__ for u in units()}  # type: ignore[attr-defined]
    assert found == set(PACKAGES.values())
    assert named("toy", torch.device("cpu")).backend.here().startswith("NumPy")
