"""A layer, or a module that holds some, as a `.pt2` file.

    tttc.export.save(model, "model.pt2", (x,))                      # for processes without the declarations
    model = tttc.export.load("model.pt2")                           # in one of them: forward, and trained further

Each layer is then one operator of the graph, and its program is part of the file.

    tttc.export.save(model, "model.pt2", (x,), inlined=True)        # for processes that have torch alone
    model = torch._inductor.aoti_load_package("model.pt2")          # in one of them

The program of each layer then runs under torch's own `scan` operator, and AOTInductor compiles the whole: forward, for
any batch and any number of tokens from one on, on processors of the kind that this one is.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map_only

from tttc.errors import BackendRefusal, FileRefused, ShapeError
from tttc.export import archive, program_file, scan_operator
from tttc.export.inlined import Inliner
from tttc.export.onnx import ExportMismatch
from tttc.ir.program import TokenProgram
from tttc.ir.structure import digest
from tttc.runtime import custom_ops
from tttc.runtime.inlining import inlined as inlined_by
from tttc.runtime.layer import Layer
from tttc.verification.comparison import relative_error
from tttc.verification.inputs import random_inputs
from tttc.version import __version__

ROUNDINGS = 100  # of the outputs' dtype: what a package may differ by, relative, from the module
NOISE = 5.0  # times what a rounding of the inputs does to the module's own outputs
BATCH, TOKENS, HEADS = (Dim(name, min=1) for name in ("batch", "tokens", "heads"))
Function = Callable[..., Any]


def save(module: torch.nn.Module | Layer, path: str | Path, example: Any, *, inlined: bool = False) -> Path:
    """Write a module, or a compiled layer, as a file that a process without its declaration loads.

    Args:
        module: a `torch.nn.Module` that holds layers of tttc, or a layer of `tttc.compile`; its outputs are tensors.
        path: the file, `.pt2`.
        example: its arguments, a tuple, or a dict of those by name. Of a module, the first axes of the first tensor
            are batch and tokens; so are those of the other tensors that have as many. They may be any number, and need
            not be those of later calls.
        inlined: for processes that have torch and no tttc.

    Raises:
        BackendRefusal: the layer cannot be run without its operators, or torch is of another version.
        ExportMismatch: what was made does not compute what the module does; nothing is written.
        ShapeError: `example` is no call of the module.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ShapeError(f"the file is called {path.name}.\n  Give it a name that ends with .pt2.")
    call = Example.of(module, example)
    with TemporaryDirectory(dir=path.parent) as folder:
        made = (_packaged if inlined else _with_programs)(call, Path(folder) / path.name)
        made.replace(path)
    return path


def load(path: str | Path) -> torch.nn.Module:
    """A module that `save` wrote, in a process that need not have its declaration: forward, and trained further.

    The operators of its graph are made of the programs in the file, by the backend that they had where it is there,
    otherwise by another. The file is data: nothing of it is run that is not an operator of PyTorch or of tttc.

    >>> model = tttc.export.load("model.pt2")
    >>> model(x)

    Raises:
        FileRefused: it is damaged, holds what no such file has, or is of another version.
        BackendRefusal: there is no backend here that runs one of its programs.
    """
    path = Path(path)
    for name, text in archive.checked(path).items():
        _register(path, name, text)
    try:
        loaded: torch.nn.Module = torch.export.load(path).module()
    except Exception as error:  # torch says in many ways what it does not read
        raise FileRefused(
            f"{path.name} is refused: torch does not read it ({type(error).__name__}: {error})."
        ) from None
    return loaded


def _register(path: Path, name: str, text: str) -> None:
    """Make the operator of that name, unless there is one of the same program."""
    declaration = program_file.read(text)
    if (there := custom_ops.known(name)) is not None:
        if there.layer.digest != digest(declaration.program):
            raise FileRefused(f"{path.name} is refused: here {name} is the operator of another program.")
        return
    if not re.fullmatch(rf"{declaration.program.name}_[0-9a-f]{{16}}", name):
        raise FileRefused(f"{path.name} is refused: {name} is no operator of {declaration.program.name}.")
    try:
        program_file.compiled(declaration).register(name)
    except BackendRefusal:
        raise
    except Exception as error:  # it has the form of a program, and means nothing
        said = f"the program of {name} has no kernels ({type(error).__name__}: {error})"
        raise FileRefused(f"{path.name} is refused: {said}.") from error


