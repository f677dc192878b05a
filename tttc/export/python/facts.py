"""What the text of one layer has to know: its scans, its ports, and what all of them are called."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from tttc.backends.interface import FileKernels
from tttc.backends.registry import file_writers
from tttc.declare.specs import Normal
from tttc.errors import BackendRefusal
from tttc.export.ports import Port, ports_of
from tttc.export.python import glue
from tttc.ir.names import function, marked, spelled, suffixed
from tttc.ir.program import EACH, Scan, ScanKind
from tttc.runtime.layer import Layer

NOT_HELD = ("token", "gate", "param", "position")  # the groups of which a state holds no tensor
HELD = {"start": "start", "rows": "rows", "taps": "taps"}  # groups whose variables are called as others are
LONGEST_TESTED = 64  # tokens of a mini-batch that the test of a file runs as they are
WORDS = {ScanKind.WHOLE: "whole", ScanKind.OPEN: "part", ScanKind.CLOSE: "close", ScanKind.BEGIN: "begin"}


def called(kind: ScanKind) -> str:
    """What the function of a scan is called, in a text that is not yet whole."""
    return marked(function(WORDS[kind]))


class Facts:
    """What the text of one layer has to know."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.program, self.declared = layer, layer.stages.program, layer.signature
        self.sequencing, self.plan = layer.sequencing, layer.sequencing.plan
        if self.plan.substitution:
            raise BackendRefusal(
                f"variant `{self.declared.name}`: its gradients come token by token, which no file does yet.\n"
                '  Set anchor = "mini_batch", with a mini_batch above 1.'
            )
        self.opens = not self.plan.free and self.plan.mini_batch != 1
        self.rows = self.opens and self.sequencing.decode == "rows"
        self.ports = ports_of(layer.signature, layer.dims, layer.sequencing, self.opens, self.rows)
        self.scans: dict[ScanKind, Scan] = {s.kind: s for s in self.program.scans if s.kind in self._kinds}
        self.width = tuple(self.sequencing.width)

        self.mini_batch = self.plan.mini_batch if self.opens and isinstance(self.plan.mini_batch, int) else None
        """How many tokens the constant MINI_BATCH of the file is, where it has one."""

        self.kernels = self._kernels()
        taken = {"F", "State", *vars(glue), *(self.kernels.names if self.kernels else ())}
        self.title = _free(self.declared.name, taken)

    def _kernels(self) -> FileKernels | None:
        """Those of the loops: of chunks that the file calls them with, in its test as well."""
        chunk = self.plan.chunk
        if self.mini_batch == chunk and self.mini_batch > LONGEST_TESTED:
            return None
        kinds = [k for k in (ScanKind.WHOLE, ScanKind.OPEN) if k in self.scans and self.scans[k].chunk == chunk]
        scans = {WORDS[k]: self.scans[k] for k in kinds}
        found = (u.in_files().file_kernels(self.program, scans) for u in file_writers() if u.in_files)
        return next((kernels for kernels in found if kernels), None)

    @property
    def _kinds(self) -> tuple[ScanKind, ...]:
        """The scans that calls of this program run."""
        if not self.opens or self.rows:
            return ScanKind.WHOLE, ScanKind.BEGIN
        pieces = ScanKind.OPEN, ScanKind.CLOSE, ScanKind.BEGIN
        whole = not self.plan.tiled and isinstance(self.plan.mini_batch, int)
        return (ScanKind.WHOLE, *pieces) if whole else pieces

    def of(self, *groups: str) -> list[Port]:
        return [p for p in self.ports if p.group in groups]

    # -- names

    @cached_property
    def sequences(self) -> list[str]:
        """Tokens and gates, in the order of a call."""
        return [p.name for p in self.of("token", "gate")]

    @cached_property
    def read(self) -> list[str]:
        """The sequences that scans read: with ones to count, where they do."""
        return [*self.sequences, *([EACH.name] if self.sequencing.counts else [])]

    @cached_property
    def held(self) -> list[Port]:
        """What a state is made of, beside its position."""
        return [p for p in self.ports if p.group not in NOT_HELD]

    @staticmethod
    def variable(p: Port) -> str:
        """The variable that holds a port, in a text that is not yet whole."""
        return marked(suffixed(p.name, HELD[p.group]) if p.group in HELD else p.name)

    @cached_property
    def fields(self) -> list[str]:
        """The names of what a state holds, in its order."""
        taken = {"position", *dir(tuple)}
        return [
            _free(spelled(suffixed(p.name, HELD[p.group]) if p.group in HELD else p.name), taken) for p in self.held
        ]

    @cached_property
    def attributes(self) -> dict[str, str]:
        """What the module calls its params and the weights that a sequence begins with."""
        taken = {"num_heads", "every", "operators", "begin", *dir(torch.nn.Module())}
        return {p.name: _free(spelled(p.name), taken) for p in self.of("param", "weights")}

    def initial(self, p: Port) -> str | None:
        """Where a parameter of the module begins; None where a function of the user's draws it, which a file does not
        have.
        """
        specs = self.declared.params if p.group == "param" else self.declared.states
        init = specs[p.name].init
        shape = self.shape(p)
        if isinstance(init, Normal):
            return f"{init.std!r} * torch.randn({', '.join(shape)})"
        if callable(init):
            return None
        if init in (0, 1):
            return f"torch.{'ones' if init else 'zeros'}({', '.join(shape)})"
        return f'torch.full({tuple_of(shape)}, float("{float(init)!r}"))'

    @staticmethod
    def shape(p: Port) -> list[str]:
        """Of a parameter of the module."""
        return ["num_heads", *map(str, p.dims)]

    @cached_property
    def drawn(self) -> list[Port]:
        """The parameters that whoever makes the module gives."""
        return [p for p in self.of("param", "weights") if self.initial(p) is None]


def tuple_of(names: Sequence[str]) -> str:
    """(a, b), (a,)"""
    return f"({', '.join(names)}{',' * (len(names) == 1)})"


def _free(word: str, taken: set[str]) -> str:
    """A word that nothing else is called; it is taken then."""
    word = word.lstrip("_") or "x"
    while word in taken:
        word += "_"
    taken.add(word)
    return word
