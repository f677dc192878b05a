"""A declared program as data: what a process needs to make the kernels of a layer, and nothing that could be run.

    text = written(layer)                          # JSON
    program, declared, settings = read(text)       # `TokenProgram`, `Signature`, the settings of `compile`

It is the program of the stage `declare`, the names and axes of what a call takes, and the settings of the layer. What
needs the functions of the class, its definition and its initial values, is not there. Read again it is the same: the
digest is part of the file, and compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from tttc.backends import registry
from tttc.compiler.driver import SUPPORTED_DTYPES, Settings, compile_program
from tttc.declare.specs import GateSpec, ParamSpec, StateSpec, TokenSpec
from tttc.declare.update_rules import SGD
from tttc.declare.variant import ANCHORS, READS, Absent, Signature
from tttc.errors import DeclarationError, FileRefused
from tttc.export.expression_file import read_nodes, written_nodes
from tttc.export.json_checks import (
    fail,
    flag,
    integer,
    items,
    number,
    one_of,
    optional,
    shown,
    table,
    word,
)
from tttc.ir.expr import Expr, postorder
from tttc.ir.program import SEQUENCE, Assign, Block, EndStage, Function, TokenProgram, Update, blocks, end_leaf, values
from tttc.ir.structure import digest
from tttc.ir.verify import MalformedProgram, verify
from tttc.runtime.layer import Layer

FORMAT, VERSION = "tttc.program", 1
LARGEST_FILE = 16_000_000  # characters
PARTS = ("format", "version", "digest", "name", "title", "dims", "dtype", "telemetry", "nodes", "words", "functions")
KEYS = (*PARTS, "update", "declared", "settings")
RATE_KEYS = ("lr", "tau", "momentum", "decay", "average")
CHOICES = {"read": READS, "per": ("token", "mini_batch"), "anchor": ANCHORS}
FLAGS = ("nesterov", "ema", "decay_first")


class Declaration(NamedTuple):
    """What a file holds."""

    program: TokenProgram
    signature: Signature
    settings: Settings


def compiled(declaration: Declaration) -> Layer:
    """The layer of a declaration that was read, by its own backend, or where that is not here by another.

    Raises:
        BackendRefusal: there is none that runs it.
    """
    program, signature, settings = declaration
    device = torch.device(settings.device)
    here = settings.backend in registry.names() and not registry.named(settings.backend, device).missing()
    chosen = replace(settings, device=device, backend=settings.backend if here else "auto")
    return compile_program(program, signature, chosen)


# -- writing -----------------------------------------------------------------------------------------------------------


def written(layer: Layer) -> str:
    """The declaration of a layer and its settings as JSON; equal for equal layers.

    Raises:
        FileRefused: the declaration says something for which files have no word.
    """
    program = layer.stages.of(TokenProgram)
    try:
        found = json.dumps(_program(program) | _call(layer), separators=(",", ":"), allow_nan=False)
        again = _read(json.loads(found))
    except ValueError as error:
        raise FileRefused(f"variant `{program.title}` is not written to a file: {error}.") from None
    if (again.program.functions, again.program.update) != (program.functions, program.update):
        raise FileRefused(f"variant `{program.title}` is not written to a file: read again it would be another one.")
    return found


def _program(program: TokenProgram) -> dict[str, Any]:
    update, functions = program.update, program.functions
    roots = [e for f in functions for b in blocks(f.body) for e in (*f.params, *f.returns, *values(b))]
    roots += [*update.states, *update.rates, *(e for s in update.at_end for e in _of_stage(s))]
    nodes, places = written_nodes(roots)
    return {
        "format": FORMAT,
        "version": VERSION,
        "digest": digest(program),
        "name": program.name,
        "title": program.title,
        "dims": dict(program.dims),
        "dtype": program.dtype,
        "telemetry": program.telemetry,
        "nodes": nodes,
        "words": [[places[e], said] for e, said in program.names.items() if e in places],
        "functions": {f.name: _function(f, places) for f in functions},
        "update": _update(update, places),
    }


def _of_stage(stage: EndStage) -> Iterable[Expr]:
    return (*stage.values.values(), *stage.begins.values(), *stage.kept.values())


def _function(f: Function, places: Mapping[Expr, int]) -> dict[str, Any]:
    (block,) = blocks(f.body)
    (assign,) = block.assigns
    params = [places[p] for p in f.params]
    return {"params": params, "target": places[assign.target], "value": places[assign.value]}


def _update(update: Update, places: Mapping[Expr, int]) -> dict[str, Any]:
    def mapped(rates: Mapping[str, Expr | None]) -> dict[str, int | None]:
        return {n: None if e is None else places[e] for n, e in rates.items()}

    stages = [
        {"on": s.on, "label": s.label, **{k: mapped(getattr(s, k)) for k in ("values", "begins", "kept")}}
        for s in update.at_end
    ]
    plain = {n: getattr(update, n) for n in (*CHOICES, *FLAGS, "clip", "steps")}
    b = "all" if update.mini_batch is SEQUENCE else update.mini_batch
    states = [places[w] for w in update.states]
    return {"states": states, "mini_batch": b, "at_end": stages, **plain} | {
        r: mapped(getattr(update, r)) for r in RATE_KEYS
    }


def _call(layer: Layer) -> dict[str, Any]:
    """What a call takes, and the settings of the layer; the chunk is the one that it has."""
    declared, settings, chunk = layer.signature, layer.settings, layer.sequencing.plan.chunk
    return {
        "declared": {
            "tokens": {n: [list(s.given), s.window] for n, s in declared.tokens.items()},
            "gates": {n: [s.per, s.axis] for n, s in declared.gates.items()},
            "params": {n: list(s.dims) for n, s in declared.params.items()},
            "states": {n: list(s.dims) for n, s in declared.states.items()},
            **{n: getattr(declared, n) for n in ("mini_batch", "read", "anchor", "steps")},
        },
        "settings": {
            "device": layer.device.type,
            "dtype": str(layer.dtype).removeprefix("torch."),
            "backend": layer.backend,
            "chunk": chunk if isinstance(chunk, int) else None,
            "checkpoint": settings.checkpoint,
            "decode": layer.decode,
        },
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def read(text: str) -> Declaration:
    """What a file holds, found to be whole and a program; nothing of it is run.

    Raises:
        FileRefused: with the reason.
    """
    if len(text) > LARGEST_FILE:
        raise FileRefused(f"the program has {len(text)} characters, more than {LARGEST_FILE}.")
    try:
        return _read(json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant))
    except RecursionError:
        raise FileRefused("the file is no program of a layer: it is nested too deeply.") from None
    except (ValueError, MalformedProgram) as error:
        raise FileRefused(f"the file is no program of a layer: {error}.") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        fail("a name stands twice in an object")
    return found


def _no_constant(text: str) -> Any:
    fail(f"it has the number {text}")


def _read(x: Any) -> Declaration:
    given = table(x, "the file")
    if given.get("format") != FORMAT:
        fail(f"its format is {shown(given.get('format'))}, not {FORMAT}")
    if given.get("version") != VERSION:
        fail(f"its version is {shown(given.get('version'))}, this one reads {VERSION}")
    table(given, "the file", KEYS)
    dims = {word(d, "a dim"): integer(n, f"dim {d}", 1, 2**31) for d, n in table(given["dims"], "dims").items()}
    nodes = read_nodes(given["nodes"])
    _know_sizes(nodes, dims)
    made = _read_program(given, nodes, dims)
    verify(made)
    signature = _signature(given["declared"], given["title"], dims)
    _agree(made, signature)
    if given["digest"] != digest(made):
        fail(f"its digest is {shown(given['digest'])}, that of its program {digest(made)}")
    return Declaration(made, signature, _settings(given["settings"], dims, made))


def _know_sizes(nodes: Iterable[Expr], dims: Mapping[str, int]) -> None:
    axes = {a for e in nodes for a in e.axes} | {e.arg for e in nodes if e.op == "size"}
    unknown = sorted({a.size for a in axes} - set(dims))
    if unknown:
        fail(f"its axes have the sizes {', '.join(unknown)}, which are no dims")


def _read_program(given: Mapping[str, Any], nodes: list[Expr], dims: Mapping[str, int]) -> TokenProgram:
    place = _Places(nodes)
    functions = table(given["functions"], "functions", ("loss", "output"))
    words = {}
    for pair in items(given["words"], "words"):
        e, said = items(pair, "a word", 2)
        words[place(e, "a word")] = word(said, "a word")
    return TokenProgram(
        word(given["name"], "the name"),
        "declare",
        tuple(_read_function(n, functions[n], place) for n in ("loss", "output")),
        dims,
        one_of(given["dtype"], "the dtype", ("f32", "f64")),
        words,
        update=_read_update(given["update"], place),
        title=word(given["title"], "the title"),
        telemetry=flag(given["telemetry"], "telemetry"),
    )


class _Places:
    """The nodes of a file by their place."""

    def __init__(self, nodes: list[Expr]) -> None:
        self.nodes = nodes

    def __call__(self, x: Any, where: str) -> Expr:
        return self.nodes[integer(x, where, 0, len(self.nodes) - 1)]

    def leaf(self, x: Any, where: str, roles: tuple[str, ...]) -> Expr:
        e = self(x, where)
        if e.op != "leaf" or e.role not in roles:
            fail(f"{where} is no {' or '.join(roles)}")
        return e


def _read_function(called: str, x: Any, place: _Places) -> Function:
    given = table(x, called, ("params", "target", "value"))
    params = tuple(
        place.leaf(p, f"a parameter of {called}", ("state", "param", "token", "gate"))
        for p in items(given["params"], called)
    )
    target = place.leaf(given["target"], f"the target of {called}", ("output",))
    block = Block((Assign(target, place(given["value"], f"the value of {called}")),))
    return Function(called, params, (block,), (target,))


def _read_update(x: Any, place: _Places) -> Update:
    given = table(x, "update", ("states", "mini_batch", "at_end", *CHOICES, *FLAGS, "clip", "steps", *RATE_KEYS))
    states = tuple(place.leaf(w, "a state of update", ("state",)) for w in items(given["states"], "update.states"))
    names = [w.name for w in states]
    if not states or len(set(names)) != len(names):
        fail("update has no states, or one twice")

    def rates(role: str) -> dict[str, Expr | None]:
        found = table(given[role], f"update.{role}", None if role != "tau" else names)
        if not set(found) <= set(names):
            fail(f"update.{role} is of {', '.join(map(shown, found))}; the states are {', '.join(names)}")
        return {n: optional(place, e, f"update.{role}") for n, e in found.items()}

    lr = {n: e for n, e in rates("lr").items() if e is not None}
    if len(lr) != len(names):
        fail("update.lr is not there for every state")
    b = given["mini_batch"]
    return Update(
        states,
        lr,
        rates("tau"),
        SEQUENCE if b == "all" else integer(b, "update.mini_batch", 1, 2**31),
        **{n: one_of(given[n], f"update.{n}", known) for n, known in CHOICES.items()},
        **{n: flag(given[n], f"update.{n}") for n in FLAGS},  # type: ignore[arg-type]
        **{n: rates(n) for n in ("momentum", "decay", "average")},  # type: ignore[arg-type]
        clip=optional(number, given["clip"], "update.clip"),
        steps=integer(given["steps"], "update.steps", 1, 1000),
        at_end=tuple(_read_stage(s, {w.name: w for w in states}, place) for s in items(given["at_end"], "at_end")),
    )


def _read_stage(x: Any, states: Mapping[str, Expr], place: _Places) -> EndStage:
    given = table(x, "a stage", ("on", "label", "values", "begins", "kept"))
    label = given["label"]
    if not isinstance(label, str) or len(label) > 200 or not label.isprintable() or not label.isascii():
        fail(f"the label of a stage is {shown(label)}")
    found: dict[str, dict[str, Expr]] = {}
    for part in ("values", "begins", "kept"):
        found[part] = {n: place(e, f"a stage's {part}") for n, e in table(given[part], part).items()}
        if not set(found[part]) <= set(states):
            fail(f"a stage's {part} are of {', '.join(map(shown, found[part]))}, which are no states")
    for n, e in found["values"].items():
        known = {end_leaf(states[n]), *found["kept"].values(), *map(end_leaf, states.values())}
        others = [leaf.name for leaf in postorder([e]) if leaf.op == "leaf" and leaf not in known]
        if others or set(e.axes) != set(states[n].axes):
            fail(f"a stage's value of {n} reads {', '.join(others) or 'other axes'}")
    return EndStage(one_of(given["on"], "a stage's on", ("update", "weights", "view")), **found, label=label)


# -- what is called, and how -------------------------------------------------------------------------------------------


def _signature(x: Any, title: str, dims: Mapping[str, int]) -> Signature:
    given = table(x, "declared", ("tokens", "gates", "params", "states", "mini_batch", "read", "anchor", "steps"))

    def dim(x: Any, where: str) -> str:
        return str(one_of(x, where, tuple(dims)))

    def axes(x: Any, where: str) -> tuple[str, ...]:
        return tuple(dim(d, where) for d in items(x, where))

    def init(*_: Any) -> Any:
        raise DeclarationError(f"variant `{title}` was read from a file, which has no initial values.\n  Pass them.")

    tokens, gates = {}, {}
    for n, spec in table(given["tokens"], "tokens").items():
        own, window = items(spec, f"token {n}", 2)
        tokens[word(n, "a token")] = TokenSpec(axes(own, f"token {n}"), optional(dim, window, f"token {n}"))
    if list(tokens)[:3] != ["q", "k", "v"]:
        fail("its first tokens are not q, k and v")
    for n, spec in table(given["gates"], "gates").items():
        per, along = items(spec, f"gate {n}", 2)
        per = one_of(per, f"gate {n}", ("token", "channel"))
        gates[word(n, "a gate")] = GateSpec(n, per, dim(along, f"gate {n}") if per == "channel" else "D")
    params = {word(n, "a param"): ParamSpec(axes(d, f"param {n}"), init) for n, d in table(given["params"], "").items()}
    states = {word(n, "a state"): StateSpec(axes(d, f"state {n}"), init) for n, d in table(given["states"], "").items()}
    b = given["mini_batch"]
    return Signature(
        type(word(title, "the title"), (Absent,), {}),
        states,
        params,
        gates,
        tokens,
        {},
        "all" if b == "all" else integer(b, "mini_batch", 1, 2**31),
        one_of(given["read"], "read", READS),
        one_of(given["anchor"], "anchor", ANCHORS),
        integer(given["steps"], "steps", 1, 1000),
        SGD(lr=1.0),
    )


def _agree(program: TokenProgram, declared: Signature) -> None:
    """Whether the leaves of a program are what a call is given, with the same axes."""
    known = {
        (role, declared.identity(role, n)): tuple(spec.dims)
        for role, group in declared.by_role.items()
        for n, spec in group.items()
    }
    roots = [e for f in program.functions for e in f.params]
    roots += [
        *program.update.states,
        *program.update.rates,
        *(e for s in program.update.at_end for e in s.values.values()),
    ]
    for e in postorder(roots):
        own = tuple(a.size for a in e.axes)
        if e.op == "leaf" and e.role not in ("end", "memory") and known.get((e.role, e.name)) != own:
            fail(f"its program reads the {e.role} {e.name} [{', '.join(own)}], which is not declared so")
    if {w.name for w in program.update.states} != set(declared.states):
        fail("its program updates other states than are declared")


def _settings(x: Any, dims: Mapping[str, int], program: TokenProgram) -> Settings:
    given = table(x, "settings", ("device", "dtype", "backend", "chunk", "checkpoint", "decode"))
    dtypes = {str(t).removeprefix("torch."): t for t in SUPPORTED_DTYPES}
    dtype = dtypes[one_of(given["dtype"], "settings.dtype", tuple(dtypes))]
    if (dtype == torch.float64) != (program.dtype == "f64"):
        fail(f"its settings are of {given['dtype']}, its program of {program.dtype}")
    checkpoint = given["checkpoint"]
    if checkpoint not in (None, "auto"):
        checkpoint = integer(checkpoint, "settings.checkpoint", 0)
    chunk = optional(integer, given["chunk"], "settings.chunk")
    backend, decode = word(given["backend"], "settings.backend"), one_of(given["decode"], "decode", ("sums", "rows"))
    device = one_of(given["device"], "settings.device", ("cpu", "cuda"))
    return Settings(dims, dtype, device, backend, chunk, checkpoint, None, decode, program.telemetry)
