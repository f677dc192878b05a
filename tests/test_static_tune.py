"""Tuning for a GPU that is not there: its figures, estimates on made-up kernels, the search, what is kept and taken,
and one small run that compiles.
"""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import tttc
from tests.helpers import differences, inputs_for, layer_result, oracle_result
from tests.test_tune import run
from tests.test_tuning import KEY, dualized, entry
from tttc import api, database, tuning
from tttc.api import BACKENDS
from tttc.backends import nvidia
from tttc.backends.gpus import GPUS, architecture, architecture_of
from tttc.backends.nvidia import Resources
from tttc.backends.triton.apart import Compilers, Made, NotCompiled
from tttc.backends.triton.compiled import order_of
from tttc.backends.triton.emit import emit
from tttc.backends.triton.load import Module
from tttc.backends.triton.tune import Config
from tttc.errors import BackendRefusal, TuningError
from tttc.estimate import CONTRACTION, LOAD, STEP, Kernel, Turn, estimate, turn_of
from tttc.library import GatedDeltaNet, LinearAttention, RetNet, TTTLinear
from tttc.ranking import Row, rank, ranked
from tttc.static_tune import tune_statically
from tttc.tuning import Choice, architecture_name, found_for

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or nvidia.ptxas() is None, reason="there is no triton for this platform"
)
BF16 = torch.bfloat16
H100 = GPUS["sm_90"]


@pytest.fixture(autouse=True)
def own_database(monkeypatch, tmp_path):
    """An empty one, and lookups, which all other tests have switched off."""
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TTTC_TUNING", "1")
    monkeypatch.setattr(database, "_shipped", lambda: ())


# -- GPUs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "amd", "target"),
    [
        ((8, 0), "", "sm_80"),
        ((9, 0), "", "sm_90"),
        ((10, 0), "", "sm_100"),
        ((12, 1), "", "sm_121"),
        (None, "gfx942:sramecc+:xnack-", "gfx942"),
        ((9, 4), "gfx90a", "gfx90a"),
        (None, "", ""),
    ],
)
def test_what_a_driver_says_of_a_gpu_names_its_architecture(capability, amd, target):
    assert architecture(capability, amd) == target


def test_what_is_no_gpu_has_no_architecture():
    assert architecture_of(torch.device("cpu")) == ""


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 255, 0, 4, 2),  # 65536 / (256 * 128)
        ("sm_90", 121, 0, 4, 4),  # given out by eights: 128
        ("sm_90", 32, 0, 1, 32),  # as many as there may be
        ("sm_90", 16, 0, 16, 4),  # 64 warps
        ("sm_90", 64, 113 << 10, 4, 2),  # 1 KiB more each
        ("sm_90", 64, 114 << 10, 4, 1),
        ("sm_90", 64, 227 << 10, 4, 1),
        ("sm_90", 64, (227 << 10) + 1, 4, 0),
        ("sm_80", 64, 164 << 10, 4, 0),
        ("sm_80", None, 1 << 10, 4, 16),
        ("gfx942", 512, 0, 4, 1),
        ("gfx942", 128, 32 << 10, 4, 2),
        ("gfx942", 128, 0, 8, 2),
    ],
)
def test_as_many_programs_are_resident_as_there_is_room_for(target, registers, shared, warps, programs):
    assert GPUS[target].resident(Resources("k", target, registers, 0, shared), warps) == programs


# -- estimates ---------------------------------------------------------------------------------------------------------

TURN = Turn(matrix=2e6, elementwise=3e4, moved=3e4, chain=2)


def kernel(registers=128, spilled=0, shared=16384, warps=4, turns=128.0, turn=TURN, ahead=False):
    return Kernel(turn, turns, Made(Resources("k", "sm_90", registers, spilled, shared), ahead), warps)


def seconds(programs=132, gpu=H100, dtype=BF16, **settings):
    return estimate([kernel(**settings)], gpu, programs, dtype)


