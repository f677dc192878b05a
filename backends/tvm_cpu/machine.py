"""The processor that kernels are made for: its vectors, and how many of them it holds at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tttc.backends.cpu import instruction_sets, processor

# bytes of a vector register, and how many there are, by the instruction set that has them, the widest first
VECTORS = {"avx512f": (64, 32), "avx2": (32, 16), "asimd": (16, 32), "neon": (16, 32), "sse2": (16, 16)}
HIGHEST = 12  # rows of a tile
IN_FLIGHT = 8  # products that two multipliers have begun and not ended
BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class TileConfig:
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
    config: TileConfig = TileConfig()

    @property
    def vector(self) -> str:
        return f"{self.dtype}x{self.lanes}"

    def micro_kernel(self, rows: int | None, vectors: int) -> tuple[int, int]:
        """Rows and vectors of a tile of accumulators: what leaves the least over of those that keep both multipliers
        busy, which need their results after four cycles and get two numbers a cycle; then what loads the least.

        Beside the accumulators there must be a register for each vector of a row, and one for the number that they are
        multiplied by: one register short, and an accumulator goes through memory in every pass.
        """
        candidates = [
            (high, wide)
            for wide in range(1, min(vectors, self.config.tile_vectors) + 1)
            for high in range(1, min(rows or 8, self.config.tile_rows, HIGHEST) + 1)
            if high * wide + wide + 1 <= self.registers
        ]

        def worth(tile: tuple[int, int]) -> tuple[float, float, int]:
            high, wide = tile
            busy = min(1.0, high * wide / max(high + wide, IN_FLIGHT))
            busy *= vectors / (-(-vectors // wide) * wide)
            busy *= rows / (-(-rows // high) * high) if rows else 1.0
            return busy, high * wide / (high + wide), high

        return max(candidates, key=worth, default=(1, 1))

    def target(self) -> dict[str, Any]:
        """The target of LLVM: this very processor."""
        import tvm

        processor = str(tvm.get_global_func("target.llvm_get_system_cpu")())
        return {"kind": "llvm", "mcpu": processor, "opt-level": 2}  # 3 takes half as long again for the same speed


def host(dtype: str, config: TileConfig | None = None) -> Machine:
    """This machine."""
    flags = instruction_sets()
    size, registers = next((v for flag, v in VECTORS.items() if flag in flags), (16, 16))
    name = f"{processor()} {' '.join(sorted(flags))}"
    return Machine(dtype, size // BYTES[dtype], registers, name, config or TileConfig())
