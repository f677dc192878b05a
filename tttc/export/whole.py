"""A model with layers of tttc in it as one ONNX graph, its caches in and out.

    _, caches = model(ids[:, :0], None)                          # where sequences begin
    tttc.export.onnx.save_model(model, "model.onnx", (ids, caches))

    logits, present.0.state.W, ..., present.0.position = model (ids, past.0.state.W, ..., past.0.position)

`torch.onnx.export` makes the graph. Each layer is a function of the file (call_graph.py); what that calls are functions
of a domain of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch.utils._pytree import GetAttrKey, tree_flatten_with_path, tree_leaves, tree_unflatten

from tttc.backends.onnx.emit import OPSET
from tttc.errors import BackendRefusal, ShapeError
from tttc.export.call_graph import DOMAIN, CallGraph
from tttc.ir.names import spelled
from tttc.runtime.custom_ops import Operator, as_operators, operator_of
from tttc.runtime.state import Cache, State

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
        named = [(parameters[path[0].idx], next(complete) if _is_cache(x) else x) for path, x in found]
        self.inputs, self.values, self.moving, self.parts = _flattened(named, "past")
        leaves = tree_leaves(returned, is_leaf=_is_cache)
        self.outputs, *_ = _flattened([("output", x) for x in leaves], "present")

    def forward(self, *values: Any) -> list[Any]:
        rest = list(values)
        leaves = []
        for count, tree in self.parts:
            leaves.append(tree_unflatten(rest[:count], tree))
            rest = rest[count:]
        returned = self.model(*tree_unflatten(leaves, self.tree))
        return tree_leaves(returned)


def _flattened(named: Named, word: str) -> tuple[list[str], list[Any], list[bool], list[Any]]:
    """Names and values of all tensors and positions, whether each is part of a cache, and the tree of each leaf."""
    names: list[str] = []
    values, moving, parts = [], [], []
    caches = 0
    for own, leaf in named:
        cache = _is_cache(leaf)
        found, tree = tree_flatten_with_path(_numbered(leaf) if cache else leaf)
        first = f"{word}.{caches}" if cache else own if own not in names else f"{own}.{len(names)}"
        names += [".".join([first, *_words(path)]) for path, _ in found]
        values += [int(x) if isinstance(x, Number) else x.detach() for _, x in found]
        moving += [cache] * len(found)
        parts.append((len(found), tree))
        caches += cache
    return names, values, moving, parts


def _is_cache(x: Any) -> bool:
    return isinstance(x, Cache | State)


def _numbered(x: Any) -> Any:
    """A cache whose positions are inputs, where they count: that of a state does inside its mini-batch."""
    if isinstance(x, Cache):
        return replace(x, state=_numbered(x.state), position=Number(x.position))
    opens = bool(x.start or x.summed or x.rows)
    return replace(x, position=Number(x.position)) if opens else x


def _words(path: Any) -> list[str]:
    """What a part of a cache is called: state.W, state.start.W, state.position, taps."""
    keys = [key.name if isinstance(key, GetAttrKey) else spelled(str(key.key)) for key in path]
    return [key for key in keys if key not in ("weights", "summed", "memory")]


# -- the graph ---------------------------------------------------------------------------------------------------------


def whole_model(onnx: Any, flat: FlatModel, linear: str) -> Any:
    """The graph as an `onnx.ModelProto`."""
    sizes = [_dynamic(x, moves) for x, moves in zip(flat.values, flat.moving, strict=True)]
    with torch.no_grad():
        exported = torch.export.export(flat, tuple(flat.values), dynamic_shapes=(tuple(sizes),))
        operators = [o for o in map(operator_of, {n.target for n in exported.graph.nodes}) if o is not None]
        operators.sort(key=lambda o: o.name)
        graphs = [CallGraph(o.call, linear) for o in operators]
        made = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            input_names=flat.inputs,
            output_names=flat.outputs,
            custom_translation_table={
                o.target: _translation(onnx, o, g) for o, g in zip(operators, graphs, strict=True)
            },
        ).model_proto
    for operator, graph in zip(operators, graphs, strict=True):
        made.functions.extend(_functions(onnx, operator, graph))
    _in_opset(onnx, made)
    return made


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