def test_the_estimate_is_the_formula():
    work = 132 * (2e6 / 989e12 + 3e4 / 66.9e12 + 3e4 / 3.35e12)
    waits = 2 * CONTRACTION + LOAD
    assert seconds() == pytest.approx(128 * (waits + work))
    assert seconds(warps=2) == pytest.approx(128 * (waits + 2 * work))  # half of a multiprocessor
    assert seconds(ahead=True) == pytest.approx(128 * (waits - LOAD + work))
    assert seconds(turn=replace(TURN, steps=15)) == pytest.approx(128 * (waits + 15 * STEP + work))
    assert seconds(turns=256.0) == pytest.approx(2 * seconds())
    slow = 132 * (2e6 / 66.9e12 + 3e4 / 66.9e12 + 3e4 / 3.35e12)
    assert seconds(dtype=torch.float32) == pytest.approx(128 * (waits + slow))
    assert seconds(spilled=100) == pytest.approx(seconds() + 128 * 132 * 2 * 100 * 128 / 3.35e12)


def test_programs_that_share_a_multiprocessor_wait_together_and_work_in_turn():
    assert seconds(programs=1) == seconds(programs=132)
    assert seconds(programs=133) == seconds(programs=264)
    assert seconds() < seconds(programs=4 * 132) < 4 * seconds()
    assert seconds(programs=8 * 132) == 2 * seconds(programs=4 * 132)  # four have room
    light = dict(programs=4 * 132, turn=replace(TURN, moved=3e3))
    assert seconds(**light, registers=255) > seconds(**light)
    assert seconds(**light, shared=100_000) > seconds(**light)


def test_what_does_not_fit_is_out_and_what_spills_comes_after_what_does_not():
    light = replace(TURN, moved=3e3)
    candidates = {
        "good": [kernel(turn=light), kernel(turn=light)],
        "spills": [kernel(turn=light), kernel(turn=light, spilled=800)],
        "spills more": [kernel(turn=light), kernel(turn=light, spilled=900)],
        "fewer at once": [kernel(turn=light, registers=255), kernel(turn=light, registers=255)],
        "too large": [kernel(shared=228 << 10)],
    }
    rows = {n: ranked({"a": 1}, kernels, H100, 4 * 132, BF16) for n, kernels in candidates.items()}
    refused = rows.pop("too large")
    assert refused.seconds is None
    assert refused.reason == "does not fit: k takes 233472 bytes of shared memory, 232448 at most"
    assert sorted(rows, key=lambda n: rows[n].seconds) == ["good", "fewer at once", "spills", "spills more"]
    unlimited = ranked({}, [kernel(registers=255, warps=32)], H100, 1, BF16)
    assert unlimited.reason == "does not fit: k takes more registers than there are"


def program_of(variant, dims, **settings):
    return tttc.compile(variant, dims, BF16, backend="torch", **settings).stages.program


def test_a_turn_is_what_the_program_costs():
    program = program_of(LinearAttention, {"D": 32}, chunk=16)
    turn = turn_of(program.scans[0], program, False, BF16)
    C, D = 16, 32
    assert turn.matrix == 2 * (C * D * D + C * C * D + C * C * D + C * D * D)  # q W, q k', A v, k' v
    assert turn.moved == 2 * 4 * C * D  # q, k, v and z
    assert (turn.chain, turn.steps, turn.loads) == (2, 0, 1)
    backward = turn_of(program.scans[0], program, True, BF16)
    assert backward.matrix > 2 * turn.matrix
    assert backward.loads == 2
    again, reverse = 2 * 2 * C * D, 2 * 7 * C * D  # k, v; then q, k, v, dz, dq, dk, dv
    assert again + reverse <= backward.moved <= again + reverse + 8 * D * D  # the carry, written and read


def test_blocks_are_as_wide_as_the_kernels_make_them():
    wide, narrow = (program_of(LinearAttention, {"D": D}, chunk=16) for D in (16, 9))
    turns = [turn_of(p.scans[0], p, False, BF16) for p in (wide, narrow)]
    assert turns[0].matrix == turns[1].matrix
    assert turns[0].moved > turns[1].moved


