"""Lines of ONNX text, each written once."""

from __future__ import annotations

from collections.abc import Sequence

from tttc.ir.names import marked, own

Names = dict[str, str]


class GraphText:
    """Lines that give names to nodes. A method that returns a name has added what it stands for."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, name: str, node: str) -> str:
        if not any(line.startswith(f"{name} = ") for line in self.lines):
            self.lines.append(f"{name} = {node}")
        return name

    def value(self, word: str, node: str) -> str:
        return self.add(marked(own(word)), node)

    def integer(self, value: int) -> str:
        word = f"int_{value}" if value >= 0 else f"int_minus_{-value}"
        return self.value(word, f"Constant <value = int64[1] {{{value}}}> ()")

    def number(self, value: float) -> str:
        return self.value(
            f"float_{str(value).replace('.', '_').replace('-', 'minus_')}", f"Constant <value = float {{{value}}}> ()"
        )

    def reshaped(self, name: str, x: str, shape: Sequence[str]) -> str:
        """A tensor in another shape; a length of zero is one."""
        sizes = self.shape(shape)
        return self.add(name, f"Reshape <allowzero = 1> ({x}, {sizes})")

    def shape(self, sizes: Sequence[str]) -> str:
        """Several lengths, put together once."""
        node = f"Concat <axis = 0> ({', '.join(sizes)})"
        known = (line.partition(" = ") for line in self.lines)
        made = next((name for name, _, made_by in known if made_by == node), None)
        return made or self.value(f"shape_{len(self.lines)}", node)

    def sizes(self, dims: Sequence[int]) -> list[str]:
        return [self.integer(d) for d in dims]

    def part(self, sequences: Names, word: str, begin: str, end: str) -> Names:
        """The tokens of all sequences from one to another."""
        first = self.integer(1)
        return {n: self.add(suffix(x, word), f"Slice ({x}, {begin}, {end}, {first})") for n, x in sequences.items()}

    def where(self, word: str, condition: str, yes: Names, no: Names) -> Names:
        """Those of `no`, but for what `yes` has while the condition holds."""
        found = {
            n: self.add(suffix(marked(n), word), f"Where ({condition}, {yes[n]}, {x})")
            for n, x in no.items()
            if n in yes
        }
        return no | found


def suffix(name: str, word: str) -> str:
    """A marked name with a further word."""
    return f"{name[:-1]}'{word}{name[-1]}"
