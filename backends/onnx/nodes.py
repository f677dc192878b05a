"""The nodes of one graph as text: each once, numbers and sizes among them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tttc.ir.names import marked, own


class Node(NamedTuple):
    """A node, and what it reads."""

    kind: str
    attributes: str
    inputs: tuple[str, ...]


class Nodes:
    """The nodes of a graph. `lines` are its text so far; those of a graph inside of another begin with a `word` of
    their own.
    """

    def __init__(self, word: str = "") -> None:
        self.word = word
        self.lines: list[str] = []
        self.made: dict[Node, str] = {}
        self.nodes: dict[str, Node] = {}
        self.constants: dict[str, str] = {}

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The name of what a node makes; of one that is there already, its name."""
        shown = ", ".join(f"{n} = {_attribute(x)}" for n, x in attributes.items())
        node = Node(kind, shown, inputs)
        if node not in self.made:
            name = self.made[node] = marked(own(f"{self.word}t{len(self.lines)}"))
            self.nodes[name] = node
            self.lines.append(f"{name} = {kind}{f' <{shown}>' if shown else ''} ({', '.join(inputs)})")
        return self.made[node]

    def local(self, word: str) -> str:
        """A name for what is written as a line here, and in no other place."""
        return marked(own(f"{self.word}{word}_{len(self.lines)}"))

    def drop_unused(self) -> None:
        """Leave out the nodes whose values nothing reads."""
        while True:
            text = "\n".join(self.lines)
            unused = {n for n in self.nodes if text.count(n) == 1}
            kept = [line for line in self.lines if line.partition(" = ")[0] not in unused]
            if len(kept) == len(self.lines):
                return
            self.lines = kept

    def number(self, value: float) -> str:
        """A float32 scalar."""
        if math.isfinite(value):
            return self._constant(f"float {{{value:.9g}}}")
        if math.isnan(value):
            return self.node("Sub", self.number(math.inf), self.number(math.inf))
        one = self.number(math.copysign(1.0, value))
        return self.node("Div", one, self.number(0.0))

    def integers(self, *values: int) -> str:
        """An int64 vector."""
        return self._constant(f"int64[{len(values)}] {{{', '.join(map(str, values))}}}")

    def _constant(self, literal: str) -> str:
        if literal not in self.constants:
            name = self.constants[literal] = marked(own(f"{self.word}c{len(self.constants)}"))
            self.lines.append(f"{name} = Constant <value = {literal}> ()")
        return self.constants[literal]


def _attribute(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