def test_a_triangular_system_goes_token_by_token():
    program = program_of(GatedDeltaNet, {"D": 16}, chunk=32)
    assert turn_of(program.scans[0], program, False, BF16).steps == 31


# -- the search --------------------------------------------------------------------------------------------------------


class Fake:
    """A subject whose estimates are a function; it may raise."""

    def __init__(self, seconds, choices):
        self.seconds, self.choices, self.compiled, self.lock = seconds, choices, [], threading.Lock()

    def identity(self, candidate):
        return tuple(candidate.items())

    def row(self, candidate, compilers, seconds):
        with self.lock:
            self.compiled.append(dict(candidate))
        return Row(candidate, (), self.seconds(candidate))


@pytest.mark.parametrize("workers", [1, 4])
def test_the_lowest_estimate_is_found_coordinate_by_coordinate(workers):
    fake = Fake(lambda c: 1 + abs(c["a"] - 3) + abs(c["b"] - 20), {"a": (1, 2, 3, 4), "b": (10, 20, 30)})
    found = rank(fake, 1000.0, workers=workers)
    assert found.best.candidate == {"a": 3, "b": 20}
    assert found.default.candidate == {"a": 1, "b": 10}
    assert found.stopped == "exhausted"
    assert len(fake.compiled) == len({str(c) for c in fake.compiled}) == len(found.rows) < 12


def test_of_equal_estimates_the_default_is_taken():
    found = rank(Fake(lambda c: 1.0, {"a": (2, 1, 3)}), 1000.0)
    assert found.best is found.default is found.rows[0]


def test_without_time_the_default_and_what_was_found_before_are_compiled():
    fake = Fake(lambda c: 1.0 / c["a"], {"a": (1, 2, 3)})
    found = rank(fake, 0.0, [{"a": 2}])
    assert [r.candidate["a"] for r in found.rows] == [1, 2]
    assert (found.best.candidate["a"], found.stopped) == (2, "budget")


def test_what_fails_is_a_line_and_never_a_crash():
    def guess(candidate):
        if candidate["a"] == 2:
            raise RuntimeError("PassManager::run\n  failed")
        return 1.0 / candidate["a"]

    found = rank(Fake(guess, {"a": (1, 2, 3)}), 1000.0)
    assert [(r.candidate["a"], r.reason) for r in found.rows if r.reason] == [(2, "failed: PassManager::run failed")]
    assert found.best.candidate == {"a": 3}
    found = rank(Fake(guess, {"a": (2, 3)}), 1000.0)
    assert (found.default, found.best.candidate) == (None, {"a": 3})


def test_an_interrupt_keeps_what_was_found():
    def report(found):
        if len(found.rows) > 1:
            raise KeyboardInterrupt

    found = rank(Fake(lambda c: 1.0, {"a": (1, 2, 3)}), 1000.0, workers=1, report=report)
    assert (found.stopped, found.best.candidate) == ("interrupted", {"a": 1})


# -- what is kept, and taken -------------------------------------------------------------------------------------------

HERE = replace(KEY, backend="triton", device="cuda: NVIDIA H100 80GB HBM3")
STATIC = entry(replace(HERE, device=architecture_name("sm_90")), Choice(chunk=16), static=True)


def test_what_was_measured_is_taken_before_what_was_estimated():
    measured = entry(HERE, tuned="2020")
    assert found_for(HERE, [STATIC, measured], (), "sm_90").entry is measured
    assert found_for(HERE, [STATIC], [measured], "sm_90").entry is measured
    of_other_dims = entry(replace(HERE, dims={"D": 128}))
    assert found_for(HERE, [STATIC, of_other_dims], (), "sm_90").how == "nearest"
    elsewhere = entry(replace(HERE, device="cuda: NVIDIA A100-SXM4-80GB"))
    found = found_for(HERE, [STATIC, elsewhere], (), "sm_90")
    assert (found.how, found.entry) == ("static", STATIC)
    assert "chosen for sm_90 without one" in str(found)
    assert "not measured" in str(found)
    assert found_for(HERE, [elsewhere], [STATIC], "sm_90").entry == STATIC


