"""What is known of a backend: where it is taken, what it lacks, and text where it cannot run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import tttc
from tests.backends import toy
from tests.backends.toy.load import ToyScan
from tests.helpers import inputs_for, keywords
from tttc.backends import registry, triton
from tttc.backends.registry import Package, Unit, candidates, named, names, register, unregister
from tttc.backends.scan import CompiledScan, NotBuilt
from tttc.cli.main import app
from tttc.errors import BackendRefusal
from tttc.library import LinearAttention

CPU, CUDA, OTHER = map(torch.device, ("cpu", "cuda", "mps"))


class ForwardOnly(ToyScan):
    backward = CompiledScan.backward


@pytest.fixture
def forward_only():
    def load(source, program, settings=None, place=None):
        return {n: ForwardOnly(s.scan, program, s.run, None) for n, s in toy.load_scans(source, program).items()}

    backend = SimpleNamespace(**{n: getattr(toy, n) for n in toy.__all__} | {"load_scans": load})
    register(Unit("forward_only", "no gradients", lambda: backend, ("cpu",), ("cpu",), differentiates=False))
    yield
    unregister("forward_only")


def test_one_name_is_another_backend_on_another_device():
    assert named("tvm", CPU).devices == ("cpu",)
    assert named("tvm", CUDA).devices == ("cuda",)
    assert named("tvm", OTHER).backend.unavailable(OTHER) == ["it runs on a CPU or an NVIDIA GPU, not on mps"]
    assert names()[:3] == ["torch", "tvm", "triton"]


def test_auto_tries_what_is_for_the_device_and_then_what_runs_on_all():
    assert [u.name for u in candidates(CPU)] == ["tvm", "torch"]
    assert [u.name for u in candidates(CUDA)] == ["triton", "torch"]
    assert [u.name for u in candidates(OTHER)] == ["torch"]


def test_what_has_no_backward_is_taken_by_name_alone(forward_only, monkeypatch):
    monkeypatch.delenv("TTTC_BACKEND")
    assert "forward_only" not in [u.name for u in candidates(CPU)]
    layer = tttc.compile(LinearAttention, {"D": 3}, torch.float64, backend="forward_only")
    inputs = inputs_for(layer, 5)
    z, _ = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    with pytest.raises(NotBuilt, match=r"linear_attention_adjoint.*its backend has no backward"):
        z.sum().backward()


def test_what_is_not_installed_is_said_with_the_way_to_install_it(monkeypatch):
    unit = Unit(
        "absent", "", lambda: toy, ("cpu",), packages=(Package("nothing-of-it", "nothing_of_it", "pip install it"),)
    )
    monkeypatch.setattr(registry, "_units", [*registry.units(), unit])
    with pytest.raises(BackendRefusal, match="nothing-of-it is not installed: pip install it"):
        tttc.compile(LinearAttention, {"D": 3}, backend="absent")


def test_text_is_written_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(triton, "unavailable", lambda device: ["there is no GPU"])
    with pytest.raises(BackendRefusal, match="there is no GPU"):
        tttc.compile(LinearAttention, {"D": 16}, backend="triton")
    said = CliRunner().invoke(app, ["compile", "titans", "--backend", "triton", "--dims", "D=16"])
    assert said.exit_code == 0, said.output
    assert "def titans(" in said.stdout
