"""What may be tuned about these kernels: the warps of a program, and the stages of its loads."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from tttc.backends.interface import Settings
from tttc.ir.program import Program


@dataclass(frozen=True)
class Config:
    """Warps of 32 threads that run a program, and chunks whose loads are under way at once."""

    num_warps: int = 4
    num_stages: int = 2


def choices(program: Program) -> Mapping[str, Sequence[int]]:
    """The fields of a `Config`, each with its default and other values."""
    default = Config()
    return {"num_warps": (default.num_warps, 8, 2, 1), "num_stages": (default.num_stages, 1, 3)}


def identity(program: Program, settings: Settings) -> Hashable:
    return tuple(sorted({**Config().__dict__, **settings}.items()))


def toolchain() -> dict[str, str]:
    """The compiler; "absent" where there is none."""
    try:
        return {"triton": version("triton")}
    except PackageNotFoundError:
        return {"triton": "absent"}


__all__ = ["Config", "choices", "identity", "toolchain"]
