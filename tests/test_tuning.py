"""What was tuned before: keys, the nearest entry, the database, and what `tttc.compile` takes from it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tttc
from tests.helpers import differences, inputs_for, layer_result, oracle_result
from tttc.backends import registry, triton
from tttc.cli import doctor
from tttc.errors import ShapeError, TuningError
from tttc.ir.structure import structure
from tttc.library import GatedDeltaNet, LinearAttention, RetNet, TTTLinear
from tttc.tuning import database
from tttc.tuning import records as tuning_module
from tttc.tuning.records import Choice, Entry, Key, found_for

needs_tvm = pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")
CPU = torch.device("cpu")
READ_SHIPPED = database._shipped


@pytest.fixture(autouse=True)
def own_database(monkeypatch, tmp_path):
    """An empty one, and lookups, which all other tests have switched off."""
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TTTC_TUNING", "1")
    monkeypatch.setattr(database, "_shipped", lambda: ())


# -- keys and the nearest entry ----------------------------------------------------------------------------------------

KEY = Key("s", "torch", "cpu: Ours", "float32", {"D": 64}, {"torch": "2"})


def entry(key=KEY, choice=None, seconds=1.0, **settings):
    known = dict(default_seconds=2.0, batch=1, tokens=100, heads=2, threads=1, variant="V", tuned="2026-01-01T00:00:00")
    return Entry(key, choice or Choice(chunk=8), seconds, **{**known, **settings})


def dualized(variant, dims):
    return tttc.compile(variant, dims, torch.float64).stages["dualize"].program


def test_the_structure_is_that_of_the_rule_alone():
    renamed = type("SomethingElse", (TTTLinear,), {})
    wanted = structure(dualized(TTTLinear, {"D": 4}))
    assert structure(dualized(renamed, {"D": 4})) == wanted
    assert structure(dualized(TTTLinear, {"D": 8})) == wanted
    assert structure(tttc.compile(TTTLinear, {"D": 4}, chunk=1).stages["schedule"].program) == wanted
    assert structure(dualized(TTTLinear.replace(mini_batch=4), {"D": 4})) != wanted
    assert structure(dualized(RetNet, {"D": 4})) != structure(dualized(LinearAttention, {"D": 4}))


def test_the_exact_entry_is_the_one_tuned_last():
    old, new = (entry(tuned=f"202{n}", choice=Choice(chunk=n)) for n in (1, 2))
    forward = entry(replace(KEY, work="forward"), tuned="2023", choice=Choice(chunk=3))
    assert found_for(KEY, [new, old]).entry is new
    found = found_for(KEY, [new, forward, old])
    assert (found.how, found.entry) == ("exact", forward)


def test_the_nearest_entry_has_the_same_structure_and_says_what_differs():
    entries = [
        entry(replace(KEY, dims={"D": 256})),
        entry(replace(KEY, dims={"D": 128})),
        entry(replace(KEY, dims={"D": 64}, dtype="bfloat16")),
        entry(replace(KEY, device="cpu: Theirs")),
        entry(replace(KEY, structure="another")),
        entry(replace(KEY, backend="tvm")),
        entry(replace(KEY, device="cuda: Theirs")),
    ]
    found = found_for(KEY, entries)
    assert (found.how, found.entry) == ("nearest", entries[1])
    assert "tuned for D=128" in str(found)
    assert "tuned in bfloat16" in str(found_for(KEY, entries[2:]))
    assert "tuned on Theirs" in str(found_for(KEY, entries[3:]))
    assert found_for(KEY, entries[4:]).how == "default"
    other = found_for(replace(KEY, toolchain={"torch": "3"}), [entry()])
    assert (other.how, "tuned with torch 2" in str(other)) == ("nearest", True)


def test_entries_that_come_with_the_package_are_asked_after_the_users(tmp_path, monkeypatch):
    shipped, own = entry(choice=Choice(chunk=3), tuned="2027"), entry(choice=Choice(chunk=5))
    (tmp_path / "machine.json").write_text(database.written([shipped]))
    monkeypatch.setattr(database, "SHIPPED", tmp_path)
    monkeypatch.setattr(database, "_shipped", READ_SHIPPED.__wrapped__)
    assert found_for(KEY, *database.entries()).entry == shipped
    database.add([entry(keyed(8))])
    assert found_for(KEY, *database.entries()).entry == shipped
    database.add([own])
    assert found_for(KEY, *database.entries()).entry == own


# -- the database ------------------------------------------------------------------------------------------------------


def keyed(n):
    return replace(KEY, dims={"D": n})


def test_what_is_written_is_read():
    found = [entry(choice=Choice(32, 2, {"tile_rows": 4})), entry(keyed(8))]
    path = database.add(found)
    assert database.own_entries() == tuple(found)
    assert path.parent.name == "cache"
    assert json.loads(path.read_text())["format"] == database.FORMAT


def test_the_faster_entry_of_a_key_stays_and_a_new_run_replaces():
    slow, fast = entry(seconds=3.0), entry(seconds=4.0, tokens=1000)  # faster for each token
    database.add([slow])
    database.add([fast])
    assert database.own_entries() == (fast,)
    database.add([slow, entry(keyed(8))])
    assert database.own_entries() == (fast, entry(keyed(8)))
    database.add([slow], replace=True)
    assert database.own_entries()[0] == slow


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[]",
        '{"format": 1}',
        '{"format": "1", "entries": []}',
        '{"format": 1, "entries": [{}]}',
        '{"format": 1, "entries": [3]}',
        database.written([replace(entry(), seconds=-1.0)]),
        database.written([entry(choice=Choice(chunk="8"))]),
        database.written([entry(choice=Choice(config={"tile_rows": 0}))]),
        database.written([entry(replace(KEY, work="sleep"))]),
    ],
)
def test_a_corrupt_database_is_set_aside_with_a_warning(text):
    path = database.database_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"cannot be read .* is now .*tuned\.json\.corrupt"):
        layer = tttc.compile(LinearAttention, {"D": 2})
    assert layer.tuning.how == "default"
    assert path.with_name("tuned.json.corrupt").read_text() == text
    database.add([entry()])
    assert database.own_entries() == (entry(),)


def test_a_corrupt_database_is_no_obstacle_to_writing():
    path = database.add([entry()])
    path.write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match="cannot be read"):
        database.add([entry(keyed(8))])
    assert database.own_entries() == (entry(keyed(8)),)


def test_the_database_of_a_later_version_is_left_alone():
    path = database.database_path()
    path.parent.mkdir(parents=True)
    path.write_text('{"format": 2, "entries": []}')
    with pytest.warns(UserWarning, match="are not used: its format is 2"):
        assert database.own_entries() == ()
    with pytest.raises(TuningError, match="later version"):
        database.add([entry()])
    assert path.read_text() == '{"format": 2, "entries": []}'


def test_a_database_that_cannot_be_written_is_an_error_that_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path / "file"))
    assert database.own_entries() == ()
    with pytest.raises(TuningError, match="TTTC_CACHE_DIR"):
        database.add([entry()])


def test_writers_in_threads_lose_nothing():
    def write(n):
        for i in range(5):
            database.add([entry(keyed(10 * n + i + 1))])

    workers = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert {e.key.dims["D"] for e in database.own_entries()} == {10 * n + i + 1 for n in range(8) for i in range(5)}
    assert not list(database.database_path().parent.glob("*unfinished*"))


WRITE = """
import sys
from tests.test_tuning import database, entry, keyed
for i in range(20):
    database.add([entry(keyed(int(sys.argv[1]) + i))])
