"""Lines of ONNX text, each written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tttc.ir.names import marked, own

Names = dict[str, str]


class GraphText:
    """Lines that give names to nodes. A method that returns a name has added what it stands for."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._shapes = 0

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
        if made is None:
            self._shapes += 1
            made = self.value(f"shape_{self._shapes}", node)
        return made

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

    def choose(
        self, word: str, condition: str, then: Callable[[], Names], otherwise: Callable[[], Names], inner: str = ""
    ) -> Names:
        """Names for what one of two branches gives; each adds its lines, and returns its own name for each of these.
        A branch that is inside of another gives them names with `inner` in them.
        """
        (taken, found), (skipped, others) = self._branch(then), self._branch(otherwise)
        made = {name: suffix(name, inner) if inner else name for name in found}
        self.lines += [
            f"{', '.join(made.values())} = If <then_branch = {word}_then () => ({', '.join(found.values())}) {{",
            *(f"   {line}" for line in taken),
            f"}}, else_branch = {word}_else () => ({', '.join(others[name] for name in found)}) {{",
            *(f"   {line}" for line in skipped),
            f"}}> ({condition})",
        ]
        return made

    def _branch(self, make: Callable[[], Names]) -> tuple[list[str], Names]:
        """The lines of a branch, and what it gives; constants stay outside."""
        count = len(self.lines)
        found = make()
        lines = self.lines[count:]
        self.lines[count:] = [x for x in lines if _is_constant(x)]
        return [x for x in lines if not _is_constant(x)], found


def _is_constant(line: str) -> bool:
    return " = Constant <" in line


def suffix(name: str, word: str) -> str:
    """A marked name with a further word."""
    return f"{name[:-1]}'{word}{name[-1]}"
