"""Tuning for a GPU that is not there: what is kept and taken, what compiles in processes of its own, and runs of it,
one of which compiles.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import tttc
from tests.helpers import differences, inputs_for, layer_result, oracle_result
from tests.test_estimate import BF16, program_of
from tests.test_tune import run
from tests.test_tuning import KEY, dualized, entry
from tttc.backends import nvidia
from tttc.backends import triton as triton_backend
from tttc.backends.cost_model import KernelInfo, NotCompiled
from tttc.backends.target import GPUS, Resources
from tttc.backends.triton.aot import order_of
from tttc.backends.triton.compile_process import CompileProcesses, Crashed
from tttc.backends.triton.emit import emit_source
from tttc.backends.triton.kernel_spec import spec_of
from tttc.backends.triton.load import Module
from tttc.backends.triton.tune import Config
from tttc.errors import BackendRefusal, TuningError
from tttc.library import TTTMLP, GatedDeltaNet, LinearAttention, RetNet, TTTLinear
from tttc.tuning import database
from tttc.tuning import records as tuning
from tttc.tuning.ranking import RankedRow
from tttc.tuning.records import Choice, architecture_name, found_for
from tttc.tuning.static import tune_statically
from tttc.tuning.task import Task

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or nvidia.ptxas() is None, reason="there is no triton for this platform"
)


@pytest.fixture(autouse=True)
def own_database(monkeypatch, tmp_path):
    """An empty one, and lookups, which all other tests have switched off."""
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TTTC_TUNING", "1")
    monkeypatch.setattr(database, "_shipped", lambda: ())


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
    monkeypatch.setattr("tttc.tuning.lookup.architecture_of", lambda device: "sm_90" if device.type == "cuda" else "")
    monkeypatch.setattr(tuning, "device_name", lambda device: HERE.device)
    monkeypatch.setattr(triton_backend, "unavailable", lambda device: [])


def keyed(variant, dims, dtype, device):
    found = tuning.key_of(dualized(variant, dims), "triton", triton_backend, torch.device("cpu"), dtype)
    return replace(found, device=device)


def test_compile_takes_an_estimate_and_says_so(on_an_h100):
    choice = Choice(chunk=16, config={"num_warps": 8, "num_stages": 3})
    found = replace(STATIC, key=keyed(RetNet, {"D": 16}, BF16, architecture_name("sm_90")), choice=choice)
    database.add([found])
    layer = tttc.compile(RetNet, {"D": 16}, BF16, device="cuda", backend="triton")
    assert (layer.tuning.how, layer.tuning.entry) == ("static", found)
    assert layer.stages.program.plan.chunk == 16
    assert {tuple(o.values()) for o in layer._scans["ret_net"].kernels.options.values()} == {(8, 3)}
    said = " ".join(layer.explain(stages=[]).replace("#", " ").split())
    assert "chunk=16, num_warps=8, num_stages=3: chosen for sm_90 without one" in said
    assert "not measured" in said
    given = tttc.compile(RetNet, {"D": 16}, BF16, device="cuda", backend="triton", chunk=32)
    assert (given.tuning.how, given.stages.program.plan.chunk) == ("default", 32)
    database.add([entry(keyed(RetNet, {"D": 16}, BF16, HERE.device), Choice(chunk=32))])
    assert tttc.compile(RetNet, {"D": 16}, BF16, device="cuda", backend="triton").tuning.how == "exact"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_layer_for_one_compiles_all_the_same():
    database.add([replace(STATIC, key=keyed(RetNet, {"D": 4}, torch.float32, architecture_name("sm_90")))])
    assert tttc.compile(RetNet, {"D": 4}, device="cuda").tuning.how == "default"


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
    module = Module(emit_source(program), program.name)
    made = order_of(module, spec_of(program.scans[0], program), False, BF16, "sm_90", Config(4, 1))
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
    compilers = CompileProcesses()
    with pytest.raises(NotCompiled, match=said):
        compilers.compiled(order(text), seconds)
    assert not compilers.running


@needs_triton
def test_a_crash_is_told_from_an_error():
    with pytest.raises(Crashed, match="ended with -6"):
        CompileProcesses().answer(order("import os; os.abort()"))
    with pytest.raises(NotCompiled) as raised:
        CompileProcesses().answer(order("raise RuntimeError('no such layout')"))
    assert raised.type is NotCompiled


def test_after_the_end_nothing_begins():
    compilers = CompileProcesses()
    compilers.end()
    with pytest.raises(NotCompiled, match="interrupted"):
        compilers.compiled(order("pass"), 60.0)


@needs_triton
@pytest.mark.parametrize("target", GPUS)
def test_a_real_kernel_compiles_where_triton_interprets(monkeypatch, target):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = CompileProcesses().compiled({**order(), "target": target}, 300.0).resources
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
    monkeypatch.setattr("tttc.tuning.ranking.LONGEST", 0.1)
    with pytest.raises(TuningError, match="no time was left to compile ret_net"):
        tttc.tune(RetNet, {"D": 16}, BF16, "sm_90", budget=0.1, progress=False)


# -- what cannot be tuned ----------------------------------------------------------------------------------------------


def fixed(monkeypatch, refused=False):
    """Compiles nothing: kernels of eight warps spill nothing."""

    def compiled(self, order, left):
        if refused:
            raise NotCompiled("no such layout")
        spilled = {8: 0, 2: 8000}.get(order["options"]["num_warps"], 800)
        return KernelInfo(Resources(order["kernel"], order["target"], 128, spilled, 1024), False)

    monkeypatch.setattr(CompileProcesses, "compiled", compiled)
    monkeypatch.setattr("tttc.tuning.static.refuse_to_compile", lambda unit, target, program: None)


@pytest.mark.parametrize("target", GPUS)
def test_a_run_on_made_up_kernels(monkeypatch, target):
    fixed(monkeypatch)
    size = dict(batch=2, tokens=100, heads=3)
    result = tttc.tune(GatedDeltaNet, {"D": 16}, BF16, target, budget=60, progress=False, **size)
    assert result.ranking.stopped == "exhausted"
    assert {r.candidate["chunk"] for r in result.ranking.rows} == {16, 32, 64}
    assert result.choice.chunk in (16, 32, 64)
    assert result.choice.config["num_warps"] == 8
    poor = [r for r in result.ranking.rows if r.candidate["num_warps"] == 2]
    assert {(r.reason, len(r.kernels)) for r in poor} == {("slower than the best before all of it was compiled", 1)}
    assert result.key.device == f"cuda: {target}"
    other = tttc.tune(GatedDeltaNet, {"D": 16}, BF16, target, budget=60, progress=False, forward_only=True, tokens=7)
    assert replace(other.key, work="training") == result.key  # neither B nor T
    assert all(len(r.kernels) == 1 for r in other.ranking.rows)
    assert len(database.own_entries()) == 2


@pytest.mark.parametrize(
    ("changes", "turns"),
    [
        ({"mini_batch": 16}, {"ttt_linear": 8}),
        ({"mini_batch": 24}, {"ttt_linear": 6}),  # the last one is shorter
        ({"mini_batch": 128}, {"ttt_linear": 1}),
        ({"mini_batch": 128, "chunk": 64}, {"ttt_linear_open": 2, "ttt_linear_close": 1}),
        ({"mini_batch": 64, "chunk": 16}, {"ttt_linear_open": 8, "ttt_linear_close": 2}),
        ({"mini_batch": "all"}, {"ttt_linear_open": 128 // 64, "ttt_linear_close": 1}),
    ],
)
def test_every_kernel_counts_as_often_as_a_call_runs_it(monkeypatch, changes, turns):
    fixed(monkeypatch)
    monkeypatch.setattr(
        "tttc.tuning.static.ranked", lambda candidate, kernels, *rest: RankedRow(candidate, kernels, 1.0)
    )
    chunk = changes.pop("chunk", None)
    variant = TTTLinear.replace(**changes)
    result = tttc.tune(variant, {"D": 16}, BF16, "sm_90", budget=60, tokens=128, progress=False)
    row = next(r for r in result.ranking.rows if chunk in (None, r.candidate.get("chunk")))
    found = {k.made.resources.kernel: k.turns for k in row.kernels}
    assert found == turns | {f"{n}_adjoint": x for n, x in turns.items()}


def test_what_is_no_kernel_is_said_to_be_left_out(monkeypatch):
    fixed(monkeypatch)
    online = TTTMLP.replace(mini_batch=1, anchor="token")
    result = tttc.tune(online, {"D": 16, "F": 16}, BF16, "sm_90", budget=60, progress=False)
    assert {k.made.resources.kernel for k in result.ranking.rows[0].kernels} == {"tttmlp", "tttmlp_adjoint"}
    assert "Not in the estimate: tttmlp_rows, which is batched operations (its rows come one after" in str(result)


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
        tune_statically(Task(TTTLinear, {"D": 16}, BF16, "tvm", 1, 1, 1, 1.0), "sm_90")


def test_where_there_is_a_gpu_its_architecture_is_named(monkeypatch):
    monkeypatch.setattr(sys.modules["tttc.tuning.tune"], "architecture_of", lambda device: "sm_90")
    with pytest.raises(TuningError, match='Use device="sm_90"'):
        tttc.tune(TTTLinear, {"D": 4}, device="cuda:0")


@pytest.mark.parametrize("device", ["sm_75", "sm_9", "gfx90a", "h100", "SM_90"])
def test_the_command_names_the_targets_that_there_are(device):
    result = run("tune", "ttt_linear", "--device", device)
    assert result.exit_code == 2, result.output
    assert f'cannot tune for device "{device}"' in result.stderr
    assert "sm_80, sm_90, sm_100, gfx942" in result.stderr
    assert "Traceback" not in result.output