def _packaged(call: Example, path: Path) -> Path:
    scan_operator.available()
    program, about = inlined_program(call)
    made = scan_operator.packaged(program, path, about)
    call.compare(scan_operator.loaded(made), "the package")
    return made


def _with_programs(call: Example, path: Path) -> Path:
    """The module as torch exports it, and the program of every operator of tttc that it calls."""
    args, named = call.passed(call.sized({BATCH: 2, TOKENS: 19}))
    program = torch.export.export(call.module, args, named, dynamic_shapes=call.shapes)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = (str(n.target) for graph in graphs for n in graph.nodes)
    names = sorted({t.split(".")[1] for t in targets if t.startswith("tttc.")})
    operators = {n: custom_ops.known(n) for n in names}
    programs = {n: program_file.written(x.layer) for n, x in operators.items() if x is not None}
    if not programs:
        raise BackendRefusal(f"{type(call.module).__name__} calls no layer of tttc.\n  torch.export takes it as it is.")
    call.compare(program.module(), "the exported program")
    torch.export.save(program, path, extra_files={archive.PROGRAMS: json.dumps(programs)})
    archive.checked(path)
    return path


def save_inlined(layer: Layer, path: str | Path) -> Path:
    """A layer with an example of its own, for torch alone: `tttc export --format aoti`."""
    return save_layer(layer, path, inlined=True)


def save_layer(layer: Layer, path: str | Path, *, inlined: bool = False) -> Path:
    """A layer with an example of its own: `tttc export --format pt2`."""
    inputs = random_inputs(layer.signature, layer.dims, 2, 19, 3).map(lambda x: x.to(layer.dtype))
    given = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.keywords()}
    return save(layer, path, tree_map_only(torch.Tensor, lambda x: x.detach(), given), inlined=inlined)


