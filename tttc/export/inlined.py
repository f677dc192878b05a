"""A layer's call as operations of PyTorch and its `scan` operator, for graphs that are to run without tttc.

    x_1 ... x_T, x_T, x_T          the tokens, and the last one again until the last chunk is whole
    W, z_c = step(W, x_c)          chunk by chunk, by the functions that the backend `torch` prints
    z_1 ... z_T                    no token reads one after it, so what the repeated ones do is never seen

`runtime/sequencing.py` says which scans a call runs; here a sequence begins where the call does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch.utils._pytree import register_pytree_node

from tttc.backends import torch as torch_backend
from tttc.backends.interface import EmittedProgram
from tttc.backends.torch.load import load_scans
from tttc.compiler.pipeline import History, Options, advance
from tttc.errors import BackendRefusal
from tttc.export.scan_operator import scan, varying
from tttc.ir.program import EACH, SEQUENCE, Scan, ScanKind, ScanProgram
from tttc.ir.substitution import NOW, PAST, row_name
from tttc.ir.update import openings
from tttc.runtime.arguments import BoundCall
from tttc.runtime.custom_ops import untraced
from tttc.runtime.layer import Layer

Tensors = dict[str, torch.Tensor]
Chunk = Callable[[Tensors, Tensors], tuple[torch.Tensor, Tensors]]
"""Runs one chunk, from the values and the sequences by name: z, and the values that are new."""

ENDS = "ends"  # of a chunk: whether a mini-batch ends with it


class Inliner:
    """Stands for the layers that are called while a module is traced; `chunks` are the lengths at which they step."""

    def __init__(self) -> None:
        self._made: dict[Layer, InlinedLayer] = {}

    def __call__(self, layer: Layer, call: BoundCall) -> tuple[torch.Tensor, StateOfNone]:
        if layer not in self._made:
            self._made[layer] = untraced(lambda: InlinedLayer(layer))
        return self._made[layer].output(call).to(layer.dtype), StateOfNone(layer.signature.name)

    @property
    def layers(self) -> list[Layer]:
        """Those that were called."""
        return list(self._made)

    @property
    def chunks(self) -> list[int]:
        """The lengths at which they step, each once."""
        found = (made.chunk for made in self._made.values())
        return sorted({n for n in found if isinstance(n, int)})


class StateOfNone:
    """What such a call returns for the state: nothing that could be read, returned or given back."""

    def __init__(self, variant: str) -> None:
        self.__dict__["variant"] = variant

    def __getattr__(self, name: str) -> NoReturn:
        raise self.refused()

    def __getitem__(self, name: str) -> NoReturn:
        raise self.refused()

    def refused(self) -> BackendRefusal:
        return _refused(
            self.__dict__["variant"],
            "its state leaves the module, and a program without tttc has none",
            "Return the outputs alone.",
        )


def _flatten(state: StateOfNone) -> NoReturn:
    raise state.refused()


register_pytree_node(StateOfNone, _flatten, lambda *_: None, serialized_type_name="tttc.export.inlined.StateOfNone")


class InlinedLayer:
    """One layer: the scans of its program as functions of PyTorch."""

    def __init__(self, layer: Layer) -> None:
        program = _program(layer)
        self.name, self.dims, self.dtype = layer.signature.name, layer.dims, layer.compute_dtype
        self.plan, self.opened = program.plan, openings(program.update)
        self._scans: dict[ScanKind, Scan] = {s.kind: s for s in program.scans}
        self._counts = any(p.name == EACH.name for s in program.scans for p in s.params)
        self._functions = load_scans(program.source, program)
        if isinstance(self.plan.mini_batch, int) and program.update.read == "end" and self.plan.mini_batch > 1:
            raise _refused(
                self.name,
                f'read="end" reads weights that later tokens of a mini-batch of {self.plan.mini_batch} still change, '
                "and a program without tttc runs the last mini-batch as if it were whole",
                'Set mini_batch = "all", or read = "after".',
            )

    @property
    def chunk(self) -> int | None:
        """Tokens per step; None where all of a call are one."""
        return None if self.plan.chunk is SEQUENCE else int(self.plan.chunk)

    def output(self, call: BoundCall) -> torch.Tensor:
        """z: [B, T, H, E] of sequences that begin with the call."""
        if not call.lent and (call.state.position or call.state.taps or call.state.memory):
            raise _refused(
                self.name,
                "it continues the state of another call, and in a program without tttc sequences begin with the call",
                "Call it without a state, or with the weights alone: dict(state).",
            )
        sequences = {n: self._flat(x) for n, x in call.sequences.items()}
        if self._counts:
            first = next(iter(sequences.values()))
            sequences[EACH.name] = first.new_ones(first.shape[:2])
        values = {n: self._flat(x) for n, x in (call.params | call.state.weights).items()}
        if ScanKind.BEGIN in self._scans:
            values |= self._run(ScanKind.BEGIN, values)[1]
        sizes = [n for n in (call.batch, call.heads) if not isinstance(n, int)]
        z = self._whole(values, sequences) if self.chunk is None else self._chunks(values, sequences, sizes)
        z = z.unflatten(0, (call.batch, call.heads)).transpose(1, 2)
        return z.clone(memory_format=torch.contiguous_format)

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, ...] -> [B H, ...], copied: whether it could be a view is a question that a graph would remember."""
        return x.to(self.dtype).clone(memory_format=torch.contiguous_format).flatten(0, 1)

    def _whole(self, values: Tensors, sequences: Tensors) -> torch.Tensor:
        """All tokens in one step, of a number that no graph takes for that of the example."""
        first = next(iter(sequences.values()))
        places = torch.arange(varying(first.shape[1]), device=first.device)
        z, _ = self._run(ScanKind.WHOLE, values | {n: x.index_select(1, places) for n, x in sequences.items()})
        return z.index_select(1, torch.arange(first.shape[1], device=first.device))

    def _chunks(self, values: Tensors, sequences: Tensors, sizes: list[Any]) -> torch.Tensor:
        """Chunk by chunk, the last one made whole with the last token."""
        first = next(iter(sequences.values()))
        tokens, chunk = first.shape[1], self.chunk
        assert chunk is not None
        count = varying((tokens + chunk - 1) // chunk)
        places = torch.arange(count * chunk, device=first.device).clamp(max=tokens - 1)
        apart = {n: x.index_select(1, places).unflatten(1, (count, chunk)) for n, x in sequences.items()}
        rows = {n: x.transpose(0, 1) for n, x in apart.items()}
        run, carry, fixed = self._form(values)
        if ENDS in fixed:
            every = self.plan.mini_batch // chunk  # type: ignore[operator]
            rows[ENDS] = torch.arange(count, device=first.device) % every == every - 1
            fixed.remove(ENDS)

        def step(before: Any, given: Any, others: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            named = dict(zip(carry, before, strict=True)) | dict(zip(fixed, others, strict=False))
            z, new = run(named, dict(zip(rows, given, strict=True)))
            return [new.get(n, named[n]) for n in carry], [z]

        _, (z,) = scan(step, [values[n] for n in carry], list(rows.values()), [*(values[n] for n in fixed), *sizes])
        return z.transpose(0, 1).flatten(1, 2).index_select(1, torch.arange(tokens, device=first.device))

    def _form(self, values: Tensors) -> tuple[Chunk, list[str], list[str]]:
        """How one chunk is run, what is carried from one to the next, and what stays."""
        whole = self._scans.get(ScanKind.WHOLE)
        if whole is None:
            return self._opened(values)
        carry = [p.name for p in whole.carry]
        run: Chunk = self._substituted if self.plan.substitution else self._main
        return run, carry, [n for n in values if n not in carry]

    def _main(self, values: Tensors, rows: Tensors) -> tuple[torch.Tensor, Tensors]:
        return self._run(ScanKind.WHOLE, values | rows)

    def _opened(self, values: Tensors) -> tuple[Chunk, list[str], list[str]]:
        """Of tiles of a mini-batch: they carry what it has added so far."""
        like = next(iter(values.values()))
        begun = {}
        for o in self.opened:
            begun[o.variable.name] = o.begins
            sizes = [self.dims[a.size] for a in o.variable.axes]
            values[o.variable.name] = like.new_full((like.shape[0], *sizes), o.begins)
        carry = [p.name for p in self._scans[ScanKind.OPEN].carry]
        if self.plan.mini_batch is SEQUENCE:
            return (lambda v, rows: self._run(ScanKind.OPEN, v | rows)), carry, [n for n in values if n not in carry]
        carry = list(dict.fromkeys([*carry, *begun, *(p.name for p in self._scans[ScanKind.CLOSE].carry)]))

        def run(before: Tensors, rows: Tensors) -> tuple[torch.Tensor, Tensors]:
            ends = rows[ENDS]
            z, new = self._run(ScanKind.OPEN, before | rows)
            after = before | new
            last = {n: x[:, -1] for n, x in rows.items() if n != ENDS}
            _, closed = self._run(ScanKind.CLOSE, after | last)
            fresh = {n: torch.full_like(after[n], x) for n, x in begun.items()}
            ended = after | closed | fresh
            return z, {n: torch.where(ends, ended[n], after[n]) for n in carry}

        return run, carry, [*(n for n in values if n not in carry), ENDS]

    def _substituted(self, values: Tensors, rows: Tensors) -> tuple[torch.Tensor, Tensors]:
        """Coefficients, the rows of the gradients token by token, and the chunk from its rows."""
        _, made = self._run(ScanKind.COEFFICIENTS, values | rows)
        like, chunk = next(iter(values.values())), self.chunk
        assert chunk is not None
        loop = self._scans[ScanKind.ROWS]
        lengths = {p.name: [self.dims[a.size] for a in p.axes if a != PAST] for p in loop.carry}
        past = {n: like.new_zeros(like.shape[0], chunk, *sizes) for n, sizes in lengths.items()}
        now = torch.eye(chunk, dtype=like.dtype, device=like.device).expand(like.shape[0], -1, -1)
        given = values | rows | made | past | {NOW.name: now}
        step = self._called(loop, "")
        found, _ = step(*(given[p.name] for p in loop.params), 1, chunk)
        named = {row_name(i): x for i, x in enumerate(found[: len(past)])}
        return self._run(ScanKind.WHOLE, given | named)

    def _run(self, kind: ScanKind, values: Tensors) -> tuple[Any, Tensors]:
        """What one step of a scan stores, if anything, and the new values by name."""
        scan = self._scans[kind]
        found = self._called(scan, "_step")(*(values[p.name] for p in scan.params))
        stored = len(scan.outputs)
        made = dict(zip((a.leaf.name for a in scan.updates), found[stored:], strict=True))
        return (found[0] if stored else None), made

    def _called(self, scan: Scan, suffix: str) -> Callable[..., Any]:
        return self._functions[scan.name].function(suffix)


def _program(layer: Layer) -> EmittedProgram:
    """The program of a layer in operations of PyTorch, its chunk the mini-batch where that is cut into several."""
    derived = [e for e in layer.stages if not isinstance(e.program, ScanProgram)]
    options = Options(layer.dims, layer.stages.program.dtype, layer.settings.chunk, backend=torch_backend)

    def emitted(options: Options) -> EmittedProgram:
        return advance(History(layer.signature, derived), options, "emit").of(EmittedProgram)

    program = emitted(options)
    plan: Any = program.plan
    cut = plan.tiled and isinstance(plan.mini_batch, int) and plan.chunk != 1
    return emitted(replace(options, chunk=plan.mini_batch)) if cut else program


def _refused(variant: str, why: str, remedy: str) -> BackendRefusal:
    return BackendRefusal(f"variant `{variant}`: {why}.\n  {remedy}")
