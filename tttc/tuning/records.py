"""What was tuned before: how an entry is found for a program, and what `tttc.compile` takes from it.

The key of an entry is the structure of the program, the backend, the device, the dtype, the dims and the versions of
what makes the kernels. It never has T or B in it: a sequence of another length tunes nothing again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tttc.backends.cpu import processor
from tttc.backends.interface import Backend
from tttc.ir.program import LoopProgram
from tttc.ir.structure import structure
from tttc.version import __version__

WORKS = ("training", "forward")  # forward and backward, or the forward alone


@dataclass(frozen=True)
class Key:
    """What an entry holds for: all that makes one choice faster than another, but for the length of a call."""

    structure: str
    backend: str
    device: str
    dtype: str
    dims: Mapping[str, int]
    toolchain: Mapping[str, str]
    work: str = "training"

    def same_program(self, other: Key) -> bool:
        """Whether the two are one program on one kind of device: what was found for one may do for the other."""
        mine, others = self.device.split(":")[0], other.device.split(":")[0]
        return (self.structure, self.backend, mine) == (other.structure, other.backend, others)

    def differences(self, other: Key) -> list[str]:
        """In what the other key is another one, beside the work; what matters most comes first."""
        found = []
        if self.device != other.device:
            found.append(f"tuned on {other.device.partition(':')[2].strip() or other.device}")
        if self.dtype != other.dtype:
            found.append(f"tuned in {other.dtype}")
        if dict(self.dims) != dict(other.dims):
            found.append(f"tuned for {', '.join(f'{d}={n}' for d, n in other.dims.items())}")
        if dict(self.toolchain) != dict(other.toolchain):
            found.append(f"tuned with {', '.join(f'{n} {v}' for n, v in other.toolchain.items())}")
        return found

    def distance(self, other: Key) -> tuple[float, ...]:
        """How far the other key is: the device counts most, then the dtype, the sizes, and the versions."""
        sizes = sum(abs(math.log2(n / other.dims[d])) if d in other.dims else 64.0 for d, n in self.dims.items())
        return (
            float(self.device != other.device),
            float(self.dtype != other.dtype),
            sizes,
            float(dict(self.toolchain) != dict(other.toolchain)),
        )


@dataclass(frozen=True)
class Choice:
    """What is tuned: chunk, distance of checkpoints, and how the backend makes its kernels. None is the default."""

    chunk: int | None = None
    checkpoint: int | None = None
    config: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        said = [f"{n}={v}" for n, v in (("chunk", self.chunk), ("checkpoint", self.checkpoint)) if v is not None]
        return ", ".join([*said, *(f"{n}={v}" for n, v in self.config.items())]) or "the default"


@dataclass(frozen=True)
class Entry:
    """One result of tuning: what was fastest, how fast that is in seconds a call, and what was called."""

    key: Key
    choice: Choice
    seconds: float
    default_seconds: float
    batch: int
    tokens: int
    heads: int
    threads: int
    variant: str
    tuned: str
    """When, as ISO 8601 in UTC."""
    static: bool = False
    """Whether the seconds are an estimate, from what a compiler says of kernels that never ran."""

    @property
    def per_token(self) -> float:
        """Seconds for one token of one head: what entries of one key are compared by."""
        return self.seconds / (self.batch * self.tokens * self.heads)

    @property
    def speedup(self) -> float:
        return self.default_seconds / self.seconds

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Entry:
        """Raises ValueError where it is no entry."""
        try:
            key, choice = Key(**found["key"]), Choice(**found["choice"])
            entry = Entry(**{**found, "key": key, "choice": choice})
            numbers = (entry.seconds, entry.default_seconds, entry.batch, entry.tokens, entry.heads)
            if not all(isinstance(n, (int, float)) and 0 < n < math.inf for n in numbers) or key.work not in WORKS:
                raise ValueError(f"{found!r} is no entry")
            counts = (choice.chunk, choice.checkpoint, *choice.config.values(), *key.dims.values())
            if not all(n is None or (type(n) is int and n > 0) for n in counts):
                raise ValueError(f"{found!r} is no entry")
            texts = (key.structure, key.backend, key.device, key.dtype, entry.tuned, *key.toolchain.values())
            if not all(isinstance(t, str) for t in texts) or not isinstance(entry.static, bool):
                raise ValueError(f"{found!r} is no entry")
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{error!r} in an entry") from error
        return entry


@dataclass(frozen=True)
class Tuning:
    """What a layer took from earlier tuning: `how` is "exact", "nearest", "static" (not measured), "default" or "off";
    as text, why.
    """

    how: str
    why: str
    entry: Entry | None = None

    @property
    def choice(self) -> Choice:
        return Choice() if self.entry is None else self.entry.choice

    def __str__(self) -> str:
        return self.why


OFF = Tuning("off", "nothing was looked up")
UNTUNED = Tuning("default", "default: nothing was tuned for this program; `tttc tune` does it")


def found_for(key: Key, own: Iterable[Entry], shipped: Iterable[Entry] = (), target: str = "") -> Tuning:
    """The entry of this key, whichever work was tuned last; the user's own before one that came with the package.
    Otherwise the nearest one of the same program on this device; then, for a GPU, what was chosen for its architecture
    `target` without one; then the nearest one of another device.
    """
    own, shipped = list(own), list(shipped)
    groups = [[e for e in entries if key.same_program(e.key) and not e.static] for entries in (own, shipped)]
    for group in groups:
        exact = [e for e in group if not key.differences(e.key)]
        if exact:
            entry = max(exact, key=lambda e: e.tuned)
            return Tuning("exact", f"{entry.choice}: tuned for this program on this device{_measured(entry)}", entry)
    alike = [*groups[0], *groups[1]]
    if not any(e.key.device == key.device for e in alike):
        for entries in (own, shipped):
            if found := _static(key, entries, target):
                return found
    if not alike:
        return UNTUNED
    entry = min(alike, key=lambda e: (key.distance(e.key), WORKS.index(e.key.work)))
    differs = "; ".join(key.differences(entry.key))
    return Tuning("nearest", f"{entry.choice}: the nearest entry of the same structure, {differs}", entry)


def _static(key: Key, entries: Iterable[Entry], target: str) -> Tuning | None:
    """What was chosen for an architecture, for this program with these very dims: what fits for some sizes need not for
    others. Only the versions of what makes the kernels may be others.
    """
    wanted = replace(key, device=architecture_name(target), toolchain={})
    found = [e for e in entries if e.static and target and wanted.same_program(e.key)]
    found = [e for e in found if not wanted.differences(replace(e.key, toolchain={}))]
    if not found:
        return None
    entry = max(found, key=lambda e: (not replace(wanted, toolchain=key.toolchain).differences(e.key), e.tuned))
    differs = replace(wanted, toolchain=key.toolchain).differences(entry.key)
    why = f"chosen for {target} without one, from what the compiler says of its kernels, not measured"
    return Tuning("static", "; ".join([f"{entry.choice}: {why}", *differs]), entry)


def _measured(entry: Entry) -> str:
    work = "forward and backward" if entry.key.work == "training" else "forward"
    return f" ({work}, {entry.speedup:.2f} times as fast as the default at T={entry.tokens})"


def key_of(
    program: LoopProgram, name: str, backend: Backend, device: torch.device, dtype: torch.dtype, work: str = "training"
) -> Key:
    """The key of a program of any stage from the primal on."""
    toolchain = {"tttc": __version__, **backend.toolchain()}
    dims = dict(sorted(program.dims.items()))
    return Key(structure(program), name, device_name(device), str(dtype).removeprefix("torch."), dims, toolchain, work)


def device_name(device: torch.device) -> str:
    """The kind of a device and its name: "cpu: Intel(R) Xeon(R) Processor @ 2.50GHz"."""
    if device.type == "cuda" and torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {processor() if device.type == 'cpu' else ''}".rstrip(": ")


def architecture_name(target: str) -> str:
    """The same of a GPU that need not be there: "cuda: sm_90". AMD's GPUs are of that kind in torch, too."""
    return f"cuda: {target}"
