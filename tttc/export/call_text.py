"""What the graph of a layer is given and what it gives: tensors of its ports, which the scans have as [N, ...], N the
batch elements times the heads.
"""

from __future__ import annotations

from tttc.declare.variant import Signature
from tttc.export.graph_text import GraphText, Names, suffix
from tttc.export.ports import Port, ports_of
from tttc.ir.names import marked, own, prefixed
from tttc.ir.program import EACH, Scan, ScanKind, ScanProgram
from tttc.runtime.flat_call import GIVEN
from tttc.runtime.sequencing import Sequencing

LAST = 2**31 - 1  # as far as a slice can go
Groups = dict[str, Names]


class CallText(GraphText):
    """The lines around the scans of a call, and its ports in their order."""

    def __init__(self, program: ScanProgram, declared: Signature, sequencing: Sequencing) -> None:
        super().__init__()
        self.program, self.declared, self.sequencing = program, declared, sequencing
        self.plan = self.sequencing.plan
        self.scans: dict[ScanKind, Scan] = {s.kind: s for s in self.program.scans}
        self.rows = self.sequencing.decode == "rows"
        self.opens = not self.plan.free and self.plan.mini_batch != 1
        self.ports = ports_of(declared, program.dims, sequencing, self.opens, self.rows)

    def of(self, *groups: str) -> list[Port]:
        return [p for p in self.ports if p.group in groups]

    def called(self, scan: Scan, word: str, values: Names, sequences: Names) -> tuple[list[str], Names]:
        """What a scan stores, and the new values by name."""
        given = [values.get(p.name) or sequences[p.name] for p in scan.params]
        found = [suffix(marked(e.name), word) for e in scan.results]
        self.lines.append(f"{', '.join(found)} = tttc.{scan.name} ({', '.join(given)})")
        stored = len(scan.outputs)
        return found[:stored], {a.leaf.name: x for a, x in zip(scan.updates, found[stored:], strict=True)}

    # -- in

    def _inputs(self) -> list[str]:
        return [p.typed(p.input, "past") for p in self.ports]

    def _results(self) -> list[str]:
        shape = ", ".join(["B, T, H", *map(str, self.sequencing.width)])
        return [f"float[{shape}] {marked(own('z'))}", *(p.typed(p.output, "present") for p in self.carried)]

    @property
    def carried(self) -> list[Port]:
        """What a state is made of."""
        return [p for p in self.ports if p.group not in GIVEN]

    def _lengths(self) -> None:
        q = marked(self.declared.identity("token", "q"))
        for i, word in enumerate(("B", "T", "H")):
            self.value(word, f"Shape <start = {i}, end = {i + 1}> ({q})")
        self.value("N", f"Mul ({self.B}, {self.H})")
        self.value("at", f"Max ({marked(prefixed('past', own('position')))}, {self.integer(0)})")

    B, T, H, N = (marked(own(word)) for word in "BTHN")
    at = marked(own("at"))

    def _sequences(self) -> Names:
        """The tokens and gates as [N, T, ...], with their windows."""
        found = {}
        for p in self.of("token", "gate"):
            x = self._seen(p) if p.window else self._by_heads(p)
            sizes = self.sizes((*p.window, *p.dims))
            found[p.name] = self.reshaped(suffix(p.input, "flat"), x, [self.N, self.T, *sizes])
        if self.sequencing.counts and not self.rows:
            found[EACH.name] = self._ones(self.T)
        return found

    def _seen(self, p: Port) -> str:
        """What is read of a token or a gate: itself, as it is given, or the window that it ends, by heads."""
        return self._windows(p, self._by_heads(p), p.window[0]) if p.window else p.input

    def _by_heads(self, p: Port) -> str:
        """[B, T, H, *dims] -> [B, H, T, *dims]."""
        turned = [0, 2, 1, *range(3, 3 + len(p.dims))]
        return self.add(suffix(p.input, "heads"), f"Transpose <perm = {turned}> ({p.input})")

    def _ones(self, tokens: str) -> str:
        return self.value("each", f"Expand ({self.number(1.0)}, {self.shape([self.N, tokens])})")

    def _windows(self, p: Port, x: str, length: int) -> str:
        """The last tokens of each token, [B, H, T, K, ...]; those of the call before come first."""
        taps = next(t for t in self.of("taps") if t.name == p.name)
        axis, after = self.integer(2), self.integer(3)
        joined = self.add(suffix(p.input, "joined"), f"Concat <axis = 2> ({taps.input}, {x})")
        shifted = []
        for i in range(length):
            end = self.add(suffix(p.input, f"end{i}"), f"Add ({self.T}, {self.integer(i)})")
            one = self.add(suffix(p.input, f"shifted{i}"), f"Slice ({joined}, {self.integer(i)}, {end}, {axis})")
            shifted.append(self.add(suffix(p.input, f"row{i}"), f"Unsqueeze ({one}, {after})"))
        self.add(taps.output, f"Slice ({joined}, {self.T}, {self.integer(LAST)}, {axis})")
        return self.add(suffix(p.input, "windows"), f"Concat <axis = 3> ({', '.join(shifted)})")

    def _values(self) -> Groups:
        """Params and what is carried as [N, ...], by groups."""
        found: Groups = {g: {} for g in ("param", "weights", "memory", "start", "summed", "rows")}
        for p in self.of("param"):
            each = self._of_each(p)
            found["param"][p.name] = self.reshaped(suffix(p.input, "flat"), each, [self.N, *self.sizes(p.dims)])
        for p in self.of("weights", "memory", "start", "summed"):
            found[p.group][p.name] = self.reshaped(suffix(p.input, "flat"), p.input, [self.N, *self.sizes(p.dims)])
        if (begin := self.scans.get(ScanKind.BEGIN)) is not None:
            _, begun = self.called(begin, "begun", found["param"] | found["weights"], {})
            begins = self.value("begins", f"Less ({marked(prefixed('past', own('position')))}, {self.integer(0)})")
            found["memory"] = self.where("memory", begins, begun, found["memory"])
        return found

    def _of_each(self, p: Port) -> str:
        """A param [P, *dims] as [B, H, *dims]."""
        wide = self.add(suffix(p.input, "wide"), f"Unsqueeze ({p.input}, {self.integer(0)})")
        spread = self.shape([self.B, self.H, *self.sizes(p.dims)])
        return self.add(suffix(p.input, "each"), f"Expand ({wide}, {spread})")

    def _fresh(self) -> Names:
        """What an open mini-batch carries before its first token."""
        found = {}
        for p in self.of("summed"):
            shape = self.shape([self.N, *self.sizes(p.dims)])
            found[p.name] = self.add(suffix(p.input, "fresh"), f"Expand ({self.number(p.begins)}, {shape})")
        return found

    def _inside(self) -> str:
        return self.value("inside", f"Greater ({self.at}, {self.integer(0)})")

    # -- out

    def _settled(self, z: str, after: Groups, word: str = "") -> Names:
        """z as [B, H, T, ...] and the state as it was given, by the names that they have after a branch, which are
        theirs with a further word in it.
        """
        made: Names = {}

        def named(name: str) -> str:
            made[name] = suffix(name, word) if word else name
            return made[name]

        width = self.sizes(self.sequencing.width)
        self.reshaped(named(self.heads), z, [self.B, self.H, self.T, *width])
        for p in self.carried:
            if p.group == "position":
                self.add(named(self.stands), f"Identity ({after['position']['']})")
            elif p.group == "rows":
                self._returned_rows(p, after["rows"][p.name])
            elif p.group != "taps":
                self.reshaped(named(p.output), after[p.group][p.name], [self.B, self.H, *self.sizes(p.dims)])
        return made

    heads, stands = marked(own("z_heads")), marked(own("stands"))

    def _returned(self) -> None:
        """What a caller is given beside what is settled: z as [B, T, H, ...], and where the sequence stands."""
        turned = [0, 2, 1, *range(3, 3 + len(self.sequencing.width))]
        self.lines.append(f"{marked(own('z'))} = Transpose <perm = {turned}> ({self.heads})")
        (position,) = self.of("position")
        self.lines.append(f"{position.output} = Identity ({self.stands})")

    def _returned_rows(self, p: Port, rows: str) -> None:
        count = self.add(suffix(p.output, "count"), f"Shape <start = 1, end = 2> ({rows})")
        self.reshaped(p.output, rows, [self.B, self.H, count, *self.sizes(p.dims)])