class LayerModule(torch.nn.Module):
    """A compiled layer as a module: z alone, from tensors alone."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gates: dict[str, torch.Tensor] | None = None,
        params: dict[str, torch.Tensor] | None = None,
        state: dict[str, torch.Tensor] | None = None,
        tokens: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """z: [B, T, H, E]."""
        z, _ = self.layer(q, k, v, gates=gates, params=params, state=state, tokens=tokens)
        return z


@dataclass(frozen=True)
class Example:
    """A module and arguments of it, by the names that they have there; `shapes` says which axes vary."""

    module: torch.nn.Module
    positional: int
    arguments: dict[str, Any]
    shapes: dict[str, Any]

    @staticmethod
    def of(module: torch.nn.Module | Layer, example: Any) -> Example:
        args, named = ((), example) if isinstance(example, Mapping) else (example, {})
        args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
        callee = LayerModule(module) if isinstance(module, Layer) else module
        try:
            bound = inspect.signature(callee.forward).bind(*args, **named).arguments
        except TypeError as error:
            raise ShapeError(f"the example is no call of {type(callee).__name__}: {error}.") from None
        tensors = [x for x in tree_leaves(bound) if isinstance(x, torch.Tensor)]
        if not tensors or tensors[0].dim() < 2 or 0 in tensors[0].shape[:2]:
            raise ShapeError("the example has no tensor [batch, tokens, ...].\n  Pass the arguments of a call, (x,).")
        varies = _of_layer(module) if isinstance(module, Layer) else partial(_of_module, tensors[0].shape[:2])
        shapes = {n: _mapped(partial(varies, n), x) for n, x in bound.items()}
        return Example(callee, len(args), dict(bound), shapes)

    def sized(self, sizes: Mapping[Any, int]) -> dict[str, Any]:
        """The arguments with axes of other lengths: what they hold, from its beginning, as often as it takes."""

        def one(x: Any, shape: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            for axis, dim in shape.items():
                places = torch.arange(sizes.get(dim, x.shape[axis]), device=x.device) % x.shape[axis]
                x = x.index_select(axis, places)
            return x

        return {n: _zipped(one, x, self.shapes[n]) for n, x in self.arguments.items()}

    def passed(self, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """By place and by name, as the example was given."""
        values = list(arguments.items())
        return tuple(x for _, x in values[: self.positional]), dict(values[self.positional :])

    @torch.no_grad()
    def compare(self, made: Function, what: str, lengths: Sequence[int] = (1, 19)) -> None:
        """Calls of several lengths against the module; raises `ExportMismatch`."""
        for tokens, batch in zip(lengths, (3, 1, 2, 1, 2, 1), strict=False):
            arguments = self.sized({TOKENS: tokens, BATCH: batch})
            args, named = self.passed(arguments)
            wanted = tree_leaves(self.module(*args, **named))
            near, others = self.passed(tree_map_only(torch.Tensor, _rounded, arguments))
            rounded = tree_leaves(self.module(*near, **others))
            found = tree_leaves(made(*args, **named))
            for x, y, z in zip(wanted, rounded, found, strict=True):
                allowed = max(ROUNDINGS * torch.finfo(x.dtype).eps, NOISE * relative_error(y.double(), x.double()))
                error = relative_error(z.double(), x.double())
                if not error <= allowed:
                    differs = f"of {tokens} tokens differs by {error:.1e} in {what}, more than {allowed:.0e}"
                    raise ExportMismatch(f"an output {differs}.\n  Nothing was written.")


def inlined_program(call: Example) -> tuple[Any, dict[str, str]]:
    """The module as an exported program of operations of torch, compared with the module, and what is said about it."""
    inliner = Inliner()
    args, named = call.passed(call.sized({BATCH: 2, TOKENS: 19}))
    with inlined_by(inliner):
        program = scan_operator.traced(call.module, args, named, call.shapes)
    if not inliner.layers:
        raise BackendRefusal(f"{type(call.module).__name__} calls no layer of tttc.\n  torch.export takes it as it is.")
    around = {n + i for n in inliner.chunks for i in (-1, 0, 1) if 1 < n <= 64}
    call.compare(
        scan_operator.runnable(program), "the traced program", sorted({1, 2, *around, 2 * max([*around, 9]) + 3})[:6]
    )
    declared = {layer.signature.name: digest(layer.stages.of(TokenProgram)) for layer in inliner.layers}
    about = {"tttc.version": __version__, "torch.version": torch.__version__}
    return program, about | {f"tttc.digest.{name}": value for name, value in declared.items()}


def _of_layer(layer: Layer) -> Callable[[str, torch.Tensor], dict[int, Any]]:
    """Which axes vary of the arguments of a layer: tokens and gates are [B, T, H, ...], states and params [..., H]."""
    ranks: dict[str, Any] = {"state": layer.signature.states, "params": layer.signature.params}

    def varies(name: str, x: torch.Tensor, key: str = "") -> dict[int, Any]:
        if name not in ranks:
            return {0: BATCH, 1: TOKENS, 2: HEADS}
        leading = x.dim() - len(ranks[name][key].dims)
        return [{}, {0: HEADS}, {0: BATCH, 1: HEADS}][leading]

    return varies


def _of_module(sizes: Sequence[int], name: str, x: torch.Tensor, key: str = "") -> dict[int, Any]:
    """Which axes vary of an argument of a module: those that have as many as the first tensor."""
    found = {} if x.dim() < 1 or x.shape[0] != sizes[0] else {0: BATCH}
    return found | ({1: TOKENS} if found and x.dim() > 1 and x.shape[1] == sizes[1] else {})


def _mapped(varies: Callable[..., dict[int, Any]], x: Any) -> Any:
    """For each tensor of an argument which of its axes vary, in the tree that the argument is."""
    if isinstance(x, torch.Tensor):
        return varies(x)
    if isinstance(x, Mapping):
        return {n: varies(y, n) if isinstance(y, torch.Tensor) else _mapped(varies, y) for n, y in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(_mapped(varies, y) for y in x)
    return None


def _zipped(change: Callable[[Any, Any], Any], x: Any, shape: Any) -> Any:
    """A tree of tensors changed, each with what stands in its place in another tree."""
    if isinstance(x, Mapping):
        return {n: _zipped(change, y, shape[n]) for n, y in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(_zipped(change, y, s) for y, s in zip(x, shape, strict=True))
    return change(x, shape)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """What a rounding may make of numbers."""
    if not x.is_floating_point():
        return x
    sign = torch.where(torch.arange(x.numel(), device=x.device) % 2 == 0, 1.0, -1.0).reshape(x.shape)
    return (x * (1 + sign.to(x.dtype) * torch.finfo(x.dtype).eps)).to(x.dtype)