def test_an_estimate_holds_for_its_architecture_dtype_and_dims_alone():
    for changed in ({"dims": {"D": 128}}, {"dtype": "bfloat16"}, {"structure": "t"}, {"backend": "tvm"}):
        assert found_for(replace(HERE, **changed), [STATIC], (), "sm_90").how == "default"
    assert found_for(HERE, [STATIC], (), "sm_80").how == "default"
    assert found_for(HERE, [STATIC], (), "").how == "default"
    assert found_for(replace(HERE, device=STATIC.key.device), [STATIC]).how == "default"  # never as if measured
    older = replace(STATIC, key=replace(STATIC.key, toolchain={"triton": "3.6.0"}), tuned="2030")
    found = found_for(HERE, [older], (), "sm_90")
    assert (found.how, "tuned with triton 3.6.0" in str(found)) == ("static", True)
    assert found_for(HERE, [older, STATIC], (), "sm_90").entry == STATIC


def test_estimates_are_exported_and_merged_and_never_replace_what_was_measured(tmp_path):
    measured = replace(STATIC, static=False, seconds=2.0)
    database.add([STATIC])
    assert database.export_to(tmp_path / "out.json") == 1
    assert json.loads((tmp_path / "out.json").read_text())["entries"][0]["static"] is True
    database.database_path().unlink()
    assert database.import_from(tmp_path / "out.json") == 1
    assert database.own_entries() == (STATIC,)
    database.add([replace(STATIC, seconds=9.0, tuned="2027"), replace(STATIC, seconds=0.1, tuned="2025")])
    assert database.own_entries()[0].seconds == 9.0  # the later one: estimates of two versions are not to be compared
    database.add([measured])
    database.add([STATIC], replace=True)
    assert database.own_entries() == (measured,)


def test_an_entry_without_the_mark_was_measured():
    found = STATIC.as_json()
    del found["static"]
    assert tuning.Entry.from_json(found).static is False
    with pytest.raises(ValueError, match="is no entry"):
        tuning.Entry.from_json({**found, "static": "yes"})


@pytest.fixture
def on_an_h100(monkeypatch):
    """Layers are compiled as if for one; they cannot be called."""
    monkeypatch.setattr(tuning, "architecture_of", lambda device: "sm_90" if device.type == "cuda" else "")
    monkeypatch.setattr(tuning, "device_name", lambda device: HERE.device)
    monkeypatch.setattr(api, "_misplaced", lambda backend, device: [])


def keyed(variant, dims, dtype, device):
    found = tuning.key_of(dualized(variant, dims), "triton", BACKENDS["triton"], torch.device("cpu"), dtype)
    return replace(found, device=device)


def test_compile_takes_an_estimate_and_says_so(on_an_h100):
    choice = Choice(chunk=16, config={"num_warps": 8, "num_stages": 3})
    found = replace(STATIC, key=keyed(RetNet, {"D": 16}, BF16, architecture_name("sm_90")), choice=choice)
    database.add([found])
    layer = tttc.compile(RetNet, {"D": 16}, BF16, device="cuda", backend="triton")
    assert (layer.tuning.how, layer.tuning.entry) == ("static", found)
    assert layer.stages.program.plan.chunk == 16
    assert {tuple(o.values()) for o in layer._scans["ret_net"]._options.values()} == {(8, 3)}
    said = " ".join(layer.explain(stages=[]).replace("#", " ").split())
    assert "chunk=16, num_warps=8, num_stages=3: chosen for sm_90 without one" in said
    assert "not measured" in said
    given = tttc.compile(RetNet, {"D": 16}, BF16, device="cuda", backend="triton", chunk=32)
    assert (given.tuning.how, given.stages.program.plan.chunk) == ("default", 32)
    database.add([entry(keyed(RetNet, {"D": 16}, BF16, HERE.device), Choice(chunk=32))])
    assert tttc.compile(RetNet, {"D": 16}, BF16, device="cuda", backend="triton").tuning.how == "exact"


