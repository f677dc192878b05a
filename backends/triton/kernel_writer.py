"""One kernel of a form as Triton, line by line, and the blocks that it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

from tttc.backends.triton.kernel_spec import Holds, KernelSpec, Tensor
from tttc.backends.triton.line_schedule import list_schedule
from tttc.backends.triton.padding import Padding
from tttc.backends.triton.printer import TritonPrinter, wide
from tttc.ir.adjoint import backward_block
from tttc.ir.differentiate import lower_composites
from tttc.ir.expr import TOKENS, Axis, Expr, leaves, postorder
from tttc.ir.names import function, marked, places_of, spelled, suffixed, unmarked
from tttc.ir.program import Assign, Block, Scan, cotangent
from tttc.ir.text import Namer, Printer, Step, core, is_written_again, steps

Place = tuple[str, str] | None  # which of several chunks, and of how many: ("every", "j")


def forward(spec: KernelSpec) -> list[Assign]:
    """The block of a scan in operations that are no composites."""
    assigns = spec.scan.block.assigns
    values = lower_composites([a.value for a in assigns], leaves(a.value for a in assigns))
    return [Assign(a.target, v) for a, v in zip(assigns, values, strict=True)]


def backward(spec: KernelSpec) -> list[Assign]:
    return backward_block(spec.adjoint)


def rounded(spec: KernelSpec) -> set[str]:
    """The carries that a backward chunk reads as factors of products alone: what is kept of them within a group of
    chunks may have the dtype of these.
    """
    scan, kernel = spec.scan, KernelWriter(spec, True)
    kernel.begin([*scan.fixed, *scan.sequence, *_d_outputs(scan)], scan.carry)
    kernel.body(backward(spec), {cotangent(p).name: Tensor(p) for p in scan.sequence})
    return {p.name for p in scan.carry if p.axes and kernel.found(p) not in kernel.printer.widened}


def _d_outputs(scan: Scan) -> list[Expr]:
    return [cotangent(a.target) for a in scan.outputs]


@dataclass
class KernelWriter:
    """One kernel, written line by line."""

    spec: KernelSpec
    backwards: bool
    lines: list[str] = field(default_factory=list)
    depth: int = 1

    def __post_init__(self) -> None:
        self.scan, self.program, self.chunk = self.spec.scan, self.spec.program, self.spec.chunk
        self.padding = Padding(self.spec.padded)
        self.ragged = self.scan.loops and self.chunk > 1
        dims = dict.fromkeys(a.size for p in (*self.scan.params, *self.scan.results) for a in p.axes)
        inner = [a.size for e in postorder(a.value for a in self.scan.block.assigns) for a in e.axes]
        self.used = [d for d in dict.fromkeys([*dims, *inner]) if d != TOKENS or self.scan.loops]
        self.indices = {d: "t" if d == TOKENS else marked(places_of(d)) for d in (TOKENS, *self.used)}
        self.tensors = self.spec.tensor_of(self.backwards)
        given = [name for name, _ in self.tensors]
        self.taken = {*map(spelled, (*given, *(p.name for p in self.scan.results), *map(places_of, self.used)))}

    def variable(self, p: Expr) -> str:
        """What a variable of the program is called."""
        return marked(p.name)

    def found(self, p: Expr) -> str:
        """What a carry is called as a chunk of the backward finds it."""
        return marked(suffixed(p.name, "found"))

    # -- text

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    @contextmanager
    def indented(self, head: str) -> Iterator[None]:
        """Lines that belong to the one above them."""
        self.line(head)
        self.depth += 1
        yield
        self.depth -= 1

    def wrapped(self, head: str, items: Sequence[str], tail: str) -> None:
        """A comma-separated list, on lines of their own where it is longer than 110 columns."""
        if len(unmarked(head)) + sum(len(unmarked(i)) + 2 for i in items) + 4 * self.depth < 110:
            self.line(head + ", ".join(items) + tail)
            return
        self.line(head)
        current = ""
        for item in items:
            if len(unmarked(current + item)) > 100:
                self.line("    " + current.rstrip())
                current = ""
            current += f"{item}, "
        self.line("    " + current.rstrip())
        self.line(tail)

    def head(self) -> None:
        """The signature, and where the head of this program lies."""
        scan, backward = self.scan, self.backwards
        self.depth = 0
        found = self.spec.tensors(backward)
        parameters = [marked(x) for t in found for x in (t.pointer, *t.strides)]
        sizes = ["H", *(["T", "every", "groups"] if scan.loops else [])]
        self.line("")
        plain, strides = self.spec.unspecialized(backward)
        names = [f'"{n}"' for n in (*plain, *map(marked, strides))]
        self.wrapped("@triton.jit(do_not_specialize=[", names, "])")
        suffix = "_adjoint" if backward else ""
        settings = ["operand: tl.constexpr", "index: tl.constexpr"]
        self.wrapped(f"def {marked(function(scan.name + suffix))}(", [*parameters, *sizes, *settings], "):")
        self.depth = 1
        doc = scan.doc if not backward else "The transpose of the derivative, applied to the cotangents."
        self.line(f'"""{doc}"""')
        self.line("i = tl.program_id(0).to(index)")
        self.line("b, h = i // H, i % H")
        if self.spec.cut:
            self.line(f"strip = tl.program_id(1).to(index)  # of {self.spec.strips}")
        if self.spec.alone:
            self.line("chunk = tl.program_id(2)  # of `groups`")
        for d in self.used:
            first = f"strip * {self.spec.width} + " if d == self.spec.cut else ""
            self.line(f"{self.indices[d]} = {first}tl.arange(0, {self.spec.block(Axis(d, d))})")

    # -- memory

    def offset(self, p: Expr) -> str:
        """Where the entries of a block lie: all but batch and heads, and the tokens, are dense."""
        own = [a for a in p.axes if a.size != TOKENS]
        terms = []
        axes = self.printer.arranged(p.axes)
        for a in axes:
            place = self.printer.place(a, axes)
            if a.size == TOKENS:
                terms.append(place.replace("t", "token", 1) + " * {stride}")
                continue
            stride = prod(self.program.dims[x.size] for x in own[own.index(a) + 1 :])
            terms.append(place if stride == 1 else f"{place} * {stride}")
        return " + ".join(terms)

    def mask(self, p: Expr) -> str:
        conditions = []
        axes = self.printer.arranged(p.axes)
        for a in axes:
            if not self.spec.padded(a):
                continue
            if a.size == TOKENS:
                conditions.append(self.printer.place(a, axes).replace("t", "inside", 1))
            else:
                conditions.append(f"({self.printer.inside(a, axes)})")
        return " & ".join(conditions)

    def pointer(self, t: Tensor, at: Place = None) -> str:
        p = t.of
        offset = self.offset(p).format(stride=marked(suffixed(t.name, "t"))) if p.axes else ""
        if t.many and at is not None:
            size = prod(self.program.dims[a.size] for a in p.axes)
            place = f"(i * {at[0]} + {at[1]})" + (f" * {size}" if size > 1 else "")
        else:
            place = " + ".join(f"{x} * {marked(n)}" for x, n in zip(("b", "h", "strip"), t.lying, strict=False))
        return f"{marked(t.pointer)} + ({place}{f' + {offset}' if offset else ''})"

    def load(self, t: Tensor, name: str, at: Place = None) -> None:
        mask = self.mask(t.of)
        guarded = f", mask={mask}, other=0.0" if mask else ""
        self.line(f"{name} = tl.load({self.pointer(t, at)}{guarded}){'' if name in self.loaded else '.to(tl.float32)'}")

    def store(self, t: Tensor, value: str, at: Place = None) -> None:
        mask = self.mask(t.of)
        self.line(f"tl.store({self.pointer(t, at)}, {value}{f', mask={mask}' if mask else ''})")

    def loads(self, of: Iterable[Expr], holds: Holds = Holds.VALUE, at: Place = None) -> None:
        for p in of:
            self.load(self.tensors[p.name, holds], self.variable(p), at)

    def stores(self, of: Iterable[Expr], holds: Holds, at: Place = None) -> None:
        for p in of:
            self.store(self.tensors[p.name, holds], self.variable(p), at)

    # -- chunks

    def chunk_begins(self, first: str) -> None:
        """The tokens of a chunk, of which the last one may have fewer."""
        self.line(f"first = {first}")
        if self.ragged:
            self.line(f"length = tl.minimum({self.chunk}, T - first)")
            self.line("inside = t < length")
        else:
            self.line("length = 1")
        self.line("token = first + t.to(index)")

    def body(self, assigns: Sequence[Assign], stores: dict[str, Tensor]) -> None:
        """The lines of a block; what is carried is zero beyond its ends."""
        before, self.lines = self.lines, []
        self.printer.widened.clear()
        self._body(assigns, stores)
        body, self.lines = self.lines, before
        for name in self.loaded:
            if name in self.printer.widened:
                self.line(f"{wide(name)} = {name}.to(tl.float32)")
        self.lines += body

    def _body(self, assigns: Sequence[Assign], stores: dict[str, Tensor]) -> None:
        printer, shown = self.printer, Printer(word=marked)
        printer.names.clear()
        targets = {a.leaf: a.target for a in assigns}
        for step in self._lines(assigns):
            name = marked(step.name)
            axes = targets[step.target].axes if step.target else step.value.axes
            text = printer.ordered(step.value, printer.arranged(axes))
            if step.target is not None and step.target.at is None:
                unclean = [a for a in axes if self.spec.padded(a) and a not in self.padding.zero(step.value)]
                text = printer.cut(text, printer.arranged(axes), unclean)
            if text.text == name:
                continue
            if any(e.op in ("contract", "solve") for e in self._own(step.value, printer)):
                self.line(f"# {name} = {shown.ordered(step.value, axes).text}")
            if step.target is not None and step.target.at is not None:
                self.store(stores[step.name], text.text)
                continue  # what is stored is no variable of the kernel
            self.line(f"{name} = {text.text}")
            if step.value.axes == axes and not is_written_again(step.value):
                printer.names[step.value] = shown.names[step.value] = step.name

    def _lines(self, assigns: Sequence[Assign]) -> list[Step]:
        """The lines of the printed program, in an order that asks for few registers."""
        first, again = (
            Namer({*self.taken, *(spelled(a.leaf.name) for a in assigns)}, self.program.names) for _ in range(2)
        )
        return list_schedule(
            steps(Block(tuple(assigns)), first), lambda e: prod(map(self.spec.block, e.axes)), self.passing, again
        )

    def _own(self, value: Expr, printer: TritonPrinter) -> Iterable[Expr]:
        """The operations of a line: those that no line before has."""
        seen, stack = set(), [value]
        while stack:
            e = core(stack.pop())
            if e in seen or e in printer.names:
                continue
            seen.add(e)
            stack += e.src
        return seen

    # -- kernels

    def begin(self, loaded: Sequence[Expr], carry: Sequence[Expr] = ()) -> None:
        """What is loaded in the dtype of its tensor: blocks of tokens, and a carry as a backward chunk finds it."""
        self.loaded = [self.variable(p) for p in loaded if self.scan.loops and len(p.axes) > 1 and p.at]
        self.loaded += [self.found(p) for p in carry if p.axes]
        self.passing = {p.name for p in (*loaded, *carry) if p not in self.scan.fixed}
        self.printer = TritonPrinter(self.spec, self.indices, self.padding, self.loaded)
        self.printer.called = {p.name: self.found(p) for p in carry}

    def forward(self) -> str:
        scan = self.scan
        self.head()
        self.begin([*scan.fixed, *scan.sequence])
        self.loads((*scan.fixed, *(() if self.spec.alone else scan.carry)))
        if self.spec.alone:
            self.chunk_begins(f"chunk * {self.chunk}")
            self.loads(scan.carry, Holds.KEPT, ("groups", "chunk"))
            self.loads(scan.sequence)
        elif scan.loops:
            self.line(f"for chunk in range(0, tl.cdiv(T, {self.chunk})):")
            self.depth += 1
            self.chunk_begins(f"chunk * {self.chunk}")
            if scan.carry:
                with self.indented("if chunk % every == 0 and groups > 0:"):
                    self.stores(scan.carry, Holds.KEPT, ("groups", "chunk // every"))
            self.loads(scan.sequence)
        self.body(forward(self.spec), {a.leaf.name: self.tensors[a.leaf.name, Holds.VALUE] for a in scan.outputs})
        self.depth = 1
        self.stores((a.target for a in scan.updates), Holds.NEW)
        return "\n".join(self.lines) + "\n"

    def backward(self) -> str:
        scan = self.scan
        self.head()
        self.begin([*scan.fixed, *scan.sequence, *_d_outputs(scan)])
        block = backward(self.spec)
        self.loads((*scan.fixed, *(cotangent(a.target) for a in scan.updates)))
        for d in map(cotangent, scan.fixed):
            self.line(f"{self.variable(d)} = {f'tl.zeros({self.printer.shape(d)}, tl.float32)' if d.axes else '0.0'}")
        written = {cotangent(p).name: self.tensors[cotangent(p).name, Holds.NEW] for p in scan.sequence}
        if scan.loops:
            self._sweeps(block, written)
        else:
            self.loads(scan.carry, Holds.KEPT)
            self.body(block, written)
        self.stores(map(cotangent, (*scan.carry, *scan.fixed)), Holds.NEW)
        return "\n".join(self.lines) + "\n"

    def _sweeps(self, block: Sequence[Assign], written: dict[str, Tensor]) -> None:
        scan = self.scan
        with self.indented("for back in range(0, groups):"):
            self.line("group = groups - 1 - back")
            self.line(f"count = tl.minimum(every, tl.cdiv(T, {self.chunk}) - group * every)")
            if scan.carry:
                self._carries_of_group()
            with self.indented("for j_back in range(0, count):"):
                self.line("j = count - 1 - j_back")
                self.chunk_begins(f"(group * every + j) * {self.chunk}")
                self.begin([*scan.fixed, *scan.sequence, *_d_outputs(scan)], scan.carry)
                for p in scan.carry:
                    self.load(self.tensors[p.name, Holds.WORK], self.found(p), ("every", "j"))
                self.loads((*scan.sequence, *_d_outputs(scan)))
                self.body(block, written)
            self.line("tl.debug_barrier()")

    def _carries_of_group(self) -> None:
        """The carry before every chunk of a group, from that before the first."""
        scan = self.scan
        self.loads(scan.carry, Holds.KEPT, ("groups", "group"))
        with self.indented("for j in range(0, count):  # the carry before every chunk of the group"):
            self.stores(scan.carry, Holds.WORK, ("every", "j"))
            self.chunk_begins(f"(group * every + j) * {self.chunk}")
            updates = [a for a in forward(self.spec) if a.leaf.at is None]
            read = {e.name for e in leaves(a.value for a in updates)}
            self.loads(p for p in scan.sequence if p.name in read)
            self.body(updates, {})
        self.line("tl.debug_barrier()  # what one thread has stored, others load")
