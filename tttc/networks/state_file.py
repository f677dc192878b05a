"""Network states in files: tensors in the format of safetensors, and how they lie in the state.

    tttc.format   1, the version of this list              tttc.network  of the network: its fast weights and chunk
    tttc.kind     NetworkState                             tttc.form     which container holds which tensor, as JSON
    tttc.version  of the library that wrote it             tttc.sha256   of all that is in the file beside

Containers are dicts, lists, tuples and None; whole numbers, floats and texts beside the tensors are in the form.
Nothing of a file is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tttc.errors import FileRefused, StateMismatch
from tttc.runtime.state_file import STATE_FORMAT, checksum
from tttc.runtime.tensor_file import CODE_OF_DTYPE, NotTensors, TensorFile, parsed, tensor_file, write
from tttc.version import __version__

KIND = "NetworkState"


def save(path: str | Path, tree: Mapping[str, Any], network: Mapping[str, Any]) -> Path:
    """Write containers of tensors, for a network that `network` describes; nothing is written where that fails."""
    path, tensors = Path(path), dict[str, Tensor]()
    about = {
        "tttc.format": STATE_FORMAT,
        "tttc.version": __version__,
        "tttc.kind": KIND,
        "tttc.network": json.dumps(network, sort_keys=True),
        "tttc.form": json.dumps(_form(tree, "state", tensors)),
    }
    file = tensor_file(tensors, about)
    write(path, replace(file, about={**about, "tttc.sha256": checksum(file)}))
    return path


def load(path: str | Path, network: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The containers that `save` wrote for such a network.

    Raises:
        FileRefused: it is no such file, is damaged, or of another network.
        OSError: it cannot be read.
    """
    try:
        file = parsed(Path(path).read_bytes())
    except NotTensors as reason:
        raise FileRefused(f"{path}: this is no file of tensors: {reason}.\n  Give one that `save` wrote.") from None
    if problem := _refusal(file, network):
        raise FileRefused(f"{path}: {problem}.\n  Give one that `save` wrote for this network.")
    tensors = {n: x.to(device) for n, x in file.tensors().items()}
    try:
        tree = _filled(json.loads(file.about["tttc.form"]), tensors)
    except (KeyError, ValueError, TypeError, RecursionError):
        tree = None
    if not isinstance(tree, dict) or tensors:
        raise FileRefused(f"{path}: its form is none of its tensors.\n  Give one that `save` wrote.")
    return tree


def _refusal(file: TensorFile, network: Mapping[str, Any]) -> str | None:
    found, wanted = file.about.get("tttc.network", "{}"), json.dumps(network, sort_keys=True)
    if file.about.get("tttc.kind") != KIND:
        return f"it holds a {file.about.get('tttc.kind', 'table of tensors')}, asked for is a {KIND}"
    if file.about.get("tttc.format") != STATE_FORMAT:
        return (
            f"its format is {file.about.get('tttc.format')!r}, this is tttc {__version__}, which reads {STATE_FORMAT!r}"
        )
    if checksum(file) != file.about.get("tttc.sha256"):
        return "it was changed after it was written: its checksum is another"
    return None if found == wanted else f"it is of another network: {found[:200]}, this one is {wanted[:200]}"


def _form(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What `tree` is made of, in JSON; its tensors are put among `tensors` by the names that the form says."""
    if isinstance(tree, Tensor):
        if tree.dtype not in CODE_OF_DTYPE:
            raise StateMismatch(
                f"EndToEnd: `{name}` has the dtype {tree.dtype}, which no file holds; nothing was written."
            )
        tensors[name] = tree
        return {"tensor": name}
    if type(tree) is dict and all(isinstance(k, str) for k in tree):
        return {"dict": {k: _form(x, f"{name}.{k}", tensors) for k, x in tree.items()}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_form(x, f"{name}.{i}", tensors) for i, x in enumerate(tree)]}
    if tree is None or type(tree) in (bool, int, float, str):
        return {"value": tree}
    raise StateMismatch(
        f"EndToEnd: `{name}` is a {type(tree).__name__}, which no file holds; nothing was written.\n"
        "  Caches that are saved are dicts by texts, lists and tuples of tensors."
    )


def _filled(form: Any, tensors: dict[str, Tensor]) -> Any:
    """The containers of a form; takes each tensor out of `tensors`."""
    ((kind, own),) = form.items()
    if kind == "tensor":
        return tensors.pop(own)
    if kind == "dict":
        return {k: _filled(x, tensors) for k, x in own.items()}
    if kind in ("list", "tuple"):
        found = [_filled(x, tensors) for x in own]
        return found if kind == "list" else tuple(found)
    if kind != "value":
        raise ValueError(kind)
    return own