def test_an_estimate_for_a_gpu_is_nothing_to_a_cpu():
    found = replace(STATIC, key=keyed(RetNet, {"D": 4}, torch.float64, architecture_name("sm_90")))
    database.add([found])
    layer = tttc.compile(RetNet, {"D": 4}, torch.float64)
    assert layer.tuning.how == "default"
    inputs = inputs_for(layer, 20)
    assert not differences(layer_result(layer, inputs), oracle_result(RetNet, inputs))


# -- compiled in processes of their own --------------------------------------------------------------------------------


def order(text=None):
    program = program_of(LinearAttention, {"D": 16}, chunk=16)
    module = Module(emit(program), program)
    made = order_of(module, program.scans[0], False, BF16, "sm_90", Config(4, 1))
    return {**made, "source": text} if text else made


@needs_triton
@pytest.mark.parametrize(
    ("text", "seconds", "said"),
    [
        ("import os; os.abort()", 60.0, "ended with -6"),
        ("raise RuntimeError('no such layout')", 60.0, "RuntimeError: no such layout"),
        ("import time; time.sleep(60)", 0.2, "not compiled in 0.2 s"),
        ("import sys; sys.stderr.write('x.py:3:0: error: rank\\n' + 'module {}\\n' * 9); sys.exit(1)", 60.0, "rank"),
    ],
)
def test_a_compiler_that_crashes_or_hangs_is_a_reason(text, seconds, said):
    compilers = Compilers()
    with pytest.raises(NotCompiled, match=said):
        compilers.compiled(order(text), seconds)
    assert not compilers.running


def test_after_the_end_nothing_begins():
    compilers = Compilers()
    compilers.end()
    with pytest.raises(NotCompiled, match="interrupted"):
        compilers.compiled(order("pass"), 60.0)


@needs_triton
@pytest.mark.parametrize("target", GPUS)
def test_a_real_kernel_compiles_where_triton_interprets(monkeypatch, target):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = Compilers().compiled({**order(), "target": target}, 300.0).resources
    assert (found.kernel, found.target) == ("linear_attention", target)
    assert 16 <= found.registers <= 512
    assert found.shared > 0
    assert GPUS[target].resident(found, 4) > 0


@needs_triton
def test_a_small_run_compiles_ranks_and_keeps_the_best():
    result = tttc.tune(TTTLinear, {"D": 16}, BF16, "sm_90", budget=0.01, progress=False)
    (default,) = result.ranking.rows
    assert default is result.ranking.best
    assert [k.made.resources.kernel for k in default.kernels] == ["ttt_linear", "ttt_linear_adjoint"]
    assert all(16 <= k.made.resources.registers <= 255 for k in default.kernels)
    (found,) = database.own_entries()
    assert (found.static, found.key, found.key.device) == (True, result.key, "cuda: sm_90")
    assert found.seconds == default.seconds
    said = str(result)
    assert "registers" in said
    assert "Nothing was measured" in said
    assert f"kept in {database.database_path()}" in said
    again = run("tune", "ttt_linear", "--dims", "D=16", "--device", "sm_90", "--dtype", "bfloat16", "--budget", "0.01s")
    assert again.exit_code == 0, again.output
    assert "default" in again.stdout
    assert "TTTLinear for sm_90, backend triton, D=16, bfloat16; forward and backward at B=16" in again.stdout


@needs_triton
def test_what_the_budget_cuts_short_is_no_failure(monkeypatch):
    monkeypatch.setattr("tttc.ranking.LONGEST", 0.1)
    with pytest.raises(TuningError, match="no time was left to compile ret_net"):
        tttc.tune(RetNet, {"D": 16}, BF16, "sm_90", budget=0.1, progress=False)


# -- what cannot be tuned ----------------------------------------------------------------------------------------------


def fixed(monkeypatch, refused=False):
    """Compiles nothing: kernels of eight warps spill nothing."""

    def compiled(self, order, left):
        if refused:
            raise NotCompiled("no such layout")
        spilled = 0 if order["options"]["num_warps"] == 8 else 800
        return Made(Resources(order["kernel"], order["target"], 128, spilled, 1024), False)

    monkeypatch.setattr(Compilers, "compiled", compiled)
    monkeypatch.setattr("tttc.static_tune.missing_for", lambda backend, target, program: [])


