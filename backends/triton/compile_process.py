"""Kernels compiled in processes of their own, in which Triton compiles even where it interprets in this one: one that
crashes, or takes too long, takes nothing else with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tttc.backends import nvidia
from tttc.backends.cost_model import CompileTimeout, KernelInfo, NotCompiled
from tttc.backends.target import Target
from tttc.backends.triton import compile_worker as worker
from tttc.backends.triton.resources import resources

COPIES_AHEAD = "cp.async"  # in PTX: memory is read for a later turn of the loop while this one computes
# Triton sets each switch of LLVM that this variable lists. Without these, LLVM makes the address of every place of a
# block before the loop, and has no register left for them in it: on sm_90 a backward of two layers spills 6.4 KB, with
# them 4.1.
VARIABLE, SWITCHES = "DISABLE_LLVM_OPT", "disable-lsr,sink-insts-to-avoid-spills,nvptx-sched4reg"


class Crashed(NotCompiled):
    """The compiler took its process with it."""


@dataclass
class CompileProcesses:
    """The processes that are compiling; `end` stops them all, and no other begins."""

    running: set[subprocess.Popen[str]] = field(default_factory=set)
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def compiled(self, order: Mapping[str, Any], seconds: float) -> KernelInfo:
        """A kernel compiled, in at most so many seconds. Raises `NotCompiled`, whatever it was that failed."""
        began = time.perf_counter()
        found = self.answer(order, seconds)
        left = max(seconds - (time.perf_counter() - began), 1.0)
        try:
            taken = resources(found["texts"], found["name"], found["shared"], order["target"], left)
        except subprocess.TimeoutExpired:
            raise CompileTimeout(f"not compiled in {seconds:.1f} s") from None
        except nvidia.ToolkitMissing as error:
            raise NotCompiled(_shortened(str(error))) from None
        ptx = found["texts"].get("ptx")
        return KernelInfo(taken, order["options"]["num_stages"] > 1 if ptx is None else COPIES_AHEAD in ptx)

    def end(self) -> None:
        with self.lock:
            self.ended = True
            for process in self.running:
                _stopped(process)

    def answer(self, order: Mapping[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """What a worker says that an order was made into. Raises `NotCompiled`."""
        target = order["target"]
        process, order = self._started(target), {**order, "driver": Target(target).driver}
        try:
            said, complaint = process.communicate(json.dumps(order), timeout=seconds)
        except subprocess.TimeoutExpired:
            _stopped(process)
            process.communicate()  # which closes its pipes
            raise CompileTimeout(f"not compiled in {seconds:.1f} s") from None
        except BaseException:  # Ctrl-C does not reach the group of that process
            _stopped(process)
            raise
        finally:
            with self.lock:
                self.running.discard(process)
        if process.returncode:
            failure = NotCompiled if process.returncode > 0 else Crashed
            raise failure(_shortened(complaint) or f"the compiler ended with {process.returncode}")
        found: dict[str, Any] = json.loads(said)
        return found

    def _started(self, target: str) -> subprocess.Popen[str]:
        """A process that finds the same packages, but never interprets. It leads a group: an assembler that it runs
        ends with it.
        """
        environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
        environment |= switches(target)
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        with self.lock:
            if self.ended:
                raise NotCompiled("interrupted")
            process = subprocess.Popen(
                [sys.executable, "-P", worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,
            )
            self.running.add(process)
        return process


def switches(target: str) -> dict[str, str]:
    """The environment in which kernels for a target are compiled for few registers, unless the user's says otherwise.
    LLVM's switches stay where they are set: in this process they would hold for the kernels of others as well.
    """
    return {VARIABLE: SWITCHES} if Target(target).nvidia and not os.environ.get(VARIABLE) else {}


def _stopped(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _shortened(complaint: str) -> str:
    """The first line that names an error, otherwise the last; compilers may print the whole program after it."""
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.casefold()]
    return (named or lines[-1:] or [""])[0][:200]
