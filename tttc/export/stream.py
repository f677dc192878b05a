"""A layer as one ONNX graph that goes on where the call before it ended: any number of tokens, from none on, at any
place of a mini-batch. `runtime/sequencing.py` says the same in Python.

    z, present_W, ..., present_position = ttt_linear (q, k, v, lr, ..., past_W, ..., past_position)

A position of -1 begins a sequence: what a rule carries beside the weights then follows from these.
"""

from __future__ import annotations

from tttc.backends.onnx.composed import composed_functions, composed_scan
from tttc.backends.onnx.emit import DEFAULT, functions, model_text
from tttc.backends.onnx.loop import block, loop_functions
from tttc.backends.onnx.recurrence import OPERATORS, SCAN_FORM
from tttc.declare.variant import Signature
from tttc.errors import BackendRefusal
from tttc.export.graph_text import GraphText, Names, suffix
from tttc.export.ports import Port, ports_of
from tttc.ir.linear_recurrence import linear_recurrence
from tttc.ir.names import marked, own, prefixed
from tttc.ir.program import EACH, Scan, ScanKind, ScanProgram
from tttc.runtime.flat_call import GIVEN
from tttc.runtime.sequencing import Sequencing

LAST = 2**31 - 1  # as far as a slice can go
AUTO = "auto"
Groups = dict[str, Names]


