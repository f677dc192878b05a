"""What is kept on disk between processes: whole, for its key, or made again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tttc
from tests.helpers import differences, inputs_for, layer_result, oracle_result
from tttc.backends import cache
from tttc.library import LinearAttention

pytestmark = pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")


def made(text):
    """A maker of an entry, and how often it was called."""
    calls = []

    def make(path):
        calls.append(path)
        path.write_text(text)

    return make, calls


def test_an_entry_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    make, calls = made("kernel")
    first, second = (cache.cached("tvm", "a", ".so", make) for _ in range(2))
    assert first == second
    assert first.read_text() == "kernel"
    assert len(calls) == 1
    assert cache.cached("tvm", "b", ".so", make) != first
    assert not list(tmp_path.rglob("unfinished-*"))


@pytest.mark.parametrize("fault", ["truncated", "another key", "no note", "nonsense in the note"])
def test_a_corrupt_or_foreign_entry_is_made_again(tmp_path, monkeypatch, fault):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    make, calls = made("kernel")
    path = cache.cached("tvm", "a", ".so", make)
    (note,) = path.parent.glob("*.json")
    if fault == "truncated":
        path.write_text("ker")
    elif fault == "another key":
        note.write_text(json.dumps(json.loads(note.read_text()) | {"key": "b"}))
    elif fault == "no note":
        note.unlink()
    else:
        note.write_text("{")
    assert cache.cached("tvm", "a", ".so", make).read_text() == "kernel"
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path / "file"))
    layer = tttc.compile(LinearAttention, {"D": 3}, torch.float64, backend="tvm")
    inputs = inputs_for(layer, 5)
    with pytest.warns(UserWarning, match="nothing is cached.*TTTC_CACHE_DIR"):
        found = layer_result(layer, inputs)
    assert not differences(found, oracle_result(LinearAttention, inputs))


CALL = """
import sys, torch, tttc
from tttc.library import LinearAttention
layer = tttc.compile(LinearAttention, {"D": 6}, torch.float64, backend="tvm")
q, k, v = torch.ones(3, 1, 5, 1, 6, dtype=torch.float64).unbind()
print(layer(q, k, v, gates={n: torch.ones(1, 5, 1) for n in layer.signature.gates})[0].sum().item())
print("tvm" in sys.modules)
"""


COMMAND = dict(cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_the_cache(tmp_path, monkeypatch):
    """Two that compile at once both succeed; a third finds the kernel and does not even import TVM."""
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", CALL], **COMMAND) for _ in range(2)]
    outputs = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    third = subprocess.run([sys.executable, "-c", CALL], **COMMAND)
    assert third.returncode == 0, third.stderr
    sums = {out.split()[0] for out in (*(o for o, _ in outputs), third.stdout)}
    assert len(sums) == 1
    assert third.stdout.split()[1] == "False"


KILLED = """
import importlib, os, signal
scan = importlib.import_module("tttc.backends.tvm_cpu.scan")
def link(library, path):
    path.write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)
scan.link = link
"""


def test_a_process_that_is_killed_while_it_compiles_leaves_a_usable_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", KILLED + CALL], **COMMAND)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("tvm/unfinished-*/*"))
    after = [subprocess.run([sys.executable, "-c", CALL], **COMMAND) for _ in range(2)]
    assert [p.returncode for p in after] == [0, 0], after[0].stderr
    assert [p.stdout.split()[1] for p in after] == ["True", "False"]
    assert after[0].stdout.split()[0] == after[1].stdout.split()[0]


def test_what_was_left_half_done_is_removed_a_day_later(tmp_path, monkeypatch):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    old, new = (tmp_path / "tvm" / f"unfinished-{n}" for n in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "kernel").write_text("half")
    os.utime(old, (0, 0))
    cache.cached("tvm", "a", ".so", made("kernel")[0])
    assert not old.exists()
    assert new.exists()
