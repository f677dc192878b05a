"""Kernels of the Triton backend compiled for GPUs that are not here: each in a process in which Triton compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tttc
from benchmarks.resources import LIMIT, RESULTS, TARGETS
from tests.helpers import LIBRARY
from tttc.backends import nvidia
from tttc.backends.cost_model import NotCompiled
from tttc.backends.triton import compile_worker as worker
from tttc.backends.triton import llvm_flags as llvm_flags
from tttc.backends.triton.aot import compiled
from tttc.backends.triton.compile_process import SWITCHES, VARIABLE, CompileProcesses, Crashed, switches
from tttc.backends.triton.emit import emit_source
from tttc.backends.triton.kernel_spec import spec_of
from tttc.backends.triton.llvm_flags import order_of_source
from tttc.backends.triton.load import Module
from tttc.backends.triton.tune import Config

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or nvidia.ptxas() is None, reason="there is no triton for this platform"
)
KEPT = {(r["variant"], r["target"], r.get("pass")): r for r in json.loads(RESULTS.read_text())["rows"]}
SLACK = 64  # bytes: another release of the assembler may place a few registers otherwise
RUN = """
import json, sys
from benchmarks.resources import Work, measured
print(json.dumps(measured(Work(sys.argv[1], int(sys.argv[2]), sys.argv[3]))))
"""


LAUNCH = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from tttc.backends import triton as triton_backend
from tttc.compiler.driver import untuned
from tttc.backends.triton import compile_worker as worker
from tttc.backends.triton.aot import order_of
from tttc.backends.triton.emit import emit_source
from tttc.backends.triton.kernel_spec import spec_of
from tttc.backends.triton.load import Module
from tttc.backends.triton.tune import Config
from tttc.library import RetNet

class Absent:
    "The driver of a GPU that is not there."
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Absent())
heard = []
triton.knobs.compilation.listener = lambda **said: heard.append(said["cache_hit"])
program = untuned(RetNet, {"D": 16, "E": 16}, triton_backend)
spec = spec_of(program.scans[0], program)

module = Module(emit_source(program), program.name)
order = order_of(module, spec, False, torch.bfloat16, "sm_90", Config(4, 1))

def as_triton_does(folder):
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return worker.compiled(order, worker.function_of(order)).asm["ptx"]

before = as_triton_does(sys.argv[1])
sizes = {":C": 64, "D": 16, "E": 16}
tensors = [torch.zeros(1, 4, *(sizes[a.size] for a in t.of.axes)) for t in spec.tensors(False)]
given = [x for t, y in zip(spec.tensors(False), tensors) for x in (y, *y.stride()[:len(t.strides)])]
launched = module.kernel(spec.scan, False).warmup(
    *given, 4, 64, 1, 2, operand=triton.language.bfloat16, index=triton.language.int32, grid=(1,), num_warps=4
)
after, frugal = as_triton_does(sys.argv[2]), launched.asm["ptx"]
print(json.dumps([heard, launched.metadata.DISABLE_LLVM_OPT, before == after, before == frugal]))
"""


