"""A layer as one ONNX graph that goes on where the call before it ended: any number of tokens, from none on, at any
place of a mini-batch. `runtime/sequencing.py` says the same in Python.

    z, present_W, ..., present_position = ttt_linear (q, k, v, lr, ..., past_W, ..., past_position)

A position of -1 begins a sequence: what a rule carries beside the weights then follows from these.
"""

from __future__ import annotations

from collections.abc import Callable

from tttc.backends.onnx.composed import composed_functions, composed_scan
from tttc.backends.onnx.emit import DEFAULT, functions, model_text
from tttc.backends.onnx.loop import block, loop_functions
from tttc.backends.onnx.recurrence import OPERATORS, SCAN_FORM
from tttc.declare.variant import Signature
from tttc.errors import BackendRefusal
from tttc.export.call_text import CallText, Groups
from tttc.export.graph_text import Names, suffix
from tttc.ir.linear_recurrence import linear_recurrence
from tttc.ir.names import marked, own
from tttc.ir.program import EACH, Scan, ScanKind, ScanProgram
from tttc.runtime.sequencing import Sequencing

AUTO = "auto"


class Stream(CallText):
    """The text of the graph, and its ports in their order. `linear` is the domain whose LinearAttention the graph has
    where the rule is one of it, "scan" for a Scan over chunks, "auto" for what is fastest.
    """

    def __init__(self, program: ScanProgram, declared: Signature, sequencing: Sequencing, linear: str = AUTO) -> None:
        super().__init__(program, declared, sequencing)
        self.linear = self._form(linear)
        self.composed = composed_scan(self.program)
        if self.composed is not None:
            self.scans[ScanKind.WHOLE] = self.composed
        self._token = self.scans.get(ScanKind.TOKEN) if self.opens and not self.rows else None

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

    # -- the graph

    def text(self) -> str:
        """The model."""
        self._lengths()
        for p in self.of("token", "gate"):
            self._seen(p)
        values = self._values()
        if self._token is not None:
            self._decoding(self._token, values)
        else:
            run = self._whole if not self.opens else self._in_rows if self.rows else self._in_sums
            self._settled(*run(values, self._sequences()))
        self._returned()
        called = self._whole_functions()
        called += [f for scan in self._scans_called() for f in functions(scan, self.program, self.linear)]
        called += [self._piece()] if self.opens and not self.rows else []
        return model_text(block(self.program.name, self._inputs(), self._results(), self.lines), called, self.linear)

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
        opened = [ScanKind.OPEN, ScanKind.CLOSE, ScanKind.TOKEN] if self.opens and not self.rows else []
        return [self.scans[k] for k in (ScanKind.BEGIN, *opened) if k in self.scans]

    def _whole(self, values: Groups, sequences: Names) -> tuple[str, Groups]:
        """Any number of tokens at once."""
        carried = values["weights"] | values["memory"]
        (z, *_), new = self.called(self.scans[ScanKind.WHOLE], "whole", values["param"] | carried, sequences)
        return z, {g: updated(values[g], new) for g in ("weights", "memory")} | {"position": {"": self.integer(0)}}

    def _decoding(self, token: Scan, values: Groups) -> None:
        """A token alone by the scan of one token, unless it ends a mini-batch and changes more than the weights there;
        all else in sums.
        """
        b = self.plan.mini_batch
        alone = self.value("single", f"Equal ({self.T}, {self.integer(1)})")
        if isinstance(b, int) and self.sequencing.ends_more:
            alone = self.value("alone", f"And ({alone}, {self._goes_on(b)})")
        self._inside()

        def several() -> Names:
            return self._settled(*self._in_sums(values, self._sequences()), "several")

        self.choose("alone", alone, lambda: self._placed(token, values), several)

    def _goes_on(self, b: int) -> str:
        return self.value("goes_on", f"Less ({self.at}, {self.integer(b - 1)})")

    def _placed(self, token: Scan, values: Groups) -> Names:
        """One token, which begins a mini-batch, ends it, or neither: a branch for each, of which none chooses between
        states number by number.
        """
        sequences = {}
        for p in self.of("token", "gate"):
            sizes = [self.N, *self.sizes((*p.window, *p.dims))]
            sequences[p.name] = self.reshaped(suffix(p.input, "one"), self._seen(p), sizes)
        if self.sequencing.counts:
            sequences[EACH.name] = self.value("one", f"Expand ({self.number(1.0)}, {self.N})")
        first = {"start": values["weights"], "summed": self._fresh()}
        b = self.plan.mini_batch

        def one(word: str, before: Groups) -> Callable[[], Names]:
            return lambda: self._settled(*self._one(word, token, values | before, sequences), word)

        def inside() -> Names:
            if not isinstance(b, int) or self.sequencing.ends_more:
                return one("inside", {})()
            return self.choose("last", self._goes_on(b), one("inside", {}), one("last", {}), "later")

        return self.choose("first", self._inside(), inside, one("first", first), "one")

    def _one(self, word: str, token: Scan, values: Groups, sequences: Names) -> tuple[str, Groups]:
        given = values["param"] | values["memory"] | values["start"] | values["summed"]
        _, new = self.called(token, word, given, sequences)
        after = {g: updated(values[g], new) for g in ("weights", "memory", "summed")} | {"start": values["start"]}
        position = self.value(f"after_{word}", f"Add ({self.at}, {self.integer(1)})")
        if word == "last":
            after |= {"start": after["weights"], "summed": self._fresh()}
            position = self.integer(0)
        return new[token.updates[0].leaf.name], after | {"position": {"": position}}

    def _in_sums(self, values: Groups, sequences: Names) -> tuple[str, Groups]:
        """What is left of an open mini-batch, whole ones, and what opens another."""
        b = self.plan.mini_batch
        inside = self._inside()
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
            position = self.value("after_all", f"Add ({self.at}, {self.T})")
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
        position = self.value("after_tail", f"Add ({position}, {self.value('open', f'Sub ({rest}, {whole})')})")
        z = self.value("joined", f"Concat <axis = 1> ({first}, {middle}, {last})")
        return z, now | {"position": {"": position}}

    def _in_rows(self, values: Groups, sequences: Names) -> tuple[str, Groups]:
        """Whole mini-batches; an open one is run again from its first token."""
        inside = self._inside()
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
        position = self.value("after_rows", f"Sub ({total}, {whole})")
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


def updated(values: Names, new: Names) -> Names:
    """The same variables, with the values of those that are new."""
    return {n: new.get(n, x) for n, x in values.items()}
