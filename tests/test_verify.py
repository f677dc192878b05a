"""What `tttc.verify` says, of which backend, and on which inputs; and what it does not blame on the compiler."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tttc
from tests.helpers import LIBRARY, READS, dims_of
from tttc.cli.main import app
from tttc.declare.gates import gate_range
from tttc.declare.read import signature
from tttc.errors import BackendRefusal
from tttc.library import LinearAttention, Titans, TTTLinear
from tttc.tuning.accuracy import Accuracy
from tttc.tuning.search import IncorrectResult
from tttc.verification.comparison import Row, Verification, random_inputs, verify

module = import_module("tttc.verification.comparison")  # the attribute `tttc.verify` is the function
needs_tvm = pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")


def positive(shape, generator):
    return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1


class Tanh(tttc.Variant):
    mini_batch = 4
    W = tttc.state("D", "D")

    def learner(self, x):
        return tttc.tanh(x @ self.W)

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


class Memora(Titans):
    """The logarithm of the weights is taken, which begin positive."""

    mini_batch, read = 4, "start"
    W1, W2 = tttc.state("D", "F", init=positive), tttc.state("F", "D", init=positive)
    update = tttc.sgd(lr=tttc.gate("lr"), decay=tttc.gate("decay"), at_end=tttc.softmax_retention())


class Logarithm(Tanh):
    """Not finite where a value is negative."""

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - tttc.log(v)) ** 2)


class Chaotic(tttc.Variant):
    """Steps so long that each token multiplies a rounding."""

    anchor = "token"
    W = tttc.state("D", "D", init=tttc.normal(0.5))

    def learner(self, x):
        return tttc.tanh(3.0 * (x @ self.W))

    def loss(self, k, v):
        return 60.0 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


class Tokens(tttc.Variant):
    """Dims that only tokens, gates and params have."""

    mini_batch = 2
    W = tttc.state("D", "D")
    x = tttc.token("M")
    past = tttc.token("N", window="K")
    many = tttc.gate("many", per="channel", axis="P")
    weight = tttc.param("Q", init=1.0)

    def loss(self, k, v):
        scale = tttc.sum(self.x**2) + tttc.sum(self.past**2) + tttc.sum(self.many) + tttc.sum(self.weight)
        return 0.5 * scale * tttc.sum((k @ self.W - v) ** 2)

    def output(self, q):
        return q @ self.W

    update = tttc.sgd(lr=tttc.gate("lr", scale=0.001))


# -- the backend -------------------------------------------------------------------------------------------------------


@needs_tvm
def test_it_takes_the_backend_that_compile_takes_and_says_which(monkeypatch):
    monkeypatch.delenv("TTTC_BACKEND")
    found = verify(LinearAttention, {"D": 3}, tokens=5, heads=1)
    assert found.ok
    assert "backend tvm" in str(found)
    assert f"computed by {tttc.compile(LinearAttention, {'D': 3}).why}" in str(found)


def test_a_backend_may_be_named():
    assert "backend torch" in str(verify(Tanh, {"D": 3}, tokens=5, heads=1, backend="torch"))
    with pytest.raises(BackendRefusal, match="float64"):
        verify(Tanh, {"D": 3}, tokens=5, heads=1, backend="triton")


# -- the call ----------------------------------------------------------------------------------------------------------


def test_dims_that_no_state_has():
    found = verify(Tokens, {"D": 3, "M": 2, "N": 1, "K": 3, "P": 5, "Q": 2}, tokens=5, heads=1)
    assert found.ok, found
    assert "K=3" in str(found)
    assert tttc.check(Tokens) == []


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_fewer_tokens_than_a_mini_batch(read, tokens):
    assert verify(Tanh.replace(read=read, mini_batch=8), {"D": 2}, tokens=tokens, heads=1, backend="torch").ok


# -- the inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIBRARY)
def test_gates_are_drawn_where_the_declaration_brings_them(name):
    declared, dims = signature(LIBRARY[name]), dims_of(LIBRARY[name], 8)
    inputs = random_inputs(declared, dims, 1, 40, 2)
    for n, spec in declared.gates.items():
        low, high = gate_range(spec, spec.scale_value(dims))
        assert low < inputs.gates[n].min() < inputs.gates[n].max() <= high, n


def test_what_begins_with_a_sign_keeps_it():
    class Signed(Tanh):
        up, down = tttc.state("D", init=2.0), tttc.state("D", init=lambda shape, g: -positive(shape, g))
        one = tttc.state("D", "D", init=lambda shape, g: torch.eye(*shape, dtype=torch.float64))
        free, zero = tttc.state("D", init=tttc.normal(1.0)), tttc.state("D")
        scale = tttc.param("D", init=0.1)

    inputs = random_inputs(signature(Signed), {"D": 16}, 2, 3, 2)
    state = inputs.state
    assert 0.5 < state["up"].min() < state["up"].max() < 8.0
    assert state["down"].max() < 0.0
    assert state["one"].min() > 0.0
    for mixed in ("free", "zero", "W"):
        assert state[mixed].min() < 0.0 < state[mixed].max()
    assert 0.0 < inputs.params["scale"].min() < inputs.params["scale"].max() < 0.3


def test_weights_whose_logarithm_is_taken():
    assert verify(Memora, {"D": 3, "F": 4}, tokens=9, heads=1).verdict == "equal to the oracle"


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_an_oracle_that_is_not_finite_is_said():
    found = verify(Logarithm, {"D": 3}, tokens=9, heads=1)
    assert not found.ok
    assert not found.differs
    text = str(found)
    assert "the oracle itself is not finite here" in text
    assert "z from token " in text
    assert "state W" in text
    assert "it is finite where `v` is positive" in text
    assert "DIFFERS" not in text


def test_an_ill_conditioned_oracle_is_said():
    found = verify(Chaotic, {"D": 8}, heads=1)
    assert found.ok
    assert found.verdict == "equal to the oracle, which is ill-conditioned here"
    assert max(row.error for row in found.rows) > 1e-11
    assert "a rounding is multiplied by" in str(found)
    assert "when each input moves by one unit in its last place" in str(found)


def with_a_fault(monkeypatch, size):
    right = module.reference

    def faulty(*arguments, **settings):
        z, final = right(*arguments, **settings)
        return z * (1 + size), final

    monkeypatch.setattr(module, "reference", faulty)


@pytest.mark.parametrize(("variant", "size"), [(Tanh, 1e-11), (TTTLinear, 1e-11), (Memora, 1e-11), (Chaotic, 1e-4)])
def test_a_fault_differs_all_the_same(monkeypatch, variant, size):
    """Nothing is loosened where the definition is well-conditioned, and elsewhere by no more than rounding does."""
    with_a_fault(monkeypatch, size)
    found = verify(variant, {"D": 8, "F": 4} if variant is Memora else {"D": 8}, tokens=20, heads=1)
    assert found.differs
    assert "DIFFERS" in str(found)


def test_where_rounding_decides_nothing_can_be_compared(monkeypatch):
    monkeypatch.setattr(module, "UNTOLD", 1e-11)
    found = verify(Chaotic, {"D": 8}, heads=1)
    assert not found.ok
    assert not found.differs
    assert "too ill-conditioned here" in str(found)


# -- the command -------------------------------------------------------------------------------------------------------

ILL = Verification("Mine", "T=1", (Row("z", 1e-9, 1e-8, amplified=1e5),), reasons=("ill-conditioned here: so much",))
UNFINISHED = Verification("Mine", "T=1", (Row("z", float("nan"), 1e-12, finite=False),), reasons=("not finite: z",))


@pytest.mark.parametrize(("found", "code"), [(ILL, 0), (UNFINISHED, 3)])
def test_the_command_says_the_same(monkeypatch, tmp_path: Path, found, code):
    file = tmp_path / "mine.py"
    file.write_text("import tttc\nfrom tttc.library import TTTLinear\nclass Mine(TTTLinear): pass\n")
    monkeypatch.setattr("tttc.cli.main.verify_variant", lambda *_, **__: found)
    result = CliRunner().invoke(app, ["verify", f"{file}:Mine"])
    assert result.exit_code == code, result.output
    assert found.headline in result.stdout
    assert found.reasons[0] in result.stdout
    assert "differs" not in result.stdout


def test_the_command_says_what_its_exit_codes_mean():
    text = " ".join(CliRunner().invoke(app, ["verify", "--help"]).stdout.split())
    assert "The exit code is 1 if a tensor differs, and 3 if none does but some cannot be compared" in text


# -- tuning ------------------------------------------------------------------------------------------------------------


def checked(variant, fault=0.0):
    dims = {"D": 8}
    exact, layer = (tttc.compile(variant, dims, dtype, backend="torch") for dtype in (torch.float64, torch.float32))
    accuracy = Accuracy(exact, torch.float32, 20, lambda: layer, forward_only=False)

    class Faulty:
        def __call__(self, *arguments, **settings):
            z, state = layer(*arguments, **settings)
            return z * (1 + fault), state

    accuracy.check(Faulty())
    return accuracy


def test_a_chaotic_learner_is_not_wrong():
    accuracy = checked(Chaotic)
    assert "ill-conditioned: when each input moves by one rounding (1e-07)" in accuracy.note
    assert "in the definition itself" in accuracy.note
    assert f"on {accuracy.tokens} tokens" in accuracy.note
    assert checked(Tanh).note == ""


@pytest.mark.parametrize(("variant", "fault"), [(Tanh, 1e-4), (Chaotic, 0.3)])
def test_what_is_wrong_stays_wrong(variant, fault):
    with pytest.raises(IncorrectResult, match="z "):
        checked(variant, fault)
