"""What is known of GPUs, estimates on made-up kernels, and the search that goes by them. Nothing compiles."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tttc
from tttc.backends.cost_model import CONTRACTION, LOAD, SOLVE_STEP, EstimatedKernel, IterationCost, KernelInfo, estimate
from tttc.backends.target import GPUS, Resources, architecture, architecture_of
from tttc.backends.triton.cost_model import turn_of
from tttc.backends.triton.kernel_spec import spec_of
from tttc.library import GatedDeltaNet, LinearAttention
from tttc.tuning.ranking import RankedRow, rank, ranked

BF16 = torch.bfloat16
H100 = GPUS["sm_90"]


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


def test_a_gpu_of_amd_is_asked_for_its_own_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    found = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert architecture_of(torch.device("cuda")) == "gfx942"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert architecture_of(torch.device("cuda")) == "sm_100"


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

TURN = IterationCost(matrix=2e6, elementwise=3e4, moved=3e4, chain=2)


def kernel(registers=128, spilled=0, shared=16384, warps=4, turns=128.0, turn=TURN, ahead=False):
    return EstimatedKernel(turn, turns, KernelInfo(Resources("k", "sm_90", registers, spilled, shared), ahead), warps)


def seconds(programs=132, gpu=H100, dtype=BF16, **settings):
    return estimate([kernel(**settings)], gpu, programs, dtype)


def test_the_estimate_is_the_formula():
    work = 132 * (2e6 / 989e12 + 3e4 / 66.9e12 + 3e4 / 3.35e12)
    waits = 2 * CONTRACTION + LOAD
    assert seconds() == pytest.approx(128 * (waits + work))
    assert seconds(warps=2) == pytest.approx(128 * (waits + 2 * work))  # half of a multiprocessor
    assert seconds(ahead=True) == pytest.approx(128 * (waits - LOAD + work))
    assert seconds(turn=replace(TURN, steps=15)) == pytest.approx(128 * (waits + 15 * SOLVE_STEP + work))
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
    turn = turn_of(spec_of(program.scans[0], program), False, BF16)
    C, D = 16, 32
    assert turn.matrix == 2 * (C * D * D + C * C * D + C * C * D + C * D * D)  # q W, q k', A v, k' v
    assert turn.moved == 2 * 4 * C * D  # q, k, v and z
    assert (turn.chain, turn.steps, turn.loads) == (2, 0, 1)
    backward = turn_of(spec_of(program.scans[0], program), True, BF16)
    assert backward.matrix > 2 * turn.matrix
    assert backward.loads == 2
    again, reverse = 2 * 2 * C * D, 2 * 7 * C * D  # k, v; then q, k, v, dz, dq, dk, dv
    assert again + reverse <= backward.moved <= again + reverse + 8 * D * D  # the carry, written and read


def test_blocks_are_as_wide_as_the_kernels_make_them():
    wide, narrow = (program_of(LinearAttention, {"D": D}, chunk=16) for D in (16, 9))
    turns = [turn_of(spec_of(p.scans[0], p), False, BF16) for p in (wide, narrow)]
    assert turns[0].matrix == turns[1].matrix
    assert turns[0].moved > turns[1].moved


def test_a_triangular_system_goes_by_blocks_of_tokens():
    short, program, longer = (program_of(GatedDeltaNet, {"D": 16}, chunk=c) for c in (16, 32, 64))
    turns = [turn_of(spec_of(p.scans[0], p), False, BF16) for p in (short, program, longer)]
    assert [t.steps for t in turns] == [15, 15, 15]
    assert [t.chain - turns[0].chain for t in turns] == [0, 3, 5]  # inverses of twice as many tokens, and their use


def test_strips_are_programs():
    """Each with its part of the state and of what is written, and what they share made in each."""
    program = program_of(LinearAttention, {"D": 256}, chunk=16)
    spec = spec_of(program.scans[0], program)
    assert spec.strips == 8
    turn, C, D, E = turn_of(spec, False, BF16), 16, 256, 32
    assert turn.matrix == 2 * (C * D * E + C * C * D + C * C * E + C * D * E)
    assert turn.moved == 2 * (2 * C * D + 2 * C * E)


# -- the search --------------------------------------------------------------------------------------------------------


class Fake:
    """A subject whose estimates are a function; it may raise."""

    def __init__(self, seconds, choices):
        self.seconds, self.choices, self.compiled, self.lock = seconds, choices, [], threading.Lock()

    def identity(self, candidate):
        return tuple(candidate.items())

    def row(self, candidate, seconds, best):
        with self.lock:
            self.compiled.append(dict(candidate))
        return RankedRow(candidate, (), self.seconds(candidate))

    def end(self):
        self.ended = True


@pytest.mark.parametrize("workers", [1, 4])
def test_the_lowest_estimate_is_found_coordinate_by_coordinate(workers):
    fake = Fake(lambda c: 1 + abs(c["a"] - 3) + abs(c["b"] - 20), {"a": (1, 2, 3, 4), "b": (10, 20, 30)})
    found = rank(fake, 1000.0, workers=workers)
    assert found.best.candidate == {"a": 3, "b": 20}
    assert found.default.candidate == {"a": 1, "b": 10}
    assert found.stopped == "exhausted"
    assert fake.ended
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
