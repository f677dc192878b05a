"""A call of a layer as a function of an ONNX file, as its operator stands in a graph of PyTorch.

    z, present_W, present_W_start, present_S_W = tttc.ttt_linear (q, k, v, lr, past_W, past_W_start, past_S_W, position)

Tensors are those of `FlatCall`, [B, H, T, ...] and [B, H, ...], with every part of a state among them. What it computes
is what stream.py says.
"""

from __future__ import annotations

from tttc.errors import BackendRefusal
from tttc.export.graph_text import suffix
from tttc.export.ports import Port
from tttc.export.stream import AUTO, Stream
from tttc.ir.names import marked, own
from tttc.ir.program import EACH
from tttc.runtime.flat_call import FlatCall

DOMAIN = "tttc"  # of the functions of a file


class CallGraph(Stream):
    """The text of the function, as the graph of a model: its inputs and outputs are in the order of the operator's."""

    def __init__(self, call: FlatCall, linear: str = AUTO) -> None:
        super().__init__(call.program, call.declared, call.sequencing, linear)
        if call.sequencing.measures:
            raise BackendRefusal(
                f"variant `{self.declared.name}` is compiled with telemetry, which no ONNX graph has.\n"
                "  Compile it with telemetry=False."
            )
        self.ports = tuple(p for p in self.ports if p.group != "taps")
        self.extra = [t for t in call.carried if t.name == EACH.name]
        """Tokens that are counted: all ones, which nothing reads."""

    # -- in

    def _inputs(self) -> list[str]:
        found = [_typed(_room(p) if p.group == "rows" else p.input, p) for p in self.ports]
        position = found.pop()
        return [*found, *(f"float[B, H, R] {marked(own('ones'))}" for _ in self.extra), position]

    def _lengths(self) -> None:
        q = marked(self.declared.identity("token", "q"))
        for word, i in (("B", 0), ("H", 1), ("T", 2)):
            self.value(word, f"Shape <start = {i}, end = {i + 1}> ({q})")
        self.value("N", f"Mul ({self.B}, {self.H})")
        (position,) = self.of("position")
        self.add(position.input, f"Reshape ({_number(position)}, {self.integer(1)})")
        self.value("at", f"Max ({position.input}, {self.integer(0)})")
        for p in self.of("rows"):
            self.add(p.input, f"Slice ({_room(p)}, {self.integer(0)}, {self.at}, {self.integer(2)})")

    def _by_heads(self, p: Port) -> str:
        return p.input

    def _windows(self, p: Port, x: str, length: int) -> str:
        return x

    def _of_each(self, p: Port) -> str:
        return p.input

    # -- out

    def _results(self) -> list[str]:
        shape = ", ".join(["B, H, T", *map(str, self.sequencing.width)])
        found = [_typed(p.output, p) for p in self.carried if p.group != "position"]
        ones = [f"float[B, H, R] {marked(own('ones_after'))}" for _ in self.extra]
        return [f"float[{shape}] {marked(own('z'))}", *found, *ones]

    def _returned(self) -> None:
        """z as it is, and no position: a graph of PyTorch has a formula for it."""
        self.lines.append(f"{marked(own('z'))} = Identity ({self.heads})")
        b = self.plan.mini_batch
        for _ in self.extra:
            length = self.integer(b) if isinstance(b, int) else self.stands
            shape = self.value("ones_shape", f"Concat <axis = 0> ({self.B}, {self.H}, {length})")
            self.value("ones_after", f"Expand ({self.number(1.0)}, {shape})")

    def _returned_rows(self, p: Port, rows: str) -> None:
        """With room for those that a mini-batch lacks."""
        b = self.plan.mini_batch
        if not isinstance(b, int):
            return super()._returned_rows(p, rows)
        sizes = self.sizes(p.dims)
        count = self.add(suffix(p.output, "count"), f"Shape <start = 1, end = 2> ({rows})")
        kept = self.reshaped(suffix(p.output, "kept"), rows, [self.B, self.H, count, *sizes])
        lacking = self.add(suffix(p.output, "lacking"), f"Sub ({self.integer(b)}, {count})")
        shape = ", ".join([self.B, self.H, lacking, *sizes])
        empty = self.add(suffix(p.output, "empty_shape"), f"Concat <axis = 0> ({shape})")
        room = self.add(suffix(p.output, "room"), f"ConstantOfShape ({empty})")
        self.add(p.output, f"Concat <axis = 2> ({kept}, {room})")


def _room(p: Port) -> str:
    """The tokens of an open mini-batch with room for all that it may have."""
    return suffix(p.input, "room")


def _number(p: Port) -> str:
    """The position as a number, not as a tensor of one."""
    return suffix(p.input, "number")


def _typed(name: str, p: Port) -> str:
    if p.group == "position":
        return f"int64 {_number(p)}"
    tokens = {"token": ", T", "gate": ", T", "rows": ", R"}.get(p.group, "")
    dims = "".join(f", {n}" for n in (*(p.window if p.group == "token" else ()), *p.dims))
    return f"float[B, H{tokens}{dims}] {name}"