class Stream(GraphText):
    """The text of the graph, and its ports in their order. `linear` is the domain whose LinearAttention the graph has
    where the rule is one of it, "scan" for a Scan over chunks, "auto" for what is fastest.
    """

    def __init__(self, program: ScanProgram, declared: Signature, sequencing: Sequencing, linear: str = AUTO) -> None:
        super().__init__()
        self.program, self.declared, self.sequencing = program, declared, sequencing
        self.plan = self.sequencing.plan
        self.linear = self._form(linear)
        self.scans: dict[ScanKind, Scan] = {s.kind: s for s in self.program.scans}
        self.composed = composed_scan(self.program)
        if self.composed is not None:
            self.scans[ScanKind.WHOLE] = self.composed
        self.rows = self.sequencing.decode == "rows"
        self.opens = not self.plan.free and self.plan.mini_batch != 1
        self.ports = ports_of(declared, program.dims, sequencing, self.opens, self.rows)

    def _form(self, linear: str) -> str:
        """Raises `BackendRefusal` where an operator is asked for that has no such rule."""
        known = linear_recurrence(self.program) is not None
        if linear == AUTO:
            return DEFAULT if known else SCAN_FORM
        if linear in OPERATORS and not known:
            raise BackendRefusal(
                f"variant `{self.declared.name}` is no rule of {linear}'s LinearAttention, which are the linear and "
                f'the delta rule of one matrix, with decay or without.\n  Take linear="{SCAN_FORM}" or "{AUTO}".'
            )
        return linear

    def of(self, *groups: str) -> list[Port]:
        return [p for p in self.ports if p.group in groups]

    # -- lines

    def called(self, scan: Scan, word: str, values: Names, sequences: Names) -> tuple[list[str], Names]:
        """What a scan stores, and the new values by name."""
        given = [values.get(p.name) or sequences[p.name] for p in scan.params]
        found = [suffix(marked(e.name), word) for e in scan.results]
        self.lines.append(f"{', '.join(found)} = tttc.{scan.name} ({', '.join(given)})")
        stored = len(scan.outputs)
        return found[:stored], {a.leaf.name: x for a, x in zip(scan.updates, found[stored:], strict=True)}

    # -- the graph

    def text(self) -> str:
        """The model."""
        self._lengths()
        sequences = self._sequences()
        values = self._values()
        if self.opens:
            z, after = self._in_rows(values, sequences) if self.rows else self._in_sums(values, sequences)
        else:
            z, after = self._whole(values, sequences)
        self._returned(z, after)
        called = self._whole_functions()
        called += [f for scan in self._scans_called() for f in functions(scan, self.program, self.linear)]
        called += [self._piece()] if self.opens and not self.rows else []
        return model_text(block(self.program.name, self._inputs(), self._results(), self.lines), called, self.linear)

    def _inputs(self) -> list[str]:
        return [p.typed(p.input, "past") for p in self.ports]

    def _results(self) -> list[str]:
        shape = ", ".join(["B, T, H", *map(str, self.sequencing.width)])
        return [f"float[{shape}] {marked(own('z'))}", *(p.typed(p.output, "present") for p in self.carried)]

    @property
    def carried(self) -> list[Port]:
        """What a state is made of."""
        return [p for p in self.ports if p.group not in GIVEN]

    def _whole_functions(self) -> list[str]:
        """The scan of whole mini-batches, where there is one."""
        if self.composed is not None:
            return composed_functions(self.composed, self.program)
        whole = self.scans.get(ScanKind.WHOLE)
        if self.opens and self.rows and whole is not None:
            return loop_functions(whole, self.program, kept=True)
        return [] if whole is None else functions(whole, self.program, self.linear)

    def _scans_called(self) -> list[Scan]:
        """The others."""
        kinds = [ScanKind.BEGIN, *([ScanKind.OPEN, ScanKind.CLOSE] if self.opens and not self.rows else [])]
        return [self.scans[k] for k in kinds if k in self.scans]

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
            x = self._by_heads(p)
            window = p.window
            if window:
                x = self._windows(p, x, window[0])
            found[p.name] = self.reshaped(suffix(p.input, "flat"), x, [self.N, self.T, *self.sizes((*window, *p.dims))])
        if self.sequencing.counts and not self.rows:
            found[EACH.name] = self._ones(self.T)
        return found

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

    def _whole(self, values: Groups, sequences: Names) -> tuple[str, Groups]:
        """Any number of tokens at once."""
        carried = values["weights"] | values["memory"]
        (z, *_), new = self.called(self.scans[ScanKind.WHOLE], "whole", values["param"] | carried, sequences)
        return z, {g: updated(values[g], new) for g in ("weights", "memory")} | {"position": {"": self.integer(0)}}

    def _in_sums(self, values: Groups, sequences: Names) -> tuple[str, Groups]:
        """What is left of an open mini-batch, whole ones, and what opens another."""
        b = self.plan.mini_batch
        inside = self.value("inside", f"Greater ({self.at}, {self.integer(0)})")
        fresh = {p.name: self.number(p.begins) for p in self.of("summed")}
        now = {
            "weights": values["weights"],
            "memory": values["memory"],
            "start": self.where("began", inside, values["start"], values["weights"]),
            "summed": {
                n: self.add(suffix(marked(n), "opened"), f"Where ({inside}, {x}, {fresh[n]})")
                for n, x in values["summed"].items()
            },
        }
        if not isinstance(b, int):  # the whole sequence is one
            z, now, _ = self._run_piece("all", values["param"], now, sequences)
            position = self.value("stands", f"Add ({self.at}, {self.T})")
            return z, now | {"position": {"": position}}
        length, none = self.integer(b), self.integer(0)
        left = self.value("left", f"Mod ({self.value('missing', f'Sub ({length}, {self.at})')}, {length})")
        head = self.value("head", f"Min ({self.T}, {left})")
        first, now, closed = self._run_piece("head", values["param"], now, self.part(sequences, "head", none, head))
        after = self.value("after_head", f"Add ({self.at}, {head})")
        ends = self.value("ends", f"Equal ({after}, {length})")
        now["memory"] = self.where("ended", ends, closed, now["memory"])
        position = self.value("position_after_head", f"Mod ({after}, {length})")
        between = self.value("between", f"Equal ({position}, {none})")
        rest = self.value("rest", f"Sub ({self.T}, {head})")
        whole = self.value("whole", f"Mul ({self.value('batches', f'Div ({rest}, {length})')}, {length})")
        until = self.value("until", f"Add ({head}, {whole})")
        carried = values["param"] | now["weights"] | now["memory"]
        sequence = self.part(sequences, "whole", head, until)
        (middle, *_), new = self.called(self.scans[ScanKind.WHOLE], "whole", carried, sequence)
        now["weights"], now["memory"] = updated(now["weights"], new), updated(now["memory"], new)
        now["start"] = self.where("start", between, now["weights"], now["start"])
        now["summed"] = self.where("fresh", between, fresh, now["summed"])
        last, now, _ = self._run_piece("tail", values["param"], now, self.part(sequences, "tail", until, self.T))
        position = self.value("stands", f"Add ({position}, {self.value('open', f'Sub ({rest}, {whole})')})")
        z = self.value("joined", f"Concat <axis = 1> ({first}, {middle}, {last})")
        return z, now | {"position": {"": position}}

    def _in_rows(self, values: Groups, sequences: Names) -> tuple[str, Groups]:
        """Whole mini-batches; an open one is run again from its first token."""
        inside = self.value("inside", f"Greater ({self.at}, {self.integer(0)})")
        before = self.value("before", f"Shape <start = 2, end = 3> ({self.of('rows')[0].input})")
        total = self.value("total", f"Add ({self.T}, {before})")
        joined = {}
        for p in self.of("rows"):
            flat = self.reshaped(suffix(p.input, "flat"), p.input, [self.N, before, *self.sizes(p.dims)])
            joined[p.name] = self.add(
                suffix(marked(p.name), "joined"), f"Concat <axis = 1> ({flat}, {sequences[p.name]})"
            )
        if self.sequencing.counts:
            joined[EACH.name] = self._ones(total)
        weights = self.where("began", inside, values["start"], values["weights"])
        b, none = self.plan.mini_batch, self.integer(0)
        whole = none
        if isinstance(b, int):
            batches = self.value("batches", f"Div ({total}, {self.integer(b)})")
            whole = self.value("whole", f"Mul ({batches}, {self.integer(b)})")
        carried = values["param"] | weights | values["memory"]
        z, new, kept = self._kept(carried, joined)
        z = self.value("seen", f"Slice ({z}, {before}, {total}, {self.integer(1)})")
        position = self.value("stands", f"Sub ({total}, {whole})")
        after = {"memory": updated(values["memory"], kept), "start": updated(weights, kept)}
        after |= {"weights": updated(weights, new), "rows": self.part(joined, "open", whole, total)}
        return z, after | {"position": {"": position}}

    def _kept(self, values: Names, sequences: Names) -> tuple[str, Names, Names]:
        """Whole mini-batches and an open one: outputs, what is carried after them, and what is before the open one."""
        scan = self.scans[ScanKind.WHOLE]
        z, *found = (suffix(marked(e.name), "all") for e in scan.results)
        names = [a.leaf.name for a in scan.updates]
        kept = [suffix(marked(n), "kept") for n in names]
        given = [values.get(p.name) or sequences[p.name] for p in scan.params]
        self.lines.append(f"{', '.join([z, *found, *kept])} = tttc.{scan.name}_kept ({', '.join(given)})")
        return z, dict(zip(names, found, strict=True)), dict(zip(names, kept, strict=True))

    # -- pieces of a mini-batch

    def _piece_variables(self) -> tuple[list[str], list[str]]:
        """What a piece of a mini-batch is given: variables and params, and sequences."""
        scans = self.scans[ScanKind.OPEN], self.scans[ScanKind.CLOSE]
        names = list(dict.fromkeys(p.name for s in scans for p in s.params))
        sequences = [n for n in names if n in {p.name for p in self.of("token", "gate")} | {EACH.name}]
        return [n for n in names if n not in sequences], sequences

    def _run_piece(self, word: str, params: Names, now: Groups, sequences: Names) -> tuple[str, Groups, Names]:
        """Some tokens of an open mini-batch: what they read, what is carried after them, and what would be if it ended
        there.
        """
        variables, used = self._piece_variables()
        values = params | now["weights"] | now["memory"] | now["summed"] | now["start"]
        given = [values[n] for n in variables] + [now["weights"][p.name] for p in self.of("weights")]
        given += [sequences[n] for n in used]
        opened, closed = self.scans[ScanKind.OPEN], self.scans[ScanKind.CLOSE]
        z = marked(own(f"z_{word}"))
        new = {a.leaf.name: suffix(marked(a.leaf.name), word) for a in opened.updates}
        ended = {a.leaf.name: suffix(marked(a.leaf.name), f"closed_{word}") for a in closed.updates}
        found = [z, *new.values(), *ended.values()]
        self.lines.append(f"{', '.join(found)} = tttc.{self._piece_name} ({', '.join(given)})")
        after = {g: updated(now[g], new) for g in ("memory", "summed")}
        return z, now | after | {"weights": updated(now["weights"], ended)}, ended

    @property
    def _piece_name(self) -> str:
        return f"{self.program.name}_piece"

    def _piece(self) -> str:
        """As a function: nothing happens where there are no tokens."""
        opened, closed = self.scans[ScanKind.OPEN], self.scans[ScanKind.CLOSE]
        variables, sequences = self._piece_variables()
        weights = [p.name for p in self.of("weights")]
        inputs = (
            [marked(n) for n in variables] + [suffix(marked(n), "now") for n in weights] + list(map(marked, sequences))
        )
        results = [marked(own("z")), *(suffix(marked(a.leaf.name), "new") for a in opened.updates)]
        results += [suffix(marked(a.leaf.name), "closed") for a in closed.updates]
        yes, no = ([suffix(x, branch) for x in results] for branch in ("then", "else"))
        made_by = dict(zip([a.leaf.name for a in opened.updates], yes[1:], strict=False))
        first = self._given(opened, {}, {})
        lasts = {p.name: suffix(marked(p.name), "last") for p in closed.params if p.name in sequences and not p.at}
        then = [f"{', '.join([yes[0], *made_by.values()])} = tttc.{opened.name} ({', '.join(first)})"]
        then += [f"{x} = Gather <axis = 1> ({marked(n)}, {marked(own('minus_one'))})" for n, x in lasts.items()]
        ends = yes[1 + len(made_by) :]
        then.append(f"{', '.join(ends)} = tttc.{closed.name} ({', '.join(self._given(closed, made_by, lasts))})")
        unchanged = [marked(a.leaf.name) for a in opened.updates]
        unchanged += [
            suffix(marked(n), "now") if n in weights else marked(n) for n in (a.leaf.name for a in closed.updates)
        ]
        otherwise = [f"{no[0]} = ConstantOfShape ({marked(own('shape'))})"]
        otherwise += [f"{x} = Identity ({y})" for x, y in zip(no[1:], unchanged, strict=True)]
        sizes = ", ".join(map(str, [0, *self.sequencing.width]))
        count = 1 + len(self.sequencing.width)
        lines = [
            f"{marked(own('T'))} = Shape <start = 1, end = 2> ({marked(sequences[0])})",
            f"{marked(own('N'))} = Shape <start = 0, end = 1> ({marked(sequences[0])})",
            f"{marked(own('none'))} = Constant <value = int64[{count}] {{{sizes}}}> ()",
            f"{marked(own('shape'))} = Concat <axis = 0> ({marked(own('N'))}, {marked(own('none'))})",
            f"{marked(own('zero'))} = Constant <value = int64[1] {{0}}> ()",
            f"{marked(own('minus_one'))} = Constant <value = int64 {{-1}}> ()",
            f"{marked(own('any'))} = Greater ({marked(own('T'))}, {marked(own('zero'))})",
            f"{', '.join(results)} = If <then_branch = run () => ({', '.join(yes)}) {{",
            *(f"   {x}" for x in then),
            f"}}, else_branch = skip () => ({', '.join(no)}) {{",
            *(f"   {x}" for x in otherwise),
            f"}}> ({marked(own('any'))})",
        ]
        return block(self._piece_name, inputs, results, lines)

    def _given(self, scan: Scan, new: Names, lasts: Names) -> list[str]:
        return [lasts.get(p.name) or new.get(p.name) or marked(p.name) for p in scan.params]

    # -- results

    def _returned(self, z: str, after: Groups) -> None:
        """What a caller is given: [B, T, H, ...], and the state as it was given."""
        width = self.sizes(self.sequencing.width)
        heads = self.reshaped(marked(own("z_heads")), z, [self.B, self.H, self.T, *width])
        self._returned_output(heads)
        for p in self.carried:
            if p.group == "position":
                self._returned_position(p, after["position"][""])
            elif p.group == "rows":
                self._returned_rows(p, after["rows"][p.name])
            elif p.group != "taps":
                self.reshaped(p.output, after[p.group][p.name], [self.B, self.H, *self.sizes(p.dims)])

    def _returned_output(self, heads: str) -> None:
        turned = [0, 2, 1, *range(3, 3 + len(self.sequencing.width))]
        self.lines.append(f"{marked(own('z'))} = Transpose <perm = {turned}> ({heads})")

    def _returned_position(self, p: Port, position: str) -> None:
        self.lines.append(f"{p.output} = Identity ({position})")

    def _returned_rows(self, p: Port, rows: str) -> None:
        count = self.add(suffix(p.output, "count"), f"Shape <start = 1, end = 2> ({rows})")
        self.reshaped(p.output, rows, [self.B, self.H, count, *self.sizes(p.dims)])


def updated(values: Names, new: Names) -> Names:
    """The same variables, with the values of those that are new."""
    return {n: new.get(n, x) for n, x in values.items()}
