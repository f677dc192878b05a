"""What may be tuned about these kernels: the warps of a program, and the stages of its loads."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod

from tttc.backends.interface import Settings
from tttc.backends.triton.printer import block_size
from tttc.ir.program import Program, Scan

THREADS = 32
STATE = {4: 48, 8: 72}  # numbers of the state that a thread may hold, by the number of warps


@dataclass(frozen=True)
class Config:
    """Warps of 32 threads that run a program, and chunks whose loads are under way at once."""

    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> Mapping[str, int]:
        """As Triton's compiler takes them."""
        return asdict(self)


def default_config(scan: Scan, program: Program, backward: bool) -> Config:
    """As many warps as hold the state in their registers; loads run ahead where these are not full."""
    size = sum(prod(block_size(program.dims[a.size]) for a in p.axes) for p in scan.carry)
    warps = next((n for n, most in STATE.items() if size <= n * THREADS * most), 16)
    return Config(warps, 2 if warps == 4 and not backward else 1)


def choices(program: Program) -> Mapping[str, Sequence[int]]:
    """The fields of a `Config`, each with its default and other values."""
    default = Config()
    return {"num_warps": (default.num_warps, 8, 2, 1), "num_stages": (default.num_stages, 1, 3)}


def identity(program: Program, settings: Settings) -> Hashable:
    return tuple(sorted({**asdict(Config()), **settings}.items()))


def toolchain() -> dict[str, str]:
    """The compiler; "absent" where there is none."""
    try:
        return {"triton": version("triton")}
    except PackageNotFoundError:
        return {"triton": "absent"}


__all__ = ["Config", "choices", "default_config", "identity", "toolchain"]
