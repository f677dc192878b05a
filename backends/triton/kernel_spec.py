"""What a kernel is made of: a scan, whole or a strip of it, the places of its blocks, and the tensors that it is given.

    z, W = scan(W, q, k, v)                        a program for each head, W: [D, E]
    z[i], W[:, i] = scan(W[:, i], q, k, v[i])      a program for each strip of its columns, all in the same memory

    W_at[c] = scan(W, k);  z[c] = scan(W_at[c], q[c], k[c])     a program for each chunk of the outputs

Strips of a free axis (ir/free.py) are programs of their own where there are fewer heads than multiprocessors, and where
the state of a whole head is more than the registers of one program. What a strip has of a tensor it reads and writes
where it lies in the whole one. Only the cotangents of what all strips read are added up: each strip writes its part.
Where heads are few and nothing may be cut, a forward is split (ir/split.py): the chunks of its outputs need not wait.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from math import prod

from tttc.backends.tiling import cut_axis, cut_program
from tttc.ir.expr import TOKENS, Axes, Axis, Expr, postorder
from tttc.ir.names import suffixed
from tttc.ir.program import SEQUENCE, AdjointProgram, Scan, ScanAdjoint, ScanProgram, cotangent, values
from tttc.ir.split import split
from tttc.ir.substitution import PAST

SMALLEST = 16  # of the three sizes of a product on tensor cores
LARGEST_CHUNK = 128  # tokens: a Gram matrix of them is a block
LARGEST_VALUE = 1 << 13  # numbers of a value of all tokens of a chunk, some of which go through shared memory at once
LARGEST_BLOCK = 1 << 20  # numbers of one value, beyond which Triton takes none
LARGEST_STATE = 5 << 13  # numbers, with float32 more than half of what the registers of a multiprocessor hold
# Of what has to be cut anyway: at D=256 strips of four times as many spill several times as much, and take more shared
# memory than a program may have on gfx942.
LARGEST_STRIP = 1 << 13
LEAST_SAVED = 0.25  # of the FLOPs of a chunk, for which it is split; a guess, no GPU was at hand


def block_size(n: int) -> int:
    """The number of places that a block has for n."""
    return max(SMALLEST, 1 << (n - 1).bit_length()) if n > 1 else 1


class Holds(Enum):
    """What a tensor holds of a variable."""

    VALUE = ""
    NEW = "out"
    KEPT = "kept"  # before every chunk, or before some of them
    WORK = "work"  # before every chunk of one group


@dataclass(frozen=True)
class Tensor:
    """A parameter of a kernel: of which variable and what it holds, whether it has a place for each of several chunks,
    and whether every strip writes a part of it, to be added up.
    """

    of: Expr
    holds: Holds = Holds.VALUE
    many: bool = False
    parts: bool = False

    @property
    def name(self) -> str:
        return self.of.name if self.holds is Holds.VALUE else suffixed(self.of.name, self.holds.value)

    @property
    def strides(self) -> list[str]:
        """The parameters that say how far its heads and tokens, and its parts, lie apart; what is dense needs none."""
        if self.many:
            return []
        letters = [*(["b", "h", "t"] if self.of.at else ["b", "h"]), *(["s"] if self.parts else [])]
        return [suffixed(self.name, x) for x in letters]

    @property
    def lying(self) -> list[str]:
        """Of these, how far batch elements, heads and parts lie apart."""
        return [n for n in self.strides if n != suffixed(self.name, "t")]

    @property
    def pointer(self) -> str:
        """The parameter that says where it lies."""
        return suffixed(self.name, "ptr")


@dataclass(frozen=True)
class KernelSpec:
    """A scan as one program of the GPU has it. Of the dim `cut`, whose size stays that of the whole axis, a program has
    `width` entries; without one it has all of a head. With `alone` a program has one chunk, and reads its carry.
    """

    scan: Scan
    program: ScanProgram
    cut: str = ""
    width: int = 0
    alone: bool = False

    @property
    def strips(self) -> int:
        """Programs for each head."""
        return -(-self.program.dims[self.cut] // self.width) if self.cut else 1

    @property
    def chunk(self) -> int:
        chunk = self.scan.chunk if self.scan.loops else 1
        assert chunk is not SEQUENCE  # `unfused` says so
        return chunk

    def size(self, axis: Axis) -> int:
        """How long an axis is, with all strips of it."""
        return self.chunk if axis.size == TOKENS else self.program.dims[axis.size]

    def block(self, axis: Axis) -> int:
        """The places that a block has along an axis."""
        return self.width if self.cut and axis.size == self.cut else block_size(self.size(axis))

    def padded(self, axis: Axis) -> bool:
        """Whether some block has places beyond the end of an axis."""
        if axis.size == TOKENS:
            return self.scan.loops and self.chunk > 1
        return self.size(axis) % self.block(axis) != 0

    @property
    def state(self) -> int:
        """The numbers that a program carries."""
        return sum(prod(map(self.block, p.axes)) for p in self.scan.carry)

    def tensors(self, backward: bool) -> list[Tensor]:
        """The tensors of a kernel, in the order of its parameters."""
        scan = self.scan
        if self.alone:
            found = [Tensor(p, Holds.KEPT, True) for p in scan.carry]
            found += [Tensor(p) for p in (*scan.fixed, *scan.sequence)]
            return found + [Tensor(a.target) for a in scan.outputs]
        if not backward:
            found = [Tensor(p) for p in scan.params]
            found += [Tensor(a.target) for a in scan.outputs]
            found += [Tensor(a.target, Holds.NEW) for a in scan.updates]
            return found + [Tensor(p, Holds.KEPT, True) for p in scan.carry if scan.loops]
        found = [Tensor(p, Holds.KEPT, scan.loops) for p in scan.carry]
        found += [Tensor(p) for p in (*scan.fixed, *scan.sequence)]
        found += [Tensor(cotangent(a.target)) for a in (*scan.outputs, *scan.updates)]
        found += [Tensor(cotangent(p), Holds.NEW, parts=self.shared(p)) for p in scan.params]
        return found + [Tensor(p, Holds.WORK, True) for p in scan.carry if scan.loops]

    def tensor_of(self, backward: bool) -> dict[tuple[str, Holds], Tensor]:
        """The same by the name of the variable and what is held of it."""
        return {(t.of.name, t.holds): t for t in self.tensors(backward)}

    def shared(self, p: Expr) -> bool:
        """Whether all strips of a head read the whole of a variable."""
        return bool(self.cut) and all(a.size != self.cut for a in p.axes)

    def unspecialized(self, backward: bool) -> tuple[list[str], list[str]]:
        """The sizes and the distances that change from call to call and make no kernel faster: without their names
        here, Triton would compile again for every length that is, or is not, a multiple of 16.
        """
        scalars = [t for t in self.tensors(backward) if not any(a.size != TOKENS for a in t.of.axes)]
        sizes = ["T", "every", "groups"] if self.scan.loops else ["H"]
        return sizes, [n for t in scalars for n in t.strides]

    def factors(self, e: Expr) -> tuple[Axes, tuple[Axis, Axis]] | None:
        """Of a contraction that is a product of matrices, large enough for tensor cores: the axes that both share, one
        product for each place along them, and the rows and columns; None for any other.
        """
        if len(e.src) != 2 or len(e.arg) != 1 or not all(e.axis in s.axes for s in e.src):
            return None
        (over,) = e.arg
        shared = tuple(a for a in e.src[0].axes if a in e.src[1].axes and a != over)
        own = [[a for a in s.axes if a not in (over, *shared)] for s in e.src]
        if any(len(x) != 1 for x in own) or len(shared) > 1:
            return None
        if min(self.block(a) for a in (over, *own[0], *own[1])) < SMALLEST:
            return None
        return shared, (own[0][0], own[1][0])

    @property
    def adjoint(self) -> ScanAdjoint:
        """The adjoint of the scan, whose program has come that far."""
        assert isinstance(self.program, AdjointProgram)
        return self.program.adjoint_of(self.scan)

    def largest_value(self) -> int:
        """The numbers of the largest block that its kernels make, forward or backward."""
        blocks = [self.scan.block]
        if isinstance(self.program, AdjointProgram) and self.scan.differentiated:  # not when a chunk is chosen
            blocks += [self.adjoint.forward, self.adjoint.backward]
        largest = 1
        for e in postorder([x for block in blocks for x in values(block)]):
            whole = e.op == "contract" and self.factors(e) is None  # every product is made, and then added up
            axes = {a for x in e.src for a in x.axes} | set(e.axes) if whole else set(e.axes)
            largest = max(largest, prod(map(self.block, axes)))
        return largest

    def too_large(self) -> str:
        """Why a program cannot hold it; "" where it can."""
        scan = self.scan
        if scan.chunk is SEQUENCE:
            return ""
        if (largest := self.largest_value()) > LARGEST_BLOCK:
            return f"one of its values is a block of {largest} numbers, and Triton takes {LARGEST_BLOCK}"
        if not scan.loops:
            return ""
        widest = max((self.block(a) for p in scan.carry for a in p.axes), default=1)
        if block_size(self.chunk) * widest > LARGEST_VALUE:
            return f"the values of {scan.chunk} tokens and {widest} channels are larger than what fits beside the state"
        if self.state > (LARGEST_STRIP if self.cut else LARGEST_STATE):
            return f"its state of {self.state} numbers is larger than the registers of one program"
        return ""


def half_of(scan: Scan, program: ScanProgram) -> KernelSpec | None:
    """The form of a strip that is half of a head, or a power of two near it; None where nothing may be cut."""
    axis = cut_axis(scan, program)
    width = 0 if axis is None else block_size(program.dims[axis.size]) // 2
    if axis is None or width < SMALLEST:
        return None
    program = cut_program(scan, program, axis)
    return KernelSpec(program.scans[0], program, axis.strip, width)


def spec_of(scan: Scan, program: ScanProgram) -> KernelSpec:
    """A whole head where one program can hold it, otherwise the widest strip that fits well, if there is one."""
    whole = KernelSpec(scan, program)
    strip = half_of(scan, program) if whole.too_large() else None
    while strip is not None and strip.too_large():
        strip = replace(strip, width=strip.width // 2) if strip.width > SMALLEST else None
    return whole if strip is None else strip


def split_state_output(spec: KernelSpec) -> tuple[KernelSpec, KernelSpec] | None:
    """The carry of a scan, and its outputs with a program for each chunk; None where the chunks that wait would have
    nearly as much to do as before.
    """
    found = split(spec.scan)
    if found is None or spec.cut or found.saved(spec.program.dims) < LEAST_SAVED:
        return None
    return replace(spec, scan=found.states), replace(spec, scan=found.outputs, alone=True)


def unfused(scan: Scan, program: ScanProgram) -> str:
    """Why a scan is no kernel but a sequence of batched operations; "" where it is one."""
    axes = {a for p in (*scan.params, *scan.results) for a in p.axes}
    if PAST in axes:
        return "its rows come one after the other, each from all before it"
    if not scan.loops and any(a.size == TOKENS for a in axes):
        return "it is elementwise over the tokens of a chunk"
    if scan.chunk is SEQUENCE or scan.chunk > LARGEST_CHUNK:
        return f"its chunk is {'the whole sequence' if scan.chunk is SEQUENCE else f'{scan.chunk} tokens'}"
    if any(
        e.op == "solve" and set(e.src[0].axes) - set(e.arg) for e in postorder([a.value for a in scan.block.assigns])
    ):
        return "its triangular system has further axes"
    return spec_of(scan, program).too_large()