@pytest.mark.parametrize("target", GPUS)
def test_a_run_on_made_up_kernels(monkeypatch, target):
    fixed(monkeypatch)
    size = dict(batch=2, tokens=100, heads=3)
    result = tttc.tune(GatedDeltaNet, {"D": 16}, BF16, target, budget=60, progress=False, **size)
    assert result.ranking.stopped == "exhausted"
    assert {r.candidate["chunk"] for r in result.ranking.rows} == {16, 32, 64}
    assert result.choice.chunk in (16, 32, 64)
    assert result.key.device == f"cuda: {target}"
    other = tttc.tune(GatedDeltaNet, {"D": 16}, BF16, target, budget=60, progress=False, forward_only=True, tokens=7)
    assert replace(other.key, work="training") == result.key  # neither B nor T
    assert all(len(r.kernels) == 1 for r in other.ranking.rows)
    assert len(database.own_entries()) == 2


def test_an_earlier_result_is_compiled_again_and_stays_if_nothing_is_better(monkeypatch):
    fixed(monkeypatch)
    first = tttc.tune(GatedDeltaNet, {"D": 16}, BF16, "sm_90", budget=60, progress=False)
    assert first.ranking.best is not first.ranking.default
    assert first.choice.config["num_warps"] == 8
    second = tttc.tune(GatedDeltaNet, {"D": 16}, BF16, "sm_90", budget=0.001, progress=False)
    assert len(second.ranking.rows) == 2
    assert second.choice == first.choice


def test_where_nothing_compiles_nothing_is_kept(monkeypatch):
    fixed(monkeypatch, refused=True)
    with pytest.raises(TuningError, match=r"no candidate for sm_90 could be taken: .*failed: ret_net: no such layout"):
        tttc.tune(RetNet, {"D": 16}, BF16, "sm_90", budget=60, progress=False)
    assert not database.database_path().exists()


def test_a_loop_that_is_no_kernel_is_refused_with_the_reason(monkeypatch):
    fixed(monkeypatch)
    with pytest.raises(TuningError, match=r"nothing to tune for sm_90: its loop is no kernel .* because its chunk is"):
        tttc.tune(TTTLinear.replace(mini_batch="all", read="end"), {"D": 16}, BF16, "sm_90", progress=False)


def test_what_triton_cannot_compile_is_refused():
    with pytest.raises(BackendRefusal, match="float64"):
        tttc.tune(TTTLinear, {"D": 16}, torch.float64, "sm_90", progress=False)


def test_other_backends_have_nothing_to_tune_for_a_gpu():
    with pytest.raises(TuningError, match="only the kernels of triton have"):
        tune_statically(TTTLinear, {"D": 16}, BF16, "sm_90", 1.0, backend="tvm", size=(1, 1, 1))


def test_where_there_is_a_gpu_its_architecture_is_named(monkeypatch):
    monkeypatch.setattr(sys.modules["tttc.tune"], "architecture_of", lambda device: "sm_90")
    with pytest.raises(TuningError, match='Use device="sm_90"'):
        tttc.tune(TTTLinear, {"D": 4}, device="cuda:0")


@pytest.mark.parametrize("device", ["sm_75", "sm_9", "gfx90a", "h100", "SM_90"])
def test_the_command_names_the_targets_that_there_are(device):
    result = run("tune", "ttt_linear", "--device", device)
    assert result.exit_code == 2, result.output
    assert f'cannot tune for device "{device}"' in result.stderr
    assert "sm_80, sm_90, sm_100, gfx942" in result.stderr
    assert "Traceback" not in result.output


def test_a_gpu_of_amd_is_asked_for_its_own_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    found = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert architecture_of(torch.device("cuda")) == "gfx942"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert architecture_of(torch.device("cuda")) == "sm_100"
