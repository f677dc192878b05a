"""Every story of `examples` is short and runs, as `python -m examples.NAME`."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tttc.backends import nvidia

ROOT = Path(__file__).parent.parent
LONGEST = 60  # lines


def stories() -> list[str]:
    return sorted(p.stem for p in (ROOT / "examples").glob("*.py") if p.stem != "__init__")


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *options: object) -> str:
    """What the example prints, run as `python -m` does, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    runpy.run_module(f"examples.{name}", run_name="__main__", alter_sys=True)
    return capsys.readouterr().out


def test_there_are_six_and_each_is_run_here() -> None:
    """But for two, which tests/test_end_to_end_example.py and tests/test_train_bytes.py run."""
    known = ["end_to_end", "own_learner", "own_rule", "stream_memory", "train_bytes", "tune_for_absent_gpu"]
    assert stories() == known


@pytest.mark.parametrize("name", stories())
def test_each_is_one_short_file_that_says_how_to_run_it(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= LONGEST
    assert f"    python -m examples.{name}" in text.split('"""')[1]


def test_a_learner_of_ones_own_shows_its_mathematics(monkeypatch, capsys, tmp_path) -> None:
    said = run(monkeypatch, capsys, "own_learner", "--out", tmp_path / "mine.tex")
    assert "dgate = outer(k, " in said
    assert "for c in chunks(T, 8):" in said
    assert "GatedMemory: equal to the oracle" in said
    assert r"\subsection*{Dual form}" in (tmp_path / "mine.tex").read_text()


def test_a_rule_of_ones_own_forgets(monkeypatch, capsys) -> None:
    said = run(monkeypatch, capsys, "own_rule")
    assert "S_t = momentum_t * S_(t-1) + lr_t * g_t" in said
    assert "Memory: equal to the oracle" in said
    left = [int(line.split(":")[1].split("%")[0]) for line in said.splitlines() if line.startswith("decay ")]
    assert len(left) == 3
    assert left == sorted(left, reverse=True)  # the more it forgets, the less is left of what came first


def test_a_memory_is_streamed_and_saved(monkeypatch, capsys) -> None:
    said = run(monkeypatch, capsys, "stream_memory")
    assert "after 26 tokens: State(W1: [1, 1, 16, 16]" in said
    assert "position=10" in said
    assert "from all at once" in said


@pytest.mark.skipif(find_spec("triton") is None or nvidia.ptxas() is None, reason="there is no triton here")
def test_a_gpu_that_is_not_there_is_tuned_for(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    said = run(monkeypatch, capsys, "tune_for_absent_gpu", "--width", 16, "--budget", "1s")
    assert "LinearAttention for sm_90" in said
    assert "Nothing was measured" in said
    assert (tmp_path / "tuned.json").exists()
