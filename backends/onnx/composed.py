"""Whole mini-batches that take several scans, as one scan more, whose chunk calls them.

    gradients that come token by token      tttc.drawn_coefficients, tttc.drawn_rows, then the chunk from its rows
    mini-batches of several tiles           tttc.drawn_open, tttc.drawn_close

What is carried, and what is stored, is what the scan of whole mini-batches has elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tttc.backends.onnx.loop import block, chunk_function, loop_function, loop_functions, made, part_of
from tttc.ir.expr import Axis, Expr, leaf
from tttc.ir.names import marked, own
from tttc.ir.program import T_AXIS, Assign, Scan, ScanKind, ScanProgram, Tokens
from tttc.ir.substitution import NOW, PAST, is_row
from tttc.ir.update import memories, openings

SUBSTITUTED = ScanKind.WHOLE, ScanKind.COEFFICIENTS, ScanKind.ROWS
TILED = ScanKind.OPEN, ScanKind.CLOSE
T, N, LAST = (marked(own(word)) for word in ("T", "N", "minus_one"))


def composed_scan(program: ScanProgram) -> Scan | None:
    """The scan; None where the program has one of its own for whole mini-batches."""
    plan, scans = program.plan, by_kind(program)
    if plan.substitution:
        return _scan(program, [scans[k] for k in SUBSTITUTED], plan.chunk)
    if plan.tiled and isinstance(plan.mini_batch, int):
        return _scan(program, [scans[k] for k in TILED], plan.mini_batch)
    return None


def composed_functions(scan: Scan, program: ScanProgram) -> list[str]:
    """Such a scan as `tttc.<name>`, its chunk as `tttc.<name>_chunk`, and what this calls."""
    chunk = _Chunk(scan, program)
    lines = chunk.substituted() if program.plan.substitution else chunk.tiled()
    inputs = [marked(p.name) for p in scan.params]
    function = block(f"{scan.name}_chunk", inputs, [made(e) for e in scan.results], lines)
    return [loop_function(scan, program.dims), function, *_called(program)]


def _called(program: ScanProgram) -> list[str]:
    """The scans that the chunk calls; those of an open mini-batch are there for the calls that leave one."""
    if not program.plan.substitution:
        return []
    scans = by_kind(program)
    called = [f for kind in SUBSTITUTED[1:] for f in loop_functions(scans[kind], program)]
    return [chunk_function(_from_rows(program), scans[ScanKind.WHOLE], program), *called]


def by_kind(program: ScanProgram) -> dict[ScanKind, Scan]:
    return {s.kind: s for s in program.scans}


def _from_rows(program: ScanProgram) -> str:
    return f"{program.name}_from_rows"


def _scan(program: ScanProgram, scans: Sequence[Scan], chunk: Tokens) -> Scan:
    """A scan over what several read of the tokens and params, and carry from mini-batch to mini-batch."""
    given: dict[str, Expr] = {}
    for p in (p for s in scans for p in s.params):
        given.setdefault(p.name, p)
    derived = {a.leaf.name for s in scans for a in s.block.assigns}
    derived |= {o.variable.name for o in openings(program.update)}
    states = program.update.states
    kept = [m.variable for m in memories(program.update) if m.variable.name in derived]
    carry = (*states, *kept)
    inner = derived | {c.name for c in carry} | {NOW.name}
    others = [p for n, p in given.items() if n not in inner and PAST not in p.axes and not is_row(p)]
    tokens = [p for p in others if p.role in ("token", "gate")]
    sequence = tuple(leaf(p.name, p.role, (T_AXIS, *(a for a in p.axes if a != T_AXIS)), "c") for p in tokens)
    fixed = tuple(p for p in others if p not in tokens)
    updates = tuple(Assign(c, c) for c in carry)
    return Scan(program.name, ScanKind.WHOLE, fixed, carry, sequence, scans[0].outputs[:1], updates, chunk)


class _Chunk:
    """The lines of the chunk: other scans, called with what it is given and with what they made."""

    def __init__(self, scan: Scan, program: ScanProgram) -> None:
        self.scan, self.program, self.scans = scan, program, by_kind(program)
        self.values = {p.name: marked(p.name) for p in scan.params}
        q = marked(scan.sequence[0].name)
        self.lines = [f"{T} = Shape <start = 1, end = 2> ({q})", f"{N} = Shape <start = 0, end = 1> ({q})"]

    def substituted(self) -> list[str]:
        """Coefficients, rows one after the other, and the chunk from them."""
        whole, coefficients, rows = (self.scans[k] for k in SUBSTITUTED)
        self._call(coefficients)
        for p in rows.carry:
            self._filled(p, 0.0)
        square, eye, shape = (marked(own(word)) for word in ("square", "eye", "eyes"))
        self.lines += [
            f"{square} = ConstantOfShape ({self._shape(own('square_shape'), [T, T])})",
            f"{eye} = EyeLike <dtype = 1> ({square})",
            f"{marked(NOW.name)} = Expand ({eye}, {self._shape(shape[1:-1], [N, T, T])})",
        ]
        self.values[NOW.name] = marked(NOW.name)
        self._call(rows)
        self._call(whole, _from_rows(self.program))
        return self._returned()

    def tiled(self) -> list[str]:
        """A mini-batch from its first token to its last: opened, and closed with the values of its last token."""
        opened, closed = (self.scans[k] for k in TILED)
        for o in openings(self.program.update):
            self._filled(o.variable, o.begins)
        self._call(opened)
        self.lines.append(f"{LAST} = Constant <value = int64 {{-1}}> ()")
        tokens = {s.name for s in self.scan.sequence}
        for p in closed.params:
            if p.name in tokens and not p.at:
                name = part_of(p, "last")
                self.lines.append(f"{name} = Gather <axis = 1> ({marked(p.name)}, {LAST})")
                self.values[p.name] = name
        self._call(closed)
        return self._returned()

    def _call(self, scan: Scan, function: str | None = None) -> None:
        """A scan, whose results are the values of their variables from here on."""
        found = {a.leaf.name: part_of(a.target, f"of_{scan.kind.value}") for a in scan.block.assigns}
        given = [self.values[p.name] for p in scan.params]
        self.lines.append(f"{', '.join(found.values())} = tttc.{function or scan.name} ({', '.join(given)})")
        self.values |= found

    def _returned(self) -> list[str]:
        results = [f"{made(e)} = Identity ({self.values[e.name]})" for e in self.scan.results]
        return [*self.lines, *results]

    def _filled(self, variable: Expr, value: float) -> None:
        """A variable that begins with a number."""
        name, sizes = part_of(variable, "begins"), [N, *map(self._length, variable.axes)]
        shape = self._shape(f"{variable.name}'shape", sizes)
        self.lines.append(f"{name} = ConstantOfShape <value = float[1] {{{value}}}> ({shape})")
        self.values[variable.name] = name

    def _length(self, axis: Axis) -> str:
        """How long an axis is; one that is no dim runs along the tokens."""
        if axis.size not in self.program.dims:
            return T
        size = self.program.dims[axis.size]
        name, line = marked(own(f"int_{size}")), f"Constant <value = int64[1] {{{size}}}> ()"
        if f"{name} = {line}" not in self.lines:
            self.lines.append(f"{name} = {line}")
        return name

    def _shape(self, name: str, sizes: Iterable[str]) -> str:
        self.lines.append(f"{marked(name)} = Concat <axis = 0> ({', '.join(sizes)})")
        return marked(name)
