"""A model with layers of tttc in it as one ONNX graph, its caches in and out.

    _, caches = model(ids[:, :0], None)                          # where sequences begin
    tttc.export.onnx.save_model(model, "model.onnx", (ids, caches))

    logits, present.0.state.W, ..., present.0.position = model (ids, past.0.state.W, ..., past.0.position)

`torch.onnx.export` makes the graph. Each layer is a function of the file (call_graph.py); what that calls are functions
of a domain of its own.
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import GetAttrKey, tree_flatten_with_path, tree_leaves, tree_unflatten

from tttc.backends.onnx.emit import OPSET
from tttc.errors import BackendRefusal, ShapeError
from tttc.export.call_graph import DOMAIN, CallGraph
from tttc.export.runtime import RUNTIME, TOLERANCE, ExportMismatch, package, runtime_session
from tttc.ir.names import spelled
from tttc.runtime.custom_ops import Operator, as_operators, operator_of
from tttc.runtime.state import Cache, State
from tttc.runtime.tensor_file import tensor_file, write
from tttc.verification.comparison import relative_error
from tttc.version import __version__

Named = list[tuple[str, Any]]


class Number(int):
    """A position that is an input of a graph; a plain int would be one of its constants."""


class FlatModel(torch.nn.Module):
    """A model as a function of tensors and positions by name: those of its caches, and all others.

    Attributes: `inputs` and `outputs` (names), `values` (of the inputs, as they were given), `moving` (those that are
    part of a cache).

    Raises `ShapeError` where the model does not return a cache for each that it is given.
    """

    def __init__(self, model: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad(), as_operators():  # what an operator returns has every part of a state
            returned = model(*arguments)
        found, self.tree = tree_flatten_with_path(arguments, is_leaf=_is_cache)
        present = [x for x in tree_leaves(returned, is_leaf=_is_cache) if _is_cache(x)]
        if sum(_is_cache(x) for _, x in found) != len(present):
            raise ShapeError(
                f"the model is given {sum(_is_cache(x) for _, x in found)} caches and returns {len(present)}.\n"
                "  Give it those that a call returned: _, caches = model(ids[:, :0], None)."
            )
        complete = iter(present)
        parameters = list(inspect.signature(model.forward).parameters)
        named = [
            (parameters[getattr(path[0], "idx", 0)], _completed(x, next(complete)) if _is_cache(x) else x)
            for path, x in found
        ]
        self.inputs, self.values, self.moving, self.parts = _flattened(named, "past")
        leaves = tree_leaves(returned, is_leaf=_is_cache)
        self.outputs, *_ = _flattened([("output", x) for x in leaves], "present")

    def forward(self, *values: Any) -> list[Any]:
        rest = iter(values)
        leaves = [tree_unflatten([next(rest) if there else None for there in has], tree) for has, tree in self.parts]
        returned = self.model(*tree_unflatten(leaves, self.tree))
        parts = [_numbered(x) if _is_cache(x) else x for x in tree_leaves(returned, is_leaf=_is_cache)]
        return [x for x in tree_leaves(parts) if x is not None]


def _flattened(named: Named, word: str) -> tuple[list[str], list[Any], list[bool], list[Any]]:
    """Names and values of all tensors and positions, whether each is part of a cache, and the tree of each leaf."""
    names: list[str] = []
    values, moving, parts = [], [], []
    caches = 0
    for own, leaf in named:
        cache = _is_cache(leaf)
        found, tree = tree_flatten_with_path(_numbered(leaf) if cache else leaf)
        first = f"{word}.{caches}" if cache else own if own not in names else f"{own}.{len(names)}"
        there = [(path, x) for path, x in found if x is not None]
        names += [".".join([first, *_words(path)]) for path, _ in there]
        values += [int(x) if isinstance(x, Number) else x.detach() for _, x in there]
        moving += [cache] * len(there)
        parts.append(([x is not None for _, x in found], tree))
        caches += cache
    return names, values, moving, parts


def _is_cache(x: Any) -> bool:
    return isinstance(x, Cache | State)


def _completed(given: Any, model: Any) -> Any:
    """A cache with all parts that one like `model` has; those that it lacks count at no place where it stands."""
    if isinstance(given, Cache):
        return replace(given, state=_completed(given.state, model.state))
    if set(model.memory) - set(given.memory):
        raise ShapeError("a state lacks what its rule carries.\n  Give caches that a call returned.")
    parts: dict[str, Any] = {}
    for group in ("memory", "start", "summed", "rows"):
        own = given.weights | getattr(given, group) if group == "start" else getattr(given, group)
        room = {n: torch.zeros_like(x) for n, x in getattr(model, group).items()}
        for n, x in own.items():
            if n in room:
                room[n] = x if x.shape == room[n].shape else torch.cat([x, room[n][:, :, x.shape[2] :]], 2)
        parts[group] = room
    return replace(given, **parts, telemetry={})


def _numbered(x: Any) -> Any:
    """A cache whose positions are inputs, where they count: that of a state does inside its mini-batch."""
    if isinstance(x, Cache):
        return replace(x, state=_numbered(x.state), position=_number(x.position))
    opens = bool(x.start or x.summed or x.rows)
    return replace(x, position=_number(x.position)) if opens else x


def _number(position: Any) -> Any:
    """In a graph it is a formula, which is no constant."""
    return Number(position) if type(position) is int else position


def _words(path: Any) -> list[str]:
    """What a part of a cache is called: state.W, state.start.W, state.position, taps."""
    keys = [key.name if isinstance(key, GetAttrKey) else spelled(str(key.key)) for key in path]
    return [key for key in keys if key not in ("weights", "summed", "memory")]


# -- the file ----------------------------------------------------------------------------------------------------------


def save_model(model: torch.nn.Module, path: str | Path, arguments: tuple[Any, ...], linear: str = "auto") -> Path:
    """Write a model with layers of tttc in it as one ONNX file, once it was seen to compute what the model does.

    `arguments` are those of a call, such as (ids, caches): tensors, with two sequences and three tokens at least, and
    the caches that a call returned, where the model takes and returns some. All
    sizes that can be others are dynamic, the caches go in as `past.0.state.W`, ... and come out as
    `present.0.state.W`, ...; `past.0.position` counts the tokens seen. What the caches of `arguments` hold of their
    first sequence is written beside the file, as `<path>.past.safetensors` (its positions among the metadata): with the
    caches of a call of no tokens, it is what a sequence begins with.

    >>> _, caches = model(ids[:, :0], None)
    >>> tttc.export.onnx.save_model(model, "model.onnx", (ids, caches))

    Raises:
        BackendRefusal: a layer has no such graph, or onnx, onnxscript or onnxruntime is not installed.
        ShapeError: the model does not return a cache for each that it is given.
        ExportMismatch: what ONNX Runtime computes is not what the model does; nothing is written then.
    """
    onnx, path = package("onnx"), Path(path)
    package("onnxscript")
    model = model.eval()
    flat = FlatModel(model, arguments)
    made = whole_model(onnx, flat, linear)
    onnx.checker.check_model(made, full_check=True)
    about = {"tttc.version": __version__, "tttc.onnxruntime": f">={RUNTIME}"}
    onnx.helper.set_model_props(made, about)
    written = made.SerializeToString(deterministic=True)
    _compare(flat, written)
    path.write_bytes(written)
    held = {n: x for n, x, moves in zip(flat.inputs, flat.values, flat.moving, strict=True) if moves}
    if held:
        first = {n: x[:1] for n, x in held.items() if isinstance(x, torch.Tensor)}
        about["tttc.positions"] = json.dumps({n: x for n, x in held.items() if n not in first})
        write(path.with_name(f"{path.name}.past.safetensors"), tensor_file(first, about))
    return path


def _compare(flat: FlatModel, written: bytes) -> None:
    """Calls one after the other, of all tokens, of one and of two, against the model; raises `ExportMismatch`."""
    session = runtime_session(written)
    outputs = [x.name for x in session.get_outputs()]
    taken = {x.name for x in session.get_inputs()}
    values = list(flat.values)
    for tokens in (None, 1, 2):
        cut = [x if moves or tokens is None else _cut(x, tokens) for x, moves in zip(values, flat.moving, strict=True)]
        with torch.no_grad(), as_operators():
            wanted = flat(*cut)
        fed = {n: _array(x) for n, x in zip(flat.inputs, cut, strict=True) if n in taken}
        found = dict(zip(outputs, session.run(None, fed), strict=True))
        for name, x in zip(flat.outputs, wanted, strict=True):
            error = relative_error(torch.from_numpy(np.asarray(found[name])).double(), torch.as_tensor(x).double())
            if not error <= TOLERANCE:
                raise ExportMismatch(f"{name} differs by {error:.1e} in ONNX Runtime.\n  Nothing was written.")
        after = dict(zip(flat.outputs, wanted, strict=True))
        names = [f"present{n.removeprefix('past')}" for n in flat.inputs]
        values = [after.get(n, x) if m else x for n, x, m in zip(names, values, flat.moving, strict=True)]


def _cut(x: Any, tokens: int) -> Any:
    return x[:, :tokens] if isinstance(x, torch.Tensor) and x.dim() > 1 else x


def _array(x: Any) -> np.ndarray:
    return x.numpy() if isinstance(x, torch.Tensor) else np.array(int(x), np.int64)


# -- the graph ---------------------------------------------------------------------------------------------------------


def whole_model(onnx: Any, flat: FlatModel, linear: str) -> Any:
    """The graph as an `onnx.ModelProto`."""
    sizes = [_dynamic(x, moves) for x, moves in zip(flat.values, flat.moving, strict=True)]
    with torch.no_grad(), _quiet():
        exported = torch.export.export(flat, tuple(flat.values), dynamic_shapes=(tuple(sizes),))
        operators = [o for o in map(operator_of, {n.target for n in exported.graph.nodes}) if o is not None]
        operators.sort(key=lambda o: o.name)
        graphs = [CallGraph(o.call, linear) for o in operators]
        program = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            input_names=flat.inputs,
            output_names=flat.outputs,
            custom_translation_table={
                o.target: _translation(onnx, o, g) for o, g in zip(operators, graphs, strict=True)
            },
        )
    assert program is not None  # None is for files
    made = program.model_proto
    for operator, graph in zip(operators, graphs, strict=True):
        made.functions.extend(_functions(onnx, operator, graph))
    _in_opset(onnx, made)
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of itself: a form of trees that it still asks for, packages that it lacks."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _dynamic(x: Any, moves: bool) -> Any:
    """Which sizes may be others: those of a cache are given, but for the number of sequences."""
    if isinstance(x, int):
        return torch.export.Dim.DYNAMIC
    return {0: torch.export.Dim.AUTO} if moves else dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO)


def _translation(onnx: Any, operator: Operator, graph: CallGraph) -> Callable[..., Any]:
    """The operator as a node that calls its function."""
    values = import_module("onnxscript").values
    schema = onnx.defs.OpSchema
    given = [schema.FormalParameter(f"x{i}", "tensor(float)") for i in range(len(operator.call.inputs))]
    given.append(schema.FormalParameter("position", "tensor(int64)"))
    results = [schema.FormalParameter(f"y{i}", "tensor(float)") for i in range(operator.call.results)]
    node = values.Op(
        values.Opset(DOMAIN, 1), operator.name, schema(operator.name, DOMAIN, 1, inputs=given, outputs=results)
    )
    count = len(given)

    def translate(*arguments: Any) -> Any:
        return node(*arguments[:count])

    names = [*(p.name for p in given), "checkpoint", "keep"]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    vars(translate)["__signature__"] = inspect.Signature([inspect.Parameter(n, kind) for n in names])
    return translate


def _functions(onnx: Any, operator: Operator, graph: CallGraph) -> list[Any]:
    """The function of an operator, and those that it calls in a domain of their own."""
    made = onnx.parser.parse_model(graph.text())
    domain = f"{DOMAIN}.{operator.name}"
    whole = onnx.helper.make_function(
        DOMAIN,
        operator.name,
        [x.name for x in made.graph.input],
        [x.name for x in made.graph.output],
        list(made.graph.node),
        list(made.opset_import),
    )
    found = [whole, *made.functions]
    for function in found[1:]:
        function.domain = domain
    for function in found:
        function.opset_import.append(onnx.helper.make_opsetid(domain, 1))
        _move(function.node, domain)
    return found


def _move(nodes: Any, domain: str) -> None:
    for node in nodes:
        node.domain = domain if node.domain == DOMAIN else node.domain
        for attribute in node.attribute:
            _move(attribute.g.node, domain)


def _stays(before: Any, after: Any) -> bool:
    """Whether an operator takes and returns what it did, if of further types, and has no attribute that is new and
    required.
    """

    def ports(schema: Any) -> list[Any]:
        return [[(p.name, p.option) for p in ports] for ports in (schema.inputs, schema.outputs)]

    def attributes(schema: Any) -> dict[str, Any]:
        return {n: (a.type, a.default_value.SerializeToString()) for n, a in schema.attributes.items()}

    old, new = attributes(before), attributes(after)
    added = [after.attributes[n] for n in new if n not in old]
    kept = all(new.get(n) == x for n, x in old.items())
    return ports(before) == ports(after) and kept and not any(a.required for a in added)


def _in_opset(onnx: Any, model: Any) -> None:
    """Let the model import what its functions do. The operators of ONNX that it uses are the same there."""
    wanted = {x.domain: x.version for f in model.functions for x in f.opset_import}
    given = {x.domain: x.version for x in model.opset_import}
    wanted[""] = max(wanted.get("", OPSET), given.get("", OPSET))
    for node in model.graph.node:
        if not node.domain:
            before, after = (onnx.defs.get_schema(node.op_type, v[""], "") for v in (given, wanted))
            if not _stays(before, after):
                raise BackendRefusal(
                    f"the model has an operator {node.op_type} of ONNX {given['']}, which is another one in "
                    f"{wanted['']}, the least that its layers need.\n"
                    "  Export the layers alone: tttc.export.onnx.save(layer, path)."
                )
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(d, v) for d, v in sorted((given | wanted).items()))
    for function in model.functions:
        for x in function.opset_import:
            x.version = wanted.get(x.domain, x.version)