"""


def test_writers_in_processes_lose_nothing():
    command = dict(cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen([sys.executable, "-c", WRITE, str(n)], **command) for n in (100, 200)]
    errors = [p.communicate()[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], errors
    assert len(database.own_entries()) == 40


def test_files_are_exported_and_merged(tmp_path, monkeypatch):
    file = tmp_path / "shared.json"
    database.add([entry(), entry(keyed(8))])
    assert database.export_to(file) == 2
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path / "another"))
    database.add([entry(seconds=0.5)])
    assert database.import_from(file) == 2
    assert database.own_entries() == (entry(seconds=0.5), entry(keyed(8)))
    file.write_text("{}")
    with pytest.raises(TuningError, match="holds no results"):
        database.import_from(file)
    with pytest.raises(TuningError, match="cannot read"):
        database.import_from(tmp_path / "missing.json")


def test_what_comes_with_the_package_is_readable():
    assert all(database.parsed(path.read_text()) for path in database.SHIPPED.glob("*.json"))


# -- compile -----------------------------------------------------------------------------------------------------------


def tuned_for(variant, dims, choice, dtype=torch.float64, backend="torch", **settings):
    """Write an entry for a program, and return it."""
    program = dualized(variant, dims)
    key = tuning_module.key_of(program, backend, registry.named(backend, CPU).backend, CPU, dtype)
    found = entry(key, choice, **settings)
    database.add([found], replace=True)
    return found


def test_compile_takes_an_entry_and_computes_the_same():
    plain = tttc.compile(GatedDeltaNet, {"D": 3}, torch.float64)
    assert (plain.tuning.how, plain.stages.program.plan.chunk) == ("default", 64)
    found = tuned_for(GatedDeltaNet, {"D": 3}, Choice(chunk=8, checkpoint=2))
    layer = tttc.compile(GatedDeltaNet, {"D": 3}, torch.float64)
    assert (layer.tuning.how, layer.tuning.entry) == ("exact", found)
    assert layer.stages.program.plan.chunk == 8
    inputs = inputs_for(layer, 37)
    assert not differences(layer_result(layer, inputs), oracle_result(GatedDeltaNet, inputs))
    said = " ".join(layer.explain(stages=[]).replace("#", " ").split())
    assert "chunk=8, checkpoint=2: tuned for this program" in said
    assert "n here: 2 as tuned, for calls of at most 100 tokens, otherwise about sqrt(T/C)" in said


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no triton for this platform")
def test_what_was_tuned_wins_over_what_a_backend_prefers():
    place = (torch.float32, "cuda" if torch.cuda.is_available() else "cpu", "triton")
    assert tttc.compile(LinearAttention, {"D": 16}, *place).stages.program.plan.chunk == 32
    device = torch.device(place[1])
    key = tuning_module.key_of(dualized(LinearAttention, {"D": 16}), "triton", triton, device, place[0])
    database.add([entry(key, Choice(chunk=64))])
    layer = tttc.compile(LinearAttention, {"D": 16}, *place)
    assert (layer.tuning.how, layer.stages.program.plan.chunk) == ("exact", 64)


def test_what_is_given_wins():
    tuned_for(LinearAttention, {"D": 3}, Choice(chunk=8, checkpoint=2))

    def chosen(**settings):
        layer = tttc.compile(LinearAttention, {"D": 3}, torch.float64, **settings)
        return layer.stages.program.plan.chunk, layer._checkpoint(64)

    assert chosen() == (8, 2)
    assert chosen(chunk=16) == (16, 2)  # of four chunks; the checkpoint of another chunk is not taken
    assert chosen(chunk=8) == (8, 2)
    assert chosen(checkpoint=5) == (8, 5)
    assert chosen(checkpoint=None) == (8, 0)
    layer = tttc.compile(LinearAttention, {"D": 3}, torch.float64, chunk=16)
    assert layer.tuning.how == "default"
    assert "chunk=8" in str(layer.tuning)


def test_a_tuned_checkpoint_is_for_calls_no_longer_than_the_one_that_was_timed():
    tuned_for(LinearAttention, {"D": 3}, Choice(chunk=8, checkpoint=1), tokens=800)
    layer = tttc.compile(LinearAttention, {"D": 3}, torch.float64)
    assert layer._checkpoint(800) == 1
    assert layer._checkpoint(8 * 400) == 20


def test_nothing_is_looked_up_where_that_is_switched_off(monkeypatch):
    tuned_for(LinearAttention, {"D": 3}, Choice(chunk=8))
    monkeypatch.setenv("TTTC_TUNING", "0")
    layer = tttc.compile(LinearAttention, {"D": 3}, torch.float64)
    assert (layer.tuning.how, layer.stages.program.plan.chunk) == ("off", 64)
    assert "tuning" not in layer.explain()


def test_the_nearest_entry_is_taken_for_other_dims():
    tuned_for(LinearAttention, {"D": 3}, Choice(chunk=8, config={"gone": 3}))
    layer = tttc.compile(LinearAttention, {"D": 4}, torch.float64)
    assert (layer.tuning.how, layer.stages.program.plan.chunk) == ("nearest", 8)
    assert "tuned for D=3" in str(layer.tuning)


def test_where_nothing_was_tuned_nothing_is_computed(monkeypatch):
    monkeypatch.setattr(tuning_module, "structure", None)
    assert tttc.compile(LinearAttention, {"D": 3}).tuning.how == "default"


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(ShapeError, match=r"config has tile_rows=4; backend 'torch' has no settings"):
        tttc.compile(LinearAttention, {"D": 3}, config={"tile_rows": 4})


@needs_tvm
@pytest.mark.parametrize("config", [{"tile_rows": 0}, {"rows": 4}, {"unrolled": True}])
def test_settings_of_kernels_are_checked(config):
    with pytest.raises(ShapeError, match="has tile_rows, tile_vectors, unrolled, each a positive int"):
        tttc.compile(LinearAttention, {"D": 3}, backend="tvm", config=config)


@needs_tvm
@pytest.mark.parametrize(
    ("variant", "D", "config"),
    [
        (LinearAttention, 17, {"tile_rows": 1, "tile_vectors": 1, "unrolled": 1}),
        (LinearAttention, 40, {"tile_rows": 3, "tile_vectors": 2}),
        pytest.param(TTTLinear, 17, {"tile_rows": 5, "tile_vectors": 3, "unrolled": 2}, marks=pytest.mark.slow),
    ],
)
def test_kernels_of_any_settings_equal_the_oracle(variant, D, config):
    tuned_for(variant, {"D": D}, Choice(config=config), backend="tvm")
    layer = tttc.compile(variant, {"D": D}, torch.float64, backend="tvm")
    scan = next(iter(layer._scans.values()))
    assert {n: getattr(scan.config, n) for n in config} == config
    plain = tttc.compile(variant, {"D": D}, torch.float64, backend="tvm", config={})
    assert next(iter(plain._scans.values()))._key(False, ()) != scan._key(False, ())
    inputs = inputs_for(layer, 37)
    assert not differences(layer_result(layer, inputs), oracle_result(variant, inputs))


@needs_tvm
def test_settings_that_make_the_same_tiles_are_the_same():
    from tttc.backends.tvm_cpu import choices, identity

    program = tttc.compile(LinearAttention, {"D": 16}, chunk=16).stages.program
    assert identity(program, {}) == identity(program, {n: values[0] for n, values in choices(program).items()})
    assert identity(program, {"unrolled": 100}) == identity(program, {})
    assert identity(program, {"tile_rows": 1}) != identity(program, {})


def test_doctor_says_where_the_results_are(monkeypatch):
    def finding():
        return next(f for f in doctor.diagnose().machine if f.name == "tuning")

    assert finding().found == f"0 results in {database.database_path()}"
    path = database.add([entry()])
    assert finding() == doctor.DoctorFinding("tuning", "ok", f"1 result in {path}")
    monkeypatch.setenv("TTTC_TUNING", "0")
    assert (finding().status, finding().remedy) == ("absent", "unset TTTC_TUNING")
    path.write_text("{")
    assert finding().status == "problem"
