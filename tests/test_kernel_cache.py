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
from tttc.backends import cache, folders
from tttc.backends.triton import llvm_flags
from tttc.cli import doctor
from tttc.library import LinearAttention
from tttc.tuning import database

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


# -- whose folder it is ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a cache that has one entry, as another user would find it."""
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path / "cache"))
    cache.cached("tvm", "a", ".so", made("kernel")[0])
    return tmp_path / "cache"


def rights(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_cache_is_made_for_the_user_alone(folder: Path, tmp_path: Path) -> None:
    assert [rights(folder), rights(folder / "tvm")] == [0o700, 0o700]
    database.add([], path=tmp_path / "tuned" / "tuned.json")
    assert rights(tmp_path / "tuned") == 0o700


@pytest.mark.parametrize("kind", ["", "tvm"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_no_kernel_is_loaded_from_where_others_can_write(folder: Path, kind: str, mode: int) -> None:
    (folder / kind).chmod(mode)
    make, calls = made("another kernel")
    with pytest.warns(
        UserWarning, match=rf"can be written to by others .*{mode:04o}.*yours, chmod 700 {folder / kind}$"
    ):
        path = cache.cached("tvm", "a", ".so", make)
    assert path is not None
    assert folder not in path.parents
    assert rights(path.parent.parent if not kind else path.parent) == 0o700
    assert cache.cached("tvm", "a", ".so", make) == path  # said once, and kept as long as the process
    assert len(calls) == 1
    (folder / kind).chmod(0o755)
    assert cache.cached("tvm", "a", ".so", make).read_text() == "kernel"


def owned_by(monkeypatch: pytest.MonkeyPatch, owners: dict[Path, int]) -> None:
    """Some paths belong to others."""

    def found(path: Path, follow: bool) -> os.stat_result:
        real = os.stat(path, follow_symlinks=follow)
        return os.stat_result([*real[:4], owners.get(path, real.st_uid), *real[5:]])

    monkeypatch.setattr(folders.Path, "lstat", lambda path: found(path, False))


def test_no_kernel_is_loaded_from_a_folder_of_someone_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owned_by(monkeypatch, {folder / "tvm": 4242})
    with pytest.warns(UserWarning, match="tvm belongs to the user 4242: no kernels are loaded.*set TTTC_CACHE_DIR to"):
        path = cache.cached("tvm", "a", ".so", made("mine")[0])
    assert path is not None
    assert path.read_text() == "mine"


def test_the_doctor_says_whose_folder_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._cache().status == "ok"
    owned_by(monkeypatch, {folder: 4242})
    assert "belongs to the user 4242" in str(doctor._cache())


def test_a_link_is_as_safe_as_who_made_it_and_where_it_leads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    monkeypatch.setenv("TTTC_CACHE_DIR", str(link))
    assert cache.cached("tvm", "a", ".so", made("another")[0]).read_text() == "kernel"
    for other in (link, folder):
        with monkeypatch.context() as patched:
            owned_by(patched, {other: 4000 + len(str(other))})
            with pytest.warns(UserWarning, match="link belongs to the user"):
                assert cache.cached("tvm", "a", ".so", made("another")[0]).read_text() == "another"


@pytest.mark.parametrize("leads", ["../outside.so", "/tmp/outside.so", "..", "", "kernel.so", "a\0b", None, 7, ["a"]])
def test_a_note_leads_to_the_file_beside_it_alone(folder: Path, leads: object) -> None:
    (note,) = (folder / "tvm").glob("*.json")
    (folder / "outside.so").write_text("kernel")
    (folder / "tvm" / "kernel.so").write_text("kernel")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"file": leads}))
    make, calls = made("made again")
    assert cache.cached("tvm", "a", ".so", make).read_text() == "made again"
    assert len(calls) == 1


@pytest.mark.parametrize("theirs", ["a link", "a folder", "a file of someone else"])
def test_what_lies_in_the_place_of_a_kernel_is_the_users_own_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str
) -> None:
    (path,) = (folder / "tvm").glob("*.so")
    if theirs == "a file of someone else":
        owned_by(monkeypatch, {path: 4242})
    else:
        path.unlink()
        (tmp_path / "outside.so").write_text("kernel")
        path.symlink_to(tmp_path / "outside.so") if theirs == "a link" else path.mkdir()
    make, calls = made("kernel")
    if theirs == "a folder":
        with pytest.warns(UserWarning, match="nothing is cached"):
            assert cache.cached("tvm", "a", ".so", make) is None
    else:
        assert cache.cached("tvm", "a", ".so", make) == path
        assert not path.is_symlink()
    assert len(calls) == 1


def test_triton_loads_from_a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own"))
    llvm_flags.keep_cache_private()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "own")
    assert rights(tmp_path / "own") == 0o700
    (tmp_path / "own").chmod(0o777)
    with pytest.warns(UserWarning, match="own can be written to by others"):
        llvm_flags.keep_cache_private()
    assert rights(Path(os.environ["TRITON_CACHE_DIR"])) == 0o700
