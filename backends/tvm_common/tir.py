"""TVM, imported when something of it is first asked for: it takes two seconds, and kept kernels need none of it.

T.serial(n)        as if after `from tvm.script.ir_builder import tirx as T`
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from importlib import import_module
from threading import RLock
from typing import Any

import torch


def set_up() -> None:
    """What the thread pool of TVM reads when it starts: left alone it takes half of the cores, and its workers spin on
    those of torch while they wait.
    """
    os.environ.setdefault("TVM_NUM_THREADS", str(max(os.cpu_count() or 1, torch.get_num_threads())))
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")


def imported_tvm() -> Any:
    """TVM, imported without what its parser of Python source does to `inspect` for the whole process."""
    set_up()
    before = inspect.getfile, inspect.findsource
    import tvm
    import tvm.script

    inspect.getfile, inspect.findsource = before
    return tvm


PASS_SETTINGS = {"tirx.disable_storage_rewrite": True}  # it would merge the accumulators and drop their annotation
# Passes that find nothing in these functions, whose memory, loops and shared values are where they should be, and that
# would take as long as LLVM.
LEFT_OUT = (
    "s_tir.CompactBufferAllocation",
    "s_tir.PlanAndUpdateBufferAllocationLocation",
    "s_tir.LoopPartition",
    "s_tir.HoistIfThenElse",
    "tirx.CommonSubexprElim",
    "tirx.RemoveNoOp",
)


def compiled(function: Any, target: Any, without: Sequence[str] = ()) -> Any:
    """A function of TensorIR as TVM compiles it for a target, without some more passes."""
    tvm = imported_tvm()
    with tvm.transform.PassContext(opt_level=3, config=PASS_SETTINGS, disabled_pass=[*LEFT_OUT, *without]):
        return tvm.compile(function, target=target)


writing = RLock()  # of whoever writes TensorIR


class Lazy:
    """A name of TVM."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def __getattr__(self, name: str) -> Any:
        self.__dict__[name] = found = getattr(self._found(), name)
        return found

    def __call__(self, *arguments: Any) -> Any:
        return self._found()(*arguments)

    def _found(self) -> Any:
        imported_tvm()
        return getattr(import_module(self._module), self._name)


T: Any = Lazy("tvm.script.ir_builder", "tirx")
IRBuilder: Any = Lazy("tvm.script.ir_builder", "IRBuilder")
tirx: Any = Lazy("tvm", "tirx")
