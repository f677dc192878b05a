"""What backend="auto" does not take is said, once; and it takes native kernels at the chunk that they have."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
import torch

import tttc
from tttc import FallbackWarning
from tttc.backends import registry, tvm_cuda
from tttc.compiler import fallback
from tttc.compiler.driver import untuned
from tttc.library import LinearAttention
from tttc.tuning.measured import _Timed
from tttc.tuning.task import Task

needs_tvm = pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")
DIMS = {"D": 3, "F": 4}


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch):
    """No backend named by the environment, and nothing said yet."""
    monkeypatch.delenv("TTTC_BACKEND")
    monkeypatch.setattr(fallback, "_said", set())


class Online(tttc.Variant):
    """A nonlinear learner with a step on each token: the rows of a longer chunk are found one after the other."""

    anchor = "token"
    W = tttc.state("D", "F", init=tttc.normal(0.5))
    V = tttc.state("F", "D", init=tttc.normal(0.5))

    def learner(self, x):
        return tttc.tanh(x @ self.W) @ self.V

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


def quietly(function, *arguments, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*arguments, **settings)


@needs_tvm
def test_a_native_form_at_another_chunk_is_preferred():
    layer = quietly(tttc.compile, Online, DIMS)
    assert layer.backend == "tvm"
    assert layer.stages.program.plan.chunk == 1
    assert "native kernels have no loop that finds the rows of a longer chunk" in layer.explain()
    other = tttc.compile(Online, DIMS, backend="torch")
    assert other.stages.program.plan.chunk == 16
    q = torch.randn(1, 19, 2, 3)
    gates = {"lr": torch.full((1, 19, 2), 0.1)}
    torch.testing.assert_close(layer(q, q, q, gates=gates)[0], other(q, q, q, gates=gates)[0])


@needs_tvm
def test_it_is_preferred_by_name_and_for_a_gpu_too():
    assert quietly(tttc.compile, Online, DIMS, backend="tvm").backend == "tvm"
    assert untuned(Online, DIMS, tvm_cuda).plan.chunk == 1


@needs_tvm
def test_a_fallback_is_said_once_for_each_declaration():
    with pytest.warns(FallbackWarning, match=r"variant `Online`: .*takes torch, not tvm: the rows of a chunk") as said:
        layer = tttc.compile(Online, DIMS, chunk=8)
    assert [w.filename for w in said] == [__file__]
    assert layer.backend == "torch"
    assert "not tvm: the rows of a chunk" in layer.why
    assert "not tvm: the rows of a chunk" in layer.explain()
    quietly(tttc.compile, Online, {"D": 4, "F": 4}, chunk=8)
    with pytest.warns(FallbackWarning, match="variant `Other`"):
        tttc.compile(type("Other", (Online,), {}), DIMS, chunk=8)


@needs_tvm
def test_telemetry_of_mini_batches_is_no_telemetry_of_tokens():
    """The chunk that native kernels have is not a mini-batch, of which telemetry says what it did."""
    with pytest.warns(FallbackWarning):
        layer = tttc.compile(Online.replace(mini_batch=4), DIMS, telemetry=True)
    q = torch.randn(1, 10, 1, 3)
    _, state = layer(q, q, q, gates={"lr": torch.full((1, 10, 1), 0.1)})
    assert state.telemetry["loss_before"].shape == (1, 1, 3)


def test_what_is_asked_for_is_taken_without_a_word(monkeypatch):
    quietly(tttc.compile, Online, DIMS, chunk=8, backend="torch")
    monkeypatch.setenv("TTTC_BACKEND", "torch")
    layer = quietly(tttc.compile, Online, DIMS, chunk=8)
    assert "TTTC_BACKEND asks for it" in layer.why


def test_what_is_not_installed_is_said_once_in_all(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda module: None)
    with pytest.warns(FallbackWarning, match=r"not tvm: apache-tvm is not installed: pip install 'tttc\[tvm\]'"):
        layer = tttc.compile(Online, DIMS)
    assert "not tvm: apache-tvm is not installed" in layer.why
    assert layer.stages.program.plan.chunk == 16
    assert quietly(tttc.compile, LinearAttention, {"D": 3}).backend == "torch"


@needs_tvm
def test_verification_says_it_in_its_table():
    found = quietly(tttc.verify, Online, DIMS, tokens=5, heads=1, chunk=8)
    assert "backend torch" in str(found)
    assert "not tvm: the rows of a chunk" in str(found)
    with pytest.warns(FallbackWarning):  # which is not the place where a user of the layer reads it
        tttc.compile(Online, DIMS, chunk=8)


@needs_tvm
def test_tuning_takes_what_compile_takes_and_only_chunks_that_run():
    subject = _Timed(Task(Online, DIMS, torch.float32, "auto", 1, 64, 1, 1.0, forward_only=True))
    assert subject.name == "tvm"
    assert "chunk" not in subject.choices()
    subject = _Timed(Task(Online, DIMS, torch.float32, "torch", 1, 64, 1, 1.0, forward_only=True))
    assert set(subject.choices()["chunk"]) >= {1, 16}
