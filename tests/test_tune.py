"""Tuning: the search on a clock of its own, and all of it on real layers and from the command line.

No time that was really measured is ever compared with anything.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import tttc
from tests.test_tuning import dualized, tuned_for
from tttc.backends import registry
from tttc.backends import torch as torch_backend
from tttc.cli.main import app
from tttc.errors import BackendRefusal, TuningError
from tttc.library import LinearAttention, TTTLinear
from tttc.tuning import database
from tttc.tuning import search as search_module
from tttc.tuning.accuracy import Accuracy
from tttc.tuning.chunks import chunk_choices
from tttc.tuning.descent import descend
from tttc.tuning.records import Choice, Key
from tttc.tuning.search import IncorrectResult

SMALL = {"batch": 1, "tokens": 48, "heads": 1, "progress": False}


@pytest.fixture(autouse=True)
def own_database(monkeypatch, tmp_path):
    """An empty one, and lookups, which all other tests have switched off."""
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TTTC_TUNING", "1")
    monkeypatch.setattr(database, "_shipped", lambda: ())


# -- the search --------------------------------------------------------------------------------------------------------


class Fake:
    """A subject and its clock: compiling takes `compiling` seconds, a call what `seconds` says of a candidate."""

    def __init__(self, seconds, compiling=1.0, prepare=lambda candidate: None, identity=None):
        self.seconds, self.compiling, self.checked, self.own = seconds, compiling, prepare, identity
        self.now, self.prepared, self.called = 0.0, [], []

    def clock(self):
        return self.now

    def identity(self, candidate):
        return self.own(candidate) if self.own else (tuple(candidate.items()), ())

    def prepare(self, candidate):
        self.prepared.append(dict(candidate))
        self.now += self.compiling
        self.checked(candidate)

        def call():
            self.called.append(dict(candidate))
            self.now += self.seconds(candidate)

        return call

    def search(self, choices, budget=1000.0, **settings):
        return search_module.search(self, choices, budget, clock=self.clock, **settings)


def test_the_fastest_combination_is_found_coordinate_by_coordinate():
    fake = Fake(lambda c: 0.1 + 0.01 * abs(c["a"] - 3) + 0.01 * abs(c["b"] - 20))
    found = fake.search({"a": (1, 2, 3, 4), "b": (10, 20, 30)})
    assert found.best.candidate == {"a": 3, "b": 20}
    assert found.stopped == "exhausted"
    assert found.best.verdict == "confirmed"
    assert found.speedup == pytest.approx(0.22 / 0.1)


@pytest.mark.parametrize("rounds_in_time", [9, 1])
def test_a_descent_goes_on_while_something_near_is_better(rounds_in_time):
    """Down a valley that lies across both coordinates; where no time is left, it says so."""
    seconds = {(0, 0): 6, (1, 0): 5, (1, 1): 4, (2, 1): 3, (2, 2): 2}
    best, tried = {"a": 0, "b": 0}, []

    def attempt(name, values):
        nonlocal best
        tried.append(name)
        if len(tried) > 2 * rounds_in_time:
            return False
        near = [{**best, name: v} for v in values]
        best = min(near, key=lambda c: seconds.get((c["a"], c["b"]), 9))
        return True

    ended = descend({"a": (0, 1, 2), "b": (0, 1, 2)}, lambda: best, attempt)
    if rounds_in_time == 1:
        assert (best, ended, len(tried)) == ({"a": 1, "b": 1}, "budget", 4)
    else:
        assert (best, ended, len(tried)) == ({"a": 2, "b": 2}, "exhausted", 6)


def test_the_default_stays_where_nothing_is_faster():
    found = Fake(lambda c: 0.1 if c["a"] == 1 else 0.0985).search({"a": (1, 2, 3)})  # by less than can be told
    assert found.best is found.default
    assert {t.verdict for t in found.trials[1:]} == {"no faster"}


@pytest.mark.parametrize("budget", [5.0, 20.0, 61.0])
def test_the_budget_is_kept_compilation_included(budget):
    fake = Fake(lambda c: 0.2, compiling=2.0)
    found = fake.search({"a": tuple(range(1, 100))}, budget)
    assert found.stopped == "budget"
    assert found.elapsed == fake.now <= budget
    assert fake.now > budget - 8  # and it was used


def test_the_default_is_measured_whatever_it_takes():
    found = Fake(lambda c: 1.0, compiling=50.0).search({"a": (1, 2)}, budget=1.0)
    assert [t.verdict for t in found.trials] == ["default"]
    assert found.best.seconds == pytest.approx(1.0)


def test_what_needs_no_compilation_is_still_tried_when_little_time_is_left():
    fake = Fake(lambda c: 0.01, compiling=0.0, identity=lambda c: (c["a"], c["b"]))
    fake.checked = lambda c: setattr(fake, "now", fake.now + (10.0 if c["b"] == 1 else 0.0))
    found = fake.search({"a": (1, 2), "b": (1, 2, 3)}, budget=16.0)
    assert [t.candidate for t in found.trials] == [{"a": 1, "b": n} for n in (1, 2, 3)]


def test_a_wrong_candidate_is_never_called_and_said():
    def check(candidate):
        if candidate["a"] == 2:
            raise IncorrectResult("grad k 3.1e-02, more than 1e-05")
        if candidate["a"] == 3:
            raise RuntimeError("LLVM ERROR:\n  out of registers")

    fake = Fake(lambda c: 1.0 / c["a"], prepare=check)
    found = fake.search({"a": (1, 2, 3, 4)})
    assert [(t.candidate["a"], t.verdict, t.reason) for t in found.rejected] == [
        (2, "wrong", "grad k 3.1e-02, more than 1e-05"),
        (3, "failed", "LLVM ERROR: out of registers"),
    ]
    assert {c["a"] for c in fake.called} == {1, 4}
    assert found.best.candidate == {"a": 4}


def test_a_default_that_is_wrong_is_replaced():
    def check(candidate):
        if candidate["a"] < wrong:
            raise IncorrectResult("z")

    wrong = 2
    found = Fake(lambda c: 0.1, prepare=check).search({"a": (1, 2, 3)})
    assert found.default is None
    assert found.best.candidate == {"a": 2}
    wrong = 9
    assert Fake(lambda c: 0.1, prepare=check).search({"a": (1, 2, 3)}).best is None


def test_what_compiles_to_the_same_is_tried_once():
    fake = Fake(lambda c: 0.1, identity=lambda c: (c["a"] // 2, ()))
    fake.search({"a": (1, 2, 3, 4, 5)})
    assert [c["a"] for c in fake.prepared] == [1, 2, 4]


def test_beyond_what_is_slower_nothing_is_tried_along_an_ordered_coordinate():
    times = {64: 0.1, 32: 0.2, 16: 0.3, 128: 0.08, 256: 0.07, 512: 0.2}
    fake = Fake(lambda c: times[c["a"]])
    found = fake.search({"a": (64, 32, 128, 16, 256, 512)}, ordered=("a",))
    assert found.best.candidate == {"a": 256}
    assert 16 not in [c["a"] for c in fake.prepared]


def test_what_is_known_from_elsewhere_is_tried_right_after_the_default():
    fake = Fake(lambda c: 0.1)
    fake.search({"a": (1, 2, 3), "b": (1, 2)}, first=[{"a": 3, "b": 2}, {"a": 1}, {"c": 1}])
    assert fake.prepared[:2] == [{"a": 1, "b": 1}, {"a": 3, "b": 2}]


def test_one_that_was_lucky_is_not_confirmed():
    """Fast until the other coordinate is searched, and then as slow as the default."""
    fake = Fake(lambda c: 0.05 if c["a"] == 2 and len(fake.prepared) < 3 else 0.1)
    found = fake.search({"a": (1, 2), "b": (1, 2)})
    assert [t.verdict for t in found.trials] == ["default", "faster", "no faster", "not confirmed"]
    assert found.best is found.default
    assert found.speedup == 1


def test_an_interrupt_keeps_what_was_found():
    def check(candidate):
        if candidate["a"] == stop:
            raise KeyboardInterrupt

    stop = 3
    found = Fake(lambda c: 1.0 / c["a"], prepare=check).search({"a": (1, 2, 3, 4)})
    assert found.stopped == "interrupted"
    assert found.best.candidate == {"a": 2}
    stop = 1
    with pytest.raises(KeyboardInterrupt):
        Fake(lambda c: 1.0, prepare=check).search({"a": (1, 2)})


def test_a_hopeless_candidate_is_called_once():
    fake = Fake(lambda c: 0.1 if c["a"] == 1 else 60.0)
    fake.search({"a": (1, 2)}, budget=100.0)
    assert sum(c["a"] == 2 for c in fake.called) == 1


# -- tune --------------------------------------------------------------------------------------------------------------


def test_a_key_has_neither_tokens_nor_batch():
    assert {f.name for f in fields(Key)} == {"structure", "backend", "device", "dtype", "dims", "toolchain", "work"}
    one, other = (
        tttc.tune(LinearAttention, {"D": 3}, budget=0.1, backend="torch", save=False, progress=False, **size).key
        for size in (dict(batch=1, tokens=20, heads=1), dict(batch=2, tokens=33, heads=3))
    )
    assert one == other


def test_chunks_are_a_choice_only_where_the_schedule_leaves_them_free():
    assert chunk_choices(dualized(LinearAttention, {"D": 3}), 2048)[0] == 64
    assert set(chunk_choices(dualized(LinearAttention, {"D": 3}), 100)) == {1, 8, 16, 32, 64}
    assert chunk_choices(dualized(LinearAttention, {"D": 3}), 2048, 32)[0] == 32  # as a backend prefers
    assert chunk_choices(dualized(TTTLinear, {"D": 3}), 2048) == ()
    assert chunk_choices(dualized(TTTLinear.replace(mini_batch=64), {"D": 3}), 2048) == (64, 32, 16)


def test_a_short_run_does_not_forget_what_a_longer_one_found():
    found = tuned_for(LinearAttention, {"D": 3}, Choice(chunk=8), seconds=1e-9, default_seconds=1e-8)
    result = tttc.tune(LinearAttention, {"D": 3}, torch.float64, budget=1e-3, backend="torch", **SMALL)
    assert database.own_entries() == (found,)
    assert "an earlier result stays, which was not tried again: chunk=8" in str(result)
    result = tttc.tune(LinearAttention, {"D": 3}, torch.float64, budget=5, backend="torch", **SMALL)
    assert result.search.trials[1].candidate["chunk"] == 8
    assert database.own_entries()[0].tuned != found.tuned


def test_what_was_tuned_is_taken_from_then_on():
    result = tttc.tune(LinearAttention, {"D": 3}, torch.float64, budget=3, backend="torch", **SMALL)
    assert not result.search.rejected
    assert result.path == database.database_path()
    layer = tttc.compile(LinearAttention, {"D": 3}, torch.float64, backend="torch")
    assert (layer.tuning.how, layer.tuning.choice) == ("exact", result.choice)
    assert layer.stages.program.plan.chunk == (result.choice.chunk or 64)
    assert "LinearAttention on cpu" in str(result)
    assert "default (" in str(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_only_checks_and_times_the_forward(dtype):
    result = tttc.tune(TTTLinear, {"D": 8}, dtype, budget=0.1, backend="torch", forward_only=True, save=False, **SMALL)
    assert [t.verdict for t in result.search.trials] == ["default"]
    assert result.key.work == "forward"
    assert not database.database_path().exists()


def faulty(fault):
    """The torch backend with a setting; where that is 2 its first output is not what it should be."""

    def load(source, program, settings=None, place=None):
        scans = torch_backend.load_scans(source, program)
        return {n: Faulty(s, fault) for n, s in scans.items()} if (settings or {}).get("fault") == 2 else scans

    return SimpleNamespace(
        ROWS=torch_backend.ROWS,
        refusals=torch_backend.refusals,
        unavailable=torch_backend.unavailable,
        notes=torch_backend.notes,
        emit_source=torch_backend.emit_source,
        load_scans=load,
        preferred_chunk=torch_backend.preferred_chunk,
        choices=lambda program: {"fault": (1, 2)},
        identity=lambda program, settings: tuple(settings.items()),
        toolchain=lambda: {},
    )


def registered(monkeypatch, backend):
    monkeypatch.setattr(registry, "_units", [*registry.units(), registry.Unit("faulty", "a fault", lambda: backend)])


class Faulty:
    """A scan whose forward or backward is off by a thousandth, or fails."""

    accepts_16bit, pull = False, None

    def __init__(self, scan, fault):
        self.scan, self.fault, self.differentiable = scan, fault, scan

    def prewarm_backward(self, inputs):
        self.scan.prewarm_backward(inputs)

    def forward(self, inputs, checkpoint):
        if self.fault == "raises":
            raise RuntimeError("no such instruction")
        (z, *others), kept = self.scan.forward(inputs, checkpoint)
        return (z * 1.001 if self.fault == "forward" else z, *others), kept

    def backward(self, *arguments):
        found, *others = self.scan.backward(*arguments)
        return (found * 1.001 if self.fault == "backward" else found, *others)


@pytest.mark.parametrize("fault", ["forward", "backward", "raises"])
def test_a_wrong_kernel_is_rejected_and_reported(monkeypatch, fault):
    registered(monkeypatch, faulty(fault))
    monkeypatch.setattr(search_module, "TIMED_SECONDS", 0.1)
    result = tttc.tune(TTTLinear, {"D": 4}, budget=60, backend="faulty", **SMALL)
    (rejected,) = result.search.rejected
    assert rejected.candidate["fault"] == 2
    said = {"forward": "z 1.0e-03, more than", "backward": "grad ", "raises": "no such instruction"}
    assert said[fault] in rejected.reason
    assert result.choice.config == {}
    assert "1 rejected" in str(result)


def test_where_torch_itself_rounds_more_a_candidate_may_be_twice_as_far_off(monkeypatch):
    errors = {"good": 9e-6, "torch": 2e-5, "close": 3.9e-5, "far": 4.1e-5, "nan": float("nan")}
    monkeypatch.setattr(Accuracy, "errors", lambda self, layer: {"grad k": errors[layer]})
    monkeypatch.setattr(Accuracy, "_excuses", {})

    def said(layer):
        try:
            Accuracy(None, torch.float32, 1, lambda: "torch", forward_only=False).check(layer)
        except IncorrectResult as wrong:
            return str(wrong)

    assert [said(layer) for layer in ("good", "torch", "close")] == [None, None, None]
    assert said("far") == "grad k 4.1e-05, more than 4.0e-05"
    assert said("nan") == "grad k nan, more than 4.0e-05"
    errors |= {"torch": 1.0, "far": 1.1e-4}  # no excuse for what is plainly wrong
    assert said("far") == "grad k 1.1e-04, more than 1.0e-04"


def test_where_every_candidate_is_wrong_nothing_is_kept(monkeypatch):
    broken = faulty("forward")
    broken.choices = lambda program: {"fault": (2,)}
    broken.load_scans = lambda source, program, settings=None, place=None: {
        n: Faulty(s, "forward") for n, s in torch_backend.load_scans(source, program).items()
    }
    registered(monkeypatch, broken)
    with pytest.raises(TuningError, match=r"no candidate could be taken: wrong: z 1\.0e-03"):
        tttc.tune(TTTLinear, {"D": 4}, budget=0.1, backend="faulty", **SMALL)
    assert not database.database_path().exists()


def test_what_a_backend_refuses_is_not_tuned():
    with pytest.raises(BackendRefusal, match="float64 is no dtype of its matrix products"):
        tttc.tune(TTTLinear, {"D": 4}, torch.float64, backend="triton", **SMALL)


REFUSED = {
    "device": dict(device="cuda"),
    "architecture": dict(device="sm_75"),
    "budget": dict(budget="soon"),
    "budget_zero": dict(budget=0),
    "budget_negative": dict(budget="-3s"),
    "backend": dict(backend="jax"),
    "backend_forward_only": dict(backend="onnx"),
    "dtype": dict(dtype=torch.int32),
    "tokens": dict(tokens=0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_tuned_is_refused(name, golden, monkeypatch):
    monkeypatch.setattr(sys.modules["tttc.tuning.tune"], "architecture_of", lambda device: "")
    with pytest.raises(TuningError) as caught:
        tttc.tune(TTTLinear, {"D": 4}, **REFUSED[name])
    golden(f"tune/{name}", f"{type(caught.value).__name__}: {caught.value}")


@pytest.mark.parametrize(("text", "seconds"), [("60s", 60), ("1.5m", 90), ("1h", 3600), (7, 7), (" 2 min ", 120)])
def test_budgets_are_times(text, seconds):
    from tttc.tuning.tune import _budget_seconds

    assert _budget_seconds(text) == seconds


# -- the command line --------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_prints_what_it_tried_and_keeps_it(tmp_path):
    size = ("--dims", "D=3", "--tokens", 48, "--heads", 1, "--backend", "torch", "--budget", "1s", "--dtype", "float64")
    result = run("tune", "linear_attention", *size, "--export", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "default (" in result.stdout
    assert "taken: " in result.stdout
    assert "wrote 1 result to" in result.stderr
    assert tttc.compile(LinearAttention, {"D": 3}, torch.float64, backend="torch").tuning.how == "exact"
    database.database_path().unlink()
    result = run("tune", "--import", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "merged 1 result" in result.stderr
    assert len(database.own_entries()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ttt_linear", "--device", "cuda"), "this version times candidates on the CPU"),
        (("ttt_linear", "--budget", "soon"), "it must be a time"),
        (("ttt_linear", "--dtype", "int8"), "is none of float64"),
        (("ttt_linear", "--dims", "D=4,Q=3"), "has no dim Q"),
        (("ttt_linear", "--dims", "D=4,"), "is not a dim and its size"),
        (("--import", "missing.json"), "cannot read missing.json"),
        ((), "there is nothing to tune"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, said):
    result = run("tune", *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
