"""What goes into the graph of a layer and comes out of it: tokens, gates, params, and all that a state carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tttc.declare.variant import Signature
from tttc.ir.names import marked, own, prefixed, suffixed
from tttc.runtime.sequencing import Sequencing


@dataclass(frozen=True)
class Port:
    """An input of the graph, and for what a state carries also an output: of which group of the call, which variable of
    the program, and its dims after those of batch, tokens and heads.
    """

    group: str  # token, gate, param, weights, start, summed, memory, rows, taps or position
    name: str
    dims: tuple[int, ...]
    begins: float = 0.0
    window: tuple[int, ...] = ()
    """How many tokens a token's window has, where it has one."""

    @property
    def input(self) -> str:
        return marked(self._called("past"))

    @property
    def output(self) -> str:
        return marked(self._called("present"))

    def _called(self, when: str) -> str:
        if self.group in ("token", "gate", "param"):
            return self.name
        held = {"start": "start", "rows": "rows", "taps": "taps"}.get(self.group)
        return prefixed(when, suffixed(self.name, held) if held else self.name)

    def typed(self, name: str, when: str) -> str:
        """The port in ONNX text: batch, tokens and heads first."""
        leading = {"token": "B, T, H", "gate": "B, T, H", "param": "P", "position": "1"}.get(self.group, "B, H")
        leading += f", {when}_rows" if self.group == "rows" else "".join(f", {n}" for n in self.taps)
        kind = "int64" if self.group == "position" else "float"
        return f"{kind}[{', '.join([leading, *map(str, self.dims)])}] {name}"

    @property
    def taps(self) -> list[int]:
        """How many tokens of a window are carried."""
        return [n - 1 for n in self.window] if self.group == "taps" else []


def ports_of(
    declared: Signature, dims: Mapping[str, int], sequencing: Sequencing, opens: bool, rows: bool
) -> tuple[Port, ...]:
    """The ports of a layer, in their order; `opens`: a call may end inside a mini-batch, which is carried as its `rows`
    or as sums.
    """

    def sized(names: Sequence[str]) -> tuple[int, ...]:
        return tuple(dims[d] for d in names)

    found = []
    for n, token in declared.tokens.items():
        window = () if token.window is None else sized([token.window])
        found.append(Port("token", declared.identity("token", n), sized(token.given), window=window))
    found += [Port("gate", declared.identity("gate", n), sized(s.dims)) for n, s in declared.gates.items()]
    sequences = tuple(found)
    found += [Port("param", n, sized(s.dims)) for n, s in declared.params.items()]
    weights = [Port("weights", n, sized(s.dims)) for n, s in declared.states.items()]
    found += weights
    found += [Port("memory", m.name, sized([a.size for a in m.axes])) for m in sequencing.memory]
    if opens:
        found += [Port("start", w.name, w.dims) for w in weights]
    if opens and rows:
        found += [Port("rows", p.name, (*p.window, *p.dims)) for p in sequences]
    elif opens:
        variables = [(o.variable, o.begins) for o in sequencing.opened]
        found += [Port("summed", v.name, sized([a.size for a in v.axes]), begins) for v, begins in variables]
    found += [Port("taps", p.name, p.dims, window=p.window) for p in sequences if p.window]
    return (*found, Port("position", own("position"), ()))
