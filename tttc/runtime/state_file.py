"""States in files: what a layer returned, written as tensors with a note of what they belong to.

    state.save("session.safetensors", layer)
    state = tttc.State.load("session.safetensors", layer)     # in another process, where the sequence goes on

A file is one of safetensors (`tensor_file.py`), its tensors are called `weights.W1`, `start.W1`, `summed.S.W1`, ...,
with the number of the sequence before them in a pack. The metadata say what they are:

    tttc.format     1, the version of this list                tttc.digest     of the declaration and its dims
    tttc.kind       State, PackedState or Cache                tttc.variant    its name, tttc.dims its dims, for errors
    tttc.version    of the library that wrote it               tttc.positions  tokens into the mini-batch, of each
    tttc.decode     what an open mini-batch is kept as         tttc.seen       tokens that a Cache has seen
    tttc.sha256     of all that is in the file beside

Nothing of a file is run. What is damaged, of another format or declaration, or does not hold what a state of the layer
holds, is refused with the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tttc.errors import FileRefused, StateMismatch
from tttc.runtime.tensor_file import DTYPE_OF_CODE, NotTensors, TensorFile, parsed, tensor_file, write
from tttc.version import __version__

if TYPE_CHECKING:
    from tttc.runtime.layer import Layer

STATE_FORMAT = "1"
CACHE_TAPS = "taps"  # the name of those of a cache; those of a state are `taps.<name>`
Groups = Mapping[str, Mapping[str, torch.Tensor]]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Contents:
    """What a state, a pack or a cache is made of: the tensors of each sequence or batch by group and name."""

    kind: str
    positions: tuple[int, ...]
    groups: tuple[Groups, ...]
    seen: int | None = None
    taps: torch.Tensor | None = None


def save(path: str | Path, contents: Contents, layer: Layer) -> Path:
    """Write it; raises `StateMismatch` where it is no state of the layer, and nothing is written then."""
    path, tensors = Path(path), _named(contents)
    wrong = [n for n, x in tensors.items() if not x.is_floating_point()]
    problem = f"`{wrong[0]}` has the dtype {tensors[wrong[0]].dtype}" if wrong else None
    problem = problem or _misfits({n: tuple(x.shape) for n, x in tensors.items()}, contents, layer)
    if problem:
        raise StateMismatch(
            f"variant `{layer.signature.name}`: this is no state of {layer}: {problem}; nothing was written.\n"
            "  Give the layer that returned it."
        )
    about = {
        "tttc.format": STATE_FORMAT,
        "tttc.version": __version__,
        "tttc.kind": contents.kind,
        "tttc.variant": layer.signature.name,
        "tttc.dims": json.dumps(layer.dims, sort_keys=True),
        "tttc.digest": layer.digest,
        "tttc.decode": layer.decode,
        "tttc.positions": json.dumps(list(contents.positions)),
        **({} if contents.seen is None else {"tttc.seen": json.dumps(contents.seen)}),
    }
    file = tensor_file(tensors, about)
    write(path, replace(file, about={**about, "tttc.sha256": checksum(file)}))
    return path


def load(path: str | Path, kind: str, layer: Layer) -> Contents:
    """What a file holds, on the device of the layer.

    Raises:
        FileRefused: it is no such file, or not of this layer; the message says which, and what to do.
        OSError: it cannot be read.
    """
    path = Path(path)

    def refused(what: str, remedy: str) -> FileRefused:
        return FileRefused(f"{path}: {what}.\n  {remedy}")

    try:
        file = parsed(path.read_bytes())
    except NotTensors as reason:
        raise refused(
            f"this is no file of tensors, or not all of it: {reason}", "Give one that `save` wrote."
        ) from None
    kinds = _of_another_format(file), _of_whole_numbers(file), _damaged(file), _of_another_kind(file, kind)
    for wrong in (*kinds, _of_another(file, layer)):
        if wrong:
            raise refused(*wrong)
    shapes = {n: tuple(x["shape"]) for n, x in file.table.items()}
    contents = _placed(file, kind)
    if contents is None:
        raise refused("it does not say where its sequences stand", "Give one that `save` wrote.")
    decode = file.about.get("tttc.decode")
    if any(contents.positions) and decode != layer.decode:
        what = f"it keeps the {decode} of an open mini-batch, this layer keeps {layer.decode}"
        raise refused(what, f'Compile the layer with decode="{decode}".')
    if problem := _misfits(shapes, contents, layer):
        raise refused(f"it holds no state of {layer}: {problem}", "Give one that `save` wrote for such a layer.")
    return _filled(contents, {n: x.to(layer.device) for n, x in file.tensors().items()}, layer)


# -- names -------------------------------------------------------------------------------------------------------------


def _prefix(kind: str, number: int) -> str:
    return f"{number}." if kind == "PackedState" else ""


def _named(contents: Contents) -> dict[str, torch.Tensor]:
    """Every tensor by its name in the file. What a call measured is no part of where a sequence stands."""
    found = {} if contents.taps is None else {CACHE_TAPS: contents.taps}
    for i, groups in enumerate(contents.groups):
        for group, tensors in groups.items():
            named = {f"{_prefix(contents.kind, i)}{group}.{n}": x for n, x in tensors.items()}
            found |= named if group != "telemetry" else {}
    return found


def _placed(file: TensorFile, kind: str) -> Contents | None:
    """What the file says of places, without its tensors; None where that is nothing that was ever written."""
    try:
        positions, seen = (json.loads(file.about.get(f"tttc.{n}", "null")) for n in ("positions", "seen"))
    except (ValueError, RecursionError):
        return None
    counted = [*positions, *([] if seen is None else [seen])] if isinstance(positions, list) else [-1]
    if not positions or not all(type(n) is int and n >= 0 for n in counted):
        return None
    if (seen is None) == (kind == "Cache") or (len(positions) > 1 and kind != "PackedState"):
        return None
    return Contents(kind, tuple(positions), (), seen)


def _filled(contents: Contents, tensors: Mapping[str, torch.Tensor], layer: Layer) -> Contents:
    """The same with the tensors of the file, in the order in which calls of the layer have them."""
    found = []
    for i, position in enumerate(contents.positions):
        prefix, layout = _prefix(contents.kind, i), layer.state_layout(position)
        named = {g: {n: f"{prefix}{g}.{n}" for n in names} for g, names in layout.items()}
        found.append({g: {n: tensors[x] for n, x in names.items() if x in tensors} for g, names in named.items()})
    return replace(contents, groups=tuple(found), taps=tensors.get(CACHE_TAPS))


# -- refusals ----------------------------------------------------------------------------------------------------------

Refusal = tuple[str, str] | None


def _of_another_format(file: TensorFile) -> Refusal:
    found = file.about.get("tttc.format")
    if found is None:
        return "its metadata have no tttc.format: it is no state of tttc", "Give a file that `save` wrote."
    if found != STATE_FORMAT:
        by = file.about.get("tttc.version", "unknown")
        return (
            f"its format is {found!r}, written by tttc {by}; this is tttc {__version__}, which reads {STATE_FORMAT!r}",
            ("Read it with that version: a state cannot be carried over."),
        )
    return None


def _of_whole_numbers(file: TensorFile) -> Refusal:
    found = [(n, x["dtype"]) for n, x in file.table.items() if not DTYPE_OF_CODE[x["dtype"]].is_floating_point]
    if not found:
        return None
    return f"`{found[0][0]}` has the dtype {found[0][1]!r}: states are no whole numbers", "Give one that `save` wrote."


def _damaged(file: TensorFile) -> Refusal:
    found, wanted = checksum(file), file.about.get("tttc.sha256", "missing")
    if found == wanted:
        return None
    return f"it was changed after it was written: its checksum is {found[:12]}, noted is {wanted[:12]}", (
        "Take an intact copy: a state that is not as it was goes on to other numbers."
    )


def _of_another_kind(file: TensorFile, kind: str) -> Refusal:
    found = file.about.get("tttc.kind")
    remedy = f"Load it with {found}.load." if found in ("State", "PackedState", "Cache") else "Give another file."
    return None if found == kind else (f"it holds a {found}, asked for is a {kind}", remedy)


def _of_another(file: TensorFile, layer: Layer) -> Refusal:
    """Whether it was written for another declaration, or other sizes."""
    variant = file.about.get("tttc.variant", "unknown")
    if file.about.get("tttc.digest") != layer.digest:
        dims, own = file.about.get("tttc.dims", "unknown"), json.dumps(layer.dims, sort_keys=True)
        if dims != own:
            return f"it is of `{variant}` with dims {dims}, this layer has {own}", "Compile the layer with these dims."
        return f"it is of another declaration, `{variant}`, not of this `{layer.signature.name}` as it is now", (
            "Compile the declaration that it was written with: its functions, its update rule and its mini_batch."
        )
    return None


def _misfits(shapes: Shapes, contents: Contents, layer: Layer) -> str | None:
    """What tensors of these names and shapes have that no state of the layer has, or lack."""
    known: set[str] = {CACHE_TAPS} & set(shapes)
    if known and (contents.kind != "Cache" or len(shapes[CACHE_TAPS]) != 3):
        return f"`{CACHE_TAPS}` has the shape {list(shapes[CACHE_TAPS])}"
    for i, position in enumerate(contents.positions):
        prefix = _prefix(contents.kind, i)
        own = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix) and n not in known}
        problem = misfit(own, position, layer)
        if problem:
            return f"{problem} (sequence {i})" if prefix else problem
        known |= {prefix + n for n in own}
    unknown = sorted(set(shapes) - known)
    return f"`{unknown[0]}` belongs to no sequence" if unknown else None


def misfit(shapes: Shapes, position: int, layer: Layer) -> str | None:
    """What tensors, by `group.name`, have that no state of the layer there has, or lack; None where they are one."""
    b, layout = layer.signature.mini_batch, layer.state_layout(position)
    if position and ("start" not in layout or (isinstance(b, int) and position >= b)):
        return f"it stands {position} tokens into a mini-batch of {b}"
    wanted = {f"{group}.{n}": (group, sizes) for group, tensors in layout.items() for n, sizes in tensors.items()}
    if unknown := sorted(set(shapes) - set(wanted)):
        return f"it has no `{unknown[0]}`"
    begun = bool(position) or any(n.startswith(("memory.", "taps.")) for n in shapes)
    needed = {"weights"} | ({"memory", "taps"} if begun else set()) | (set(layout) if position else set())
    needed |= {wanted[n][0] for n in shapes}
    if missing := [n for n, (group, _) in wanted.items() if group in needed and n not in shapes]:
        return f"`{missing[0]}` is missing"
    leading = shapes[next(iter(wanted))][:2]
    for n in (n for n in wanted if n in shapes):
        found, (group, sizes) = shapes[n], wanted[n]
        if len(leading) < 2 or found[2:] != sizes or not _alike(found[:2], leading, group in ("rows", "taps")):
            return f"`{n}` has the shape {list(found)}, expected {[*leading, *sizes]}"
    return None


def _alike(found: tuple[int, ...], leading: tuple[int, ...], of_queries: bool) -> bool:
    """Whether batch and heads are those of the weights; of tokens, q may have several heads for each of these."""
    several = of_queries and len(found) == 2 and leading[1] > 0 and found[1] > 0 and found[1] % leading[1] == 0
    return found == leading or (several and found[0] == leading[0])


def checksum(file: TensorFile) -> str:
    """Of all that a file says and holds, in whatever order it does."""
    about = sorted((n, x) for n, x in file.about.items() if n != "tttc.sha256")
    tensors = sorted((n, x["dtype"], x["shape"], file.sha256(n)) for n, x in file.table.items())
    return hashlib.sha256(json.dumps([about, tensors]).encode()).hexdigest()