def run(*arguments: str) -> str:
    """Triton looks at TRITON_INTERPRET once, so what compiles has to be another process."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def compared(name: str, D: int, target: str) -> None:
    """It compiles within the shared memory of a program, and takes no more than it did."""
    for row in json.loads(run("-c", RUN, name, str(D), target)):
        known = KEPT[row["variant"], target, row.get("pass")]
        if "batched" in row:
            assert row["batched"] == known["batched"]
            continue
        assert row["shared"] <= LIMIT[target]
        assert row["spilled"] <= known["spilled"] + SLACK, f"{row['spilled']} bytes, {known['spilled']} before"


@pytest.mark.parametrize(("name", "target"), [("TTTLinear", "sm_80"), ("TTTLinear", "sm_90"), ("GLA", "gfx942")])
def test_a_few_variants_compile(name: str, target: str) -> None:
    compared(name, 64, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LIBRARY)
def test_every_library_variant_compiles(name: str, target: str) -> None:
    compared(name, 64, target)


def test_every_line_of_the_table_was_measured() -> None:
    assert {variant.split()[0] for variant, _, _ in KEPT} == set(LIBRARY)
    assert {target for _, target, _ in KEPT} == set(TARGETS)


def test_the_command_writes_what_a_launch_needs(tmp_path: Path) -> None:
    said = run("-m", "tttc", "compile", "RetNet", "--target", "sm_90", "--dims", "D=16", "-o", str(tmp_path))
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines()[1:]}
    assert rows["ret_net"][0] == "sm_90"
    assert int(rows["ret_net"][1]) >= 16
    for suffix in (".py", ".ttir", ".ttgir", ".ptx", ".cubin"):
        assert (tmp_path / f"ret_net_adjoint{suffix}").stat().st_size > 0


def test_the_command_compiles_for_amd(tmp_path: Path) -> None:
    said = run("-m", "tttc", "compile", "RetNet", "--target", "gfx942", "--dims", "D=16", "-o", str(tmp_path))
    assert "gfx942" in said
    for suffix in (".amdgcn", ".hsaco"):
        assert (tmp_path / f"ret_net{suffix}").stat().st_size > 0


def test_what_a_launch_compiles_has_few_registers_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from another process by way of Triton's cache; the switches of LLVM stay as they are in this one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    heard, said, unchanged, alike = json.loads(run("-c", LAUNCH, str(tmp_path / "one"), str(tmp_path / "two")))
    assert heard == [False, True, False]
    assert said == SWITCHES
    assert unchanged
    assert not alike


@pytest.mark.parametrize("failure", [NotCompiled("no such layout"), OSError("no more processes")])
def test_where_no_other_process_compiles_triton_does_as_always(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    import triton

    monkeypatch.setattr(llvm_flags, "_kept", lambda *asked: False)
    monkeypatch.setattr(triton, "compile", lambda source, **named: (source, named))
    answers: list[Exception | None] = [None, failure, Crashed("the compiler ended with -11")]

    def answer(self: CompileProcesses, order: object) -> None:
        if (now := answers.pop(0)) is not None:
            raise now

    monkeypatch.setattr(CompileProcesses, "answer", answer)
    asked = {"target": "sm_90"}, "source", "a target", {"num_warps": 4}
    assert llvm_flags.compiled(*asked)[1]["_env_vars"][VARIABLE] == SWITCHES
    assert llvm_flags.compiled(*asked) == ("source", {"target": "a target", "options": {"num_warps": 4}})
    with pytest.raises(Crashed, match="ended with -11"):
        llvm_flags.compiled(*asked)


def test_the_users_own_switches_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert switches("sm_80") == {VARIABLE: SWITCHES}
    assert not switches("gfx942")
    monkeypatch.setenv(VARIABLE, "disable-lsr")
    assert not switches("sm_80")


def test_a_source_that_is_no_plain_data_is_left_to_triton() -> None:
    source = SimpleNamespace(signature={"x": "*fp32", "n": "constexpr"}, constants={(1,): 3}, attrs={(0,): []})
    target = SimpleNamespace(backend="cuda", arch=90)
    order = order_of_source({"kernel": "f"}, source, target, {"num_warps": 4, "extern_libs": (("a", "b"),)})
    assert order == {
        "kernel": "f",
        "signature": {"x": "*fp32", "n": "constexpr"},
        "constants": {"n": 3},
        "attributes": {"x": []},
        "target": "sm_90",
        "options": {"num_warps": 4},
    }
    source.constants[(1,)] = object()
    assert order_of_source({"kernel": "f"}, source, target, {}) is None


def test_a_compiler_that_fails_is_an_error_of_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton prints its whole program where it gives up; what is said here is the first line, and the way out."""
    program = tttc.compile(LIBRARY["RetNet"], {"D": 16, "E": 16}, backend="torch").stages.program
    scan = program.scans[0]

    def fails(*asked: object) -> None:
        raise RuntimeError("PassManager::run failed\nmodule {\n")

    monkeypatch.setattr(worker, "asked", lambda order, function: (None, None))
    monkeypatch.setattr(llvm_flags, "compiled", fails)
    module = Module(emit_source(program), program.name)
    with pytest.raises(nvidia.ToolkitMissing) as raised:
        compiled(module, spec_of(scan, program), False, torch.bfloat16, "sm_100", Config())
    assert str(raised.value).startswith(f"Triton could not compile {scan.name} for sm_100: PassManager::run failed\n")
    assert "module {" not in str(raised.value)
