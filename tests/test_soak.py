"""`make soak`: a fault that is put into the compiler is found, shrunk and printed, and the exit status says so."""

from __future__ import annotations

import json

import pytest

from tests import soak
from tests.draws.comparison import Call, outcome
from tests.draws.drawing import drawn
from tests.draws.recipe import Recipe
from tests.draws.shrinking import shrunk
from tttc.ir import build as b


@pytest.fixture
def wrong_tanh(monkeypatch):
    """tanh' = (1 - tanh)**2 instead of 1 - tanh**2."""
    right = b.partial
    wrong = lambda y, i: b.power(b.sub(b.const(1), y), 2) if y.op == "tanh" else right(y, i)  # noqa: E731
    monkeypatch.setattr(b, "partial", wrong)


DIMS = dict.fromkeys("DEFGJKM", 3)
LARGE = Recipe(hidden=("tanh",), bias="plain", residual=True, terms=("ridge", "counter"))


def test_a_draw_is_known_by_its_seed_and_number():
    assert drawn("one", 7) == drawn("one", 7)
    assert len({repr(drawn(seed, n)) for seed in ("one", "other") for n in range(20)}) == 40


def test_a_failure_is_shrunk_to_what_it_needs(wrong_tanh):
    call = Call(DIMS, tokens=3, cuts=(2,), seed=1, heads=2)
    assert outcome(LARGE, call).kind == "mismatch"
    recipe, small = shrunk((LARGE, call), lambda pair: outcome(*pair).kind == "mismatch")
    assert repr(recipe) in ("Recipe(hidden=('tanh',))", "Recipe(last='tanh')")
    assert (small.batch, small.heads, small.cuts, small.tokens) == (1, 1, (), 1)
    assert set(small.dims.values()) == {2}


def test_what_is_printed_is_a_test_that_fails(wrong_tanh, monkeypatch, capsys, tmp_path):
    """It is repeated alone, by its seed and number."""
    monkeypatch.setattr("tests.draws.drawing.drawn", lambda seed, number, small: (LARGE, Call(DIMS, tokens=4)))
    monkeypatch.setattr(soak, "prepare", lambda backend: None)
    report = tmp_path / "counts.json"
    assert soak.main(["--only", "12", "--json", str(report)]) == 1
    printed = capsys.readouterr().out
    test = printed[printed.index("from tests.draws") : printed.index("1 draws of seed")]
    names: dict = {}
    exec(test, names)
    with pytest.raises(AssertionError, match="state W0"):
        names["test_draw_12"]()
    counted = json.loads(report.read_text())
    assert counted["draws"] == counted["counts"]["mismatch"] == 1
    assert counted["failures"] == {"mismatch: mismatch": [12]}
    assert counted["tests"] == [printed[printed.index("# mismatch") : printed.index("\n1 draws of seed")]]


def test_draws_in_processes_of_their_own(capfd, tmp_path):
    report = tmp_path / "counts.json"
    assert soak.main(["--draws", "6", "--jobs", "2", "--seed", "3", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["draws"] == 6
    assert "6 draws of seed '3' on torch" in capfd.readouterr().out


def test_a_process_that_dies_is_a_failure_of_its_draw():
    worker = soak.Worker("0", "torch")
    worker.begin(5, [])
    worker.process.kill()
    worker.process.join()
    found = worker.answer(60.0)
    worker.stop()
    assert found is not None
    assert found.kind == "crash"
    assert f"{soak.DEAD} with status -9" in found.test
    assert "--seed 0 --only 5" in found.test
