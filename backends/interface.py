"""What every backend offers. A backend sees scans of chunks; never a learner, a derivative or a dual form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from tttc.backends.cost_model import EstimatedKernel
from tttc.backends.scan import CompiledScan
from tttc.backends.target import Resources
from tttc.ir.names import Wording
from tttc.ir.program import AdjointProgram, Scan, ScanProgram

Settings = Mapping[str, int]
"""How kernels are made, beside the program: names that the backend gives, which never change a result."""


@dataclass(frozen=True)
class Source:
    """Generated code: a file that can be printed, saved and read. It is written when it is first asked for."""

    write: Callable[[], str | Wording]
    language: str
    outline: Callable[[], str] | None = None
    """The same in short, where the text is too long to be read among the stages of a program."""

    @cached_property
    def text(self) -> str:
        return self.wording.text

    @property
    def shown(self) -> str:
        """The text, or what stands for it in short."""
        return self.text if self.outline is None else self.outline()

    @cached_property
    def wording(self) -> Wording:
        """The text, and what it calls the functions of the program, and their variables."""
        made = self.write()
        return Wording(made, {}, {}) if isinstance(made, str) else made


@dataclass(frozen=True)
class Placement:
    """Where a program will run: the device of its tensors, and the dtype of its tokens."""

    device: torch.device
    dtype: torch.dtype


HOST = Placement(torch.device("cpu"), torch.float32)


@dataclass(frozen=True)
class ChunkHint:
    """A chunk that a backend would rather have than the one that costs the least, and why, in words."""

    chunk: int
    why: str


@dataclass(frozen=True, kw_only=True)
class EmittedProgram(AdjointProgram):
    """A program and the text of its kernels."""

    source: Source

    def __str__(self) -> str:
        return self.source.shown


@dataclass(frozen=True, kw_only=True)
class FileKernels:
    """Kernels in an exported Python file, whose loops are what calls them."""

    about: str
    """What the file says of them."""
    imports: str
    source: Path
    """A file that has the functions and classes `names`, of which the exported one has copies."""
    names: tuple[str, ...]
    head: str
    """What makes the kernels of one loop, of the arguments `made`, by the words for the loops; None where they cannot
    run: "Kernels("."""
    made: Mapping[str, Sequence[str]]

    @property
    def place(self) -> str:
        """What stands in a file instead of the kernels until its names are words."""
        return "# fmt: off\n# fmt: on"

    def within(self, file: str) -> str:
        """A file with the kernels at their place."""
        raise NotImplementedError


class FileWriter(Protocol):
    """What writes kernels into exported Python files."""

    @property
    def file_kernels(self) -> Callable[[AdjointProgram, Mapping[str, Scan]], FileKernels | None]:
        """Those of scans, by the words that stand for these in the file; None where none of them is a kernel."""


class Backend(Protocol):
    """The functions of a backend package: those that make kernels, and those that say what about them may be chosen."""

    @property
    def ROWS(self) -> Collection[str]:
        """The operations that it has a row for: what is defined by a formula, and has none, it is given as that."""
        ...

    def refusals(self, program: ScanProgram) -> list[str]:
        """Why this backend cannot run the program; empty when it can."""
        ...

    def unavailable(self, device: torch.device) -> list[str]:
        """Why it cannot run on a device, whatever the program; all that it needs is installed."""
        ...

    def here(self) -> str:
        """What it does on this machine, in words: `tttc doctor` says it."""
        ...

    def notes(self, program: ScanProgram) -> list[str]:
        """What a user should know of how it runs the program; `explain` says it."""
        ...

    def emit_source(self, program: AdjointProgram, settings: Settings | None = None, place: Placement = HOST) -> Source:
        """The program of the adjoint stage as what is compiled, or run; written when it is first read."""
        ...

    def load_scans(
        self, source: Source, program: AdjointProgram, settings: Settings | None = None, place: Placement = HOST
    ) -> Mapping[str, CompiledScan]:
        """Source text as callables, by the names of the scans; settings that are not given are the default."""
        ...

    def preferred_chunk(self, program: ScanProgram) -> ChunkHint | None:
        """Of a scheduled program whose chunk is free: a better one for these kernels, None where there is none. A chunk
        that the user gave, or that tuning found, is not asked about.
        """
        ...

    def choices(self, program: ScanProgram) -> Mapping[str, Sequence[int]]:
        """The settings that kernels have and the values worth trying for this program, the default first."""
        ...

    def identity(self, program: ScanProgram, settings: Settings) -> Hashable:
        """Equal for settings that make the same kernels of this program."""
        ...

    def toolchain(self) -> Mapping[str, str]:
        """Names and versions of what makes the kernels fast or slow: what was tuned holds for these."""
        ...


@dataclass(frozen=True)
class Built:
    """One kernel compiled for a target: files by suffix, and its resources; `outside` are the bytes per head that do
    not fit on the chip, without those that every token of a call adds, where the kernel says so.
    """

    resources: Resources
    files: Mapping[str, bytes]
    outside: int | None = None

    def write(self, folder: Path) -> None:
        """The kernel's name with each suffix: source, assembly, machine code, and how to launch it."""
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in self.files.items():
            (folder / f"{self.resources.kernel}{suffix}").write_bytes(content)


class Compiler(Protocol):
    """What a backend has that compiles for GPUs which need not be there."""

    def unbuildable(self, program: ScanProgram, target: str) -> list[str]:
        """Why nothing can be compiled for a target here."""
        ...

    def build(self, program: AdjointProgram, target: str, dtype: torch.dtype) -> Iterator[Built]:
        """The forward and the backward kernel of every scan, for tokens of a dtype."""
        ...


class CompilePool(Protocol):
    """Processes that compile kernels, several at a time; `end` stops them all, and no other begins."""

    def end(self) -> None: ...


class Tunable(Protocol):
    """The kernels of one program, for which settings may be chosen."""

    @property
    def refused(self) -> str:
        """Why its loop is no kernel; empty where it is one."""
        ...

    @property
    def left_out(self) -> Sequence[str]:
        """The scans that are no kernels, each with the reason."""
        ...

    def __len__(self) -> int:
        """How many kernels there are."""
        ...

    def identity(self, settings: Settings) -> Hashable:
        """Equal for settings that make the same kernels."""
        ...

    def compiled(self, settings: Settings, pool: CompilePool, seconds: float) -> Iterator[EstimatedKernel]:
        """One kernel after the other, in at most so many seconds for all. Raises `NotCompiled`, `CompileTimeout`."""
        ...


class Estimator(Protocol):
    """What a backend has whose kernels can be ranked for a GPU without running them."""

    def tunable(
        self, program: AdjointProgram, turns: Mapping[str, int], dtype: torch.dtype, target: str, forward_only: bool
    ) -> Tunable:
        """The kernels of a program for a target; `turns` are how often a call runs each scan that it runs."""
        ...

    def pool(self) -> CompilePool:
        """What compiles them."""
        ...
