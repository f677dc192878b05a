"""The schedule: which tokens make a chunk, and what is carried from one to the next.

A chunk is one mini-batch where that is short. A longer mini-batch is cut into tiles that carry what it has added so
far, and so is a mini-batch that a call leaves open: scans cover every length and every split of a sequence into calls.

    begin:  W -> M            what a sequence carries beside its weights, from the weights that it begins with
    whole:  W, M -> W, M      a chunk that is one mini-batch, from its first token to its last
    open:   S, M -> S, M      a tile of a mini-batch that began at the weights W and has added S so far
    close:  W, S, M -> W, M   the weights that the mini-batch hands on
    token:  W, S, M -> z, W, S, M   one token alone, as decoding has it: open and close of it at once
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tttc.ir import build as b
from tttc.ir.chunk import DEFAULT_CHUNK, ChunkForm, chunk_substitution, open_form, whole_form
from tttc.ir.expr import TOKENS, Expr, leaf, leaves, substitute
from tttc.ir.primal import last_of_mini_batch, loop_params, token_block
from tttc.ir.program import (
    EACH,
    SEQUENCE,
    T_AXIS,
    Allocate,
    Assign,
    Block,
    DualProgram,
    For,
    Function,
    Plan,
    Scan,
    ScanKind,
    ScanProgram,
    Statement,
    Update,
)
from tttc.ir.reading import NoExactForm, at_chunk
from tttc.ir.simplify import renamed_hints, simplify_assigns
from tttc.ir.substitution import is_row
from tttc.ir.update import (
    COUNT,
    Ending,
    accumulated,
    added_leaf,
    averaged_gates,
    beginning,
    ended,
    memories,
    observed,
    opening,
    openings,
    scale_leaf,
)

LONGEST_CHUNK = 128  # a longer mini-batch is tiled: the Gram matrices of a chunk grow with its square
LONGEST_PLAIN_CHUNK = 2048  # where no token reads another one's gradient, there are none
SUBSTITUTED_CHUNK = 16  # every token reads all rows of its chunk
CHANNEL_CHUNK = 16  # decays of single channels take a product for each pair of tokens and each channel


def schedule(program: DualProgram, chunk: int | None = None) -> ScanProgram:
    """Choose the chunk, and lay the mini-batch out as scans."""
    plan = choose_plan(program, chunk)
    sizes = {**program.dims, TOKENS: plan.chunk if isinstance(plan.chunk, int) else DEFAULT_CHUNK}
    names = dict(program.names)
    layout = _Layout(program, plan, sizes, names)
    scans = []
    if not plan.tiled:
        scans.append(layout.whole())
    if not plan.free and not plan.rows:
        scans += [layout.open(), layout.close()]
    if plan.substitution:
        scans += layout.substitution()
    scans += [s for s in (layout.token(), layout.begin()) if s is not None]
    main = layout.tiled_function(scans) if plan.tiled else layout.whole_function(scans[0])
    functions = (main, *(s.function() for s in scans if s.kind is not ScanKind.WHOLE))
    return ScanProgram.of(program, "schedule", functions=functions, names=names, scans=tuple(scans), plan=plan)


def choose_plan(program: DualProgram, chunk: int | None) -> Plan:
    """The chunk: free where no mini-batch can be observed, otherwise the mini-batch or a tile of it."""
    update = program.update
    b_ = update.mini_batch
    if program.telemetry and isinstance(b_, int):
        chunk = b_  # of each mini-batch, also where its boundaries change nothing else
    found = program.gradients
    if found.sequential and update.read == "end" and b_ != 1:
        raise NoExactForm(
            f'read="end" reads the weights at the mini-batch\'s end, and {found.why}',
            'Set mini_batch = 1, read = "after", or anchor = "mini_batch".',
        )
    if found.sequential and not observed(update) and update.clip is None and chunk != 1 and _substitutable(program):
        why = f"{found.why}, on the rows of the chunk alone"
        return Plan(chunk or SUBSTITUTED_CHUNK, None, why, substitution=True)
    if found.sequential:
        return Plan(1, None if not observed(update) or b_ == 1 else b_, found.why)
    if found.kind in ("constant", "affine") and not observed(update) and (b_ == 1 or not program.telemetry):
        return Plan(chunk or _free_chunk(update), None, f"{found.why}: the chunk is free")
    if program.telemetry:
        return Plan(b_, b_, "telemetry is for each mini-batch: the chunk is the mini-batch")
    if update.steps > 1:
        return Plan(b_, b_, f"{update.steps} steps are taken on each mini-batch: the chunk is the mini-batch", True)
    if update.read == "end":
        why = 'read="end": every token reads the end of its mini-batch, so the chunk is the mini-batch'
        return Plan(b_, b_, why)
    recurs = update.per == "token" and any(r is not None for g in (update.momentum, update.decay) for r in g.values())
    squares = update.read != "start" or found.kind == "affine" or recurs
    longest, tile = (LONGEST_CHUNK, DEFAULT_CHUNK) if squares else (LONGEST_PLAIN_CHUNK, LONGEST_PLAIN_CHUNK)
    if b_ is SEQUENCE:
        return Plan(chunk or tile, SEQUENCE, "the mini-batch is the whole sequence: it is cut into tiles")
    wanted = chunk or (b_ if b_ <= longest else tile)
    if wanted >= b_:
        return Plan(b_, b_, f"{found.why}: the chunk is the mini-batch")
    return Plan(wanted, b_, f"the mini-batch of {b_} tokens is cut into tiles")


def _substitutable(program: DualProgram) -> bool:
    """Whether tokens can read the rows of those before them: a matrix used nonlinearly cannot be read through rows."""
    sizes = {**program.dims, TOKENS: SUBSTITUTED_CHUNK}
    try:
        chunk_substitution(program, sizes)
        whole_form(program, sizes, rows=True)
    except NoExactForm:
        return False
    return True


def _free_chunk(update: Update) -> int:
    rates = [r for g in (update.momentum, update.decay, update.average) for r in g.values() if r is not None]
    return CHANNEL_CHUNK if any(r.axes for r in rates) else DEFAULT_CHUNK


class _Layout:
    """The scans of one program; `names` collects what their values are called."""

    def __init__(self, program: DualProgram, plan: Plan, sizes: Mapping[str, int], names: dict[Expr, str]) -> None:
        self.program, self.plan, self.sizes, self.names = program, plan, sizes, names
        self.update = program.update
        self.memory = tuple(m.variable for m in memories(self.update))

    def whole(self) -> Scan:
        form = whole_form(self.program, self.sizes, rows=self.plan.substitution)
        made = {a.target for a in form.updates}
        carry = (*self.update.states, *(m for m in self.memory if m in made))
        return self._scan(ScanKind.WHOLE, form, carry, "Whole mini-batches.")

    def open(self) -> Scan:
        form = open_form(self.program, self.sizes)
        made = {a.target for a in form.updates}
        carry = tuple(o.variable for o in openings(self.update)) + tuple(m for m in self.memory if m in made)
        doc = "Tiles of one open mini-batch: W are the weights at its start, S what it has added."
        return self._scan(ScanKind.OPEN, form, carry, doc)

    def _scan(self, kind: ScanKind, form: ChunkForm, carry: tuple[Expr, ...], doc: str) -> Scan:
        stores = [form.z, *form.measures]
        assigns, named, _ = simplify_assigns([*stores, *form.updates], renamed_hints(self.program.names, form.moved))
        self.names.update(named)
        stored = assigns[: len(stores)]
        kept = {a.target: a for a in assigns[len(stores) :]}
        updates = tuple(kept[c] for c in carry)
        read = {e.name for e in leaves(a.value for a in assigns)}
        params = (*loop_params(self.program), *self.memory)
        if self.plan.substitution:  # the rows come as sequences, and what made them is not read again
            rows = {e.variable: e for e in leaves(a.value for a in assigns) if is_row(e)}
            params = (*params, *(leaf(found.name, found.role, e.axes[1:]) for found, e in rows.items()))
        params = tuple(p for p in params if p.name in read or p.role in ("token", "gate"))
        sequence = tuple(at_chunk(p, T_AXIS) for p in params if p.role in ("token", "gate"))
        fixed = tuple(p for p in params if p.role not in ("token", "gate") and p not in carry)
        return Scan(self._name(kind), kind, fixed, carry, sequence, stored, updates, self.plan.chunk, doc=doc)

    def _name(self, kind: ScanKind) -> str:
        return self.program.name if kind is ScanKind.WHOLE else f"{self.program.name}_{kind.value}"

    def _once(
        self, kind: ScanKind, fixed: Sequence[Expr], carry: Sequence[Expr], made: Sequence[Assign], doc: str
    ) -> Scan:
        """A scan that is a single block."""
        return Scan(self._name(kind), kind, tuple(fixed), tuple(carry), (), (), tuple(made), 1, loops=False, doc=doc)

    def substitution(self) -> list[Scan]:
        """The coefficients of a chunk, and the loop over its tokens that makes the rows of their gradients."""
        found = chunk_substitution(self.program, self.sizes)
        parts = []
        for assigns in (found.coefficients, (*found.rows, *found.past)):
            done, named, _ = simplify_assigns(assigns, self.program.names)
            self.names.update(named)
            parts.append(done)
        coefficients, loop = parts
        rows, past = loop[: len(found.rows)], loop[len(found.rows) :]
        carry = tuple(a.target for a in past)
        read = {e.name: e for e in leaves(a.value for a in loop)}
        known = {p.name: p for p in (*loop_params(self.program), *self.memory)}
        sequence = tuple(e for e in dict.fromkeys(read.values()) if e.at is not None)
        made = {a.leaf.name for a in coefficients}
        fixed = tuple(p for n, p in known.items() if n in read and read[n].at is None)
        fixed += tuple(e for n, e in read.items() if n in made and e.at is None)
        gates = tuple(dict.fromkeys(e for e in leaves(a.value for a in coefficients)))
        if not any(T_AXIS.size == a.size for e in gates for a in e.axes):
            gates = (*gates, leaf(EACH.name, EACH.role, (T_AXIS,)))
        doc = "The coefficients of a chunk, from its gates."
        first = self._once(ScanKind.COEFFICIENTS, gates, (), coefficients, doc)
        doc = "The rows of the gradients, token by token; `past` are those of the tokens before."
        kind = ScanKind.ROWS
        return [first, Scan(self._name(kind), kind, fixed, carry, sequence, rows, past, 1, doc=doc)]

    def begin(self) -> Scan | None:
        """What a sequence carries beside its weights."""
        if not self.memory:
            return None
        (block,) = beginning(self.update)
        done, named, _ = simplify_assigns(block.assigns, {})
        self.names.update(named)
        doc = "What a sequence carries beside its weights, from the weights that it begins with."
        return self._once(ScanKind.BEGIN, self.update.states, (), done, doc)

    def close(self) -> Scan:
        """The weights that a mini-batch hands on, with tau of the last token that was read."""
        update, ends = self.update, {}
        for w in update.states:
            base, scale = accumulated(update, w), scale_leaf(update, w)
            tau = update.tau.get(w.name)
            ends[w.name] = Ending(base if scale is None else b.mul(scale, base), added_leaf(w), tau)
        means = {g: b.div(s, COUNT) for g, s in averaged_gates(update).items()}
        done, named, _ = simplify_assigns(ended(update, ends, means), {})
        self.names.update(named)
        carry = tuple(a.target for a in done)
        read = {e.name: e for e in leaves(a.value for a in done)}
        given = [*(o.variable for o in openings(update)), *self.memory, *loop_params(self.program)]
        fixed = tuple(p for p in given if p.name in read and p not in carry)
        doc = "The weights that a mini-batch hands on; gates are those of its last token."
        return self._once(ScanKind.CLOSE, fixed, carry, done, doc)

    def token(self) -> Scan | None:
        """One token alone, by the definition. Where mini-batches are observed it is a token of an open one, and of what
        changes at the end of it there are the weights; None where reading has to wait for that end.
        """
        update, program = self.update, self.program
        if self.plan.rows or update.read == "end" or program.telemetry:
            return None
        opened = not self.plan.free and self.plan.mini_batch != 1
        block = token_block(program)
        carried = {a.target: a.value for a in opening(update)}
        if not opened:
            block = _substituted(block, carried)
        after = {a.target: a.value for a in block}
        closing = _substituted(self.close().updates, {v: after[v] for v in carried})
        if opened:
            closing = tuple(a for a in closing if a.target in update.states)
        else:
            block = tuple(a for a in block if a.target not in carried)
        done, named, _ = simplify_assigns([*block, *closing], program.names)
        self.names.update(named)
        read = {e.name for e in leaves(a.value for a in done)}
        made = {a.target for a in done}
        given = [*loop_params(program), *carried, *self.memory]
        carry = tuple(p for p in given if p in made)
        fixed = tuple(p for p in given if p.name in read and p not in made)
        doc = "One token alone."
        return replace(self._once(ScanKind.TOKEN, fixed, carry, done, doc), differentiated=False)

    def _params(self) -> tuple[Expr, ...]:
        return tuple(at_chunk(p, T_AXIS) for p in loop_params(self.program))

    def whole_function(self, scan: Scan) -> Function:
        """The loop over chunks, as one function to be read and run; with a substitution, a chunk is a token."""
        if self.plan.substitution:
            plan = replace(self.plan, chunk=1, substitution=False)
            scan = _Layout(self.program, plan, {**self.sizes, TOKENS: 1}, self.names).whole()
        body: tuple[Statement, ...] = (
            *(Allocate(a.target) for a in scan.outputs),
            *beginning(self.update),
            For("c", SEQUENCE, scan.chunk, (scan.block,)),
        )
        returns = (scan.outputs[0].target, *self.update.states)
        return Function(self.program.name, self._params(), body, returns, scan.doc)

    def tiled_function(self, scans: list[Scan]) -> Function:
        """The nested loops over mini-batches and their tiles, as one function to be read and run."""
        tile, close = scans[:2]
        at_end = {p: last_of_mini_batch(p) for p in close.fixed if p.role == "gate"}
        closing = Block(_substituted(close.updates, at_end))
        inner = For("c", "m", self.plan.chunk, (tile.block,))
        step = self.plan.mini_batch
        assert step is not None
        loop = For("m", SEQUENCE, step, (Block(opening(self.update)), inner, closing))
        allocate = tuple(Allocate(a.target) for a in tile.outputs)
        body: tuple[Statement, ...] = (*allocate, *beginning(self.update), loop)
        return Function(self.program.name, self._params(), body, (tile.outputs[0].target, *self.update.states))


def _substituted(assigns: Sequence[Assign], stand_in: Mapping[Expr, Expr]) -> tuple[Assign, ...]:
    values = substitute([a.value for a in assigns], stand_in)
    return tuple(Assign(a.target, v) for a, v in zip(assigns, values, strict=True))
