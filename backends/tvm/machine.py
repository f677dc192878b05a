"""The processor that kernels are made for: its vectors, and how many of them it holds at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# bytes of a vector register, and how many there are, by the instruction set that has them, the widest first
VECTORS = {"avx512f": (64, 32), "avx2": (32, 16), "asimd": (16, 32), "neon": (16, 32), "sse2": (16, 16)}
HIGHEST = 12  # rows of a tile
BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Config:
    """What may be tuned: how high and wide tiles may be, and how many vectors of a row are held in registers."""

    tile_rows: int = HIGHEST
    tile_vectors: int = 6
    unrolled: int = 8


@dataclass(frozen=True)
class Machine:
    """What a kernel is made for: `lanes` numbers of `dtype` are a vector, `registers` of which are held at once."""

    dtype: str
    lanes: int
    registers: int
    processor: str = ""
    config: Config = Config()

    @property
    def vector(self) -> str:
        return f"{self.dtype}x{self.lanes}"

    def tile(self, rows: int | None, vectors: int) -> tuple[int, int]:
        """Rows and vectors of a tile of accumulators: what leaves the least over, then what loads the least for its
        products. A quarter of the registers is for what is multiplied.
        """
        budget = self.registers * 3 // 4
        candidates = [
            (high, wide)
            for wide in range(1, min(vectors, self.config.tile_vectors) + 1)
            for high in range(1, min(rows or 8, budget // wide, self.config.tile_rows, HIGHEST) + 1)
        ]

        def worth(tile: tuple[int, int]) -> tuple[float, int]:
            high, wide = tile
            busy = vectors / (-(-vectors // wide) * wide)
            busy *= rows / (-(-rows // high) * high) if rows else 1.0
            return busy * high * wide / (high * wide + high + wide), wide

        return max(candidates, key=worth, default=(1, 1))

    def target(self) -> dict[str, Any]:
        """The target of LLVM: this very processor."""
        import tvm

        processor = str(tvm.get_global_func("target.llvm_get_system_cpu")())
        return {"kind": "llvm", "mcpu": processor, "opt-level": 2}  # 3 takes half as long again for the same speed


def host(dtype: str, config: Config | None = None) -> Machine:
    """This machine."""
    flags, name = _processor()
    size, registers = next((v for flag, v in VECTORS.items() if flag in flags), (16, 16))
    return Machine(dtype, size // BYTES[dtype], registers, name, config or Config())


@cache
def _processor() -> tuple[frozenset[str], str]:
    """The instruction sets of this processor, and its name with all of them, as the kernel tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset(), ""
    flags = next((x.partition(":")[2].split() for x in lines if x.lower().startswith(("flags", "features"))), [])
    name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    return frozenset(flags), f"{name} {' '.join(sorted(flags))}"
