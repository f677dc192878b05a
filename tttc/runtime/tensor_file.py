"""Named tensors in a file, in the format of safetensors, which every reader of that format opens.

    bytes 0..8      N, the length of what follows, little-endian
    bytes 8..8+N    JSON: {"__metadata__": {text: text, ...},
                           name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the rest        the numbers, one tensor after the other

A file is data: nothing of it is run, and no size that it claims is believed before the bytes are there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPE_OF_CODE = {
    **{"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8, "BOOL": torch.bool},
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
LONGEST_HEADER = 100_000_000  # bytes of a header, as in safetensors itself
MOST_NUMBERS = 2**63 - 1  # numbers along all axes but empty ones: what the strides of a tensor can say
METADATA = "__metadata__"
Tensors = dict[str, torch.Tensor]


class NotTensors(ValueError):
    """A file that is not of this format, with the reason."""


@dataclass(frozen=True)
class TensorFile:
    """What a file holds; `data` are the bytes behind the header, `table` what the header says of each tensor."""

    about: Mapping[str, str]
    table: Mapping[str, Mapping[str, Any]]
    data: bytes

    def tensors(self) -> Tensors:
        """The tensors by name, in memory of their own."""
        return {n: self._tensor(x["dtype"], x["shape"], *x["data_offsets"]) for n, x in self.table.items()}

    def _tensor(self, code: str, shape: list[int], begin: int, end: int) -> torch.Tensor:
        numbers = torch.empty(end - begin, dtype=torch.uint8)
        numbers.numpy()[:] = memoryview(self.data)[begin:end]
        return numbers.view(DTYPE_OF_CODE[code]).reshape(shape)

    def sha256(self, name: str) -> str:
        """Of the bytes of a tensor."""
        begin, end = self.table[name]["data_offsets"]
        return hashlib.sha256(memoryview(self.data)[begin:end]).hexdigest()

    def written(self) -> bytes:
        """The whole file; the header is filled up, so that the numbers begin at a multiple of eight."""
        header = json.dumps({METADATA: dict(self.about), **self.table}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header + self.data


def tensor_file(tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> TensorFile:
    """Tensors as a file: the widest numbers first, so that each lies at a multiple of its width."""
    table, parts, begin = {}, [], 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].itemsize, n)):
        x = tensors[name].detach().cpu().contiguous()
        parts.append(x.reshape(-1).view(torch.uint8).numpy().tobytes())
        end = begin + len(parts[-1])
        table[name] = {"dtype": CODE_OF_DTYPE[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
        begin = end
    return TensorFile(about, table, b"".join(parts))


def write(path: Path, file: TensorFile) -> None:
    """The whole file or nothing, whenever the process ends."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(file.written())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def parsed(content: bytes) -> TensorFile:
    """The bytes of a file, understood; raises `NotTensors` where they are not of this format."""
    if len(content) < 8:
        raise NotTensors(f"it has {len(content)} bytes, a file of tensors at least 8")
    (length,) = struct.unpack("<Q", content[:8])
    if length > LONGEST_HEADER:
        raise NotTensors(f"its header would have {length} bytes, more than any has")
    if 8 + length > len(content):
        raise NotTensors(f"it has {len(content)} bytes, its header alone would have {length}")
    header = _header(content[8 : 8 + length])
    about = _texts(header.pop(METADATA, {}))
    data = content[8 + length :]
    return TensorFile(about, _table(header, len(data)), data)


def _header(content: bytes) -> dict[str, Any]:
    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise NotTensors(f"its header says {name!r} twice")
            found[name] = value
        return found

    try:
        header = json.loads(content.decode(), object_pairs_hook=once)
    except NotTensors:
        raise
    except (ValueError, RecursionError) as error:
        raise NotTensors(f"its header is no JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise NotTensors(f"its header is a {type(header).__name__}, no table of tensors")
    return header


def _texts(about: Any) -> dict[str, str]:
    if not isinstance(about, dict) or not all(isinstance(x, str) for x in about.values()):
        raise NotTensors("its metadata are not texts by their names")
    return about


def _table(header: Mapping[str, Any], size: int) -> dict[str, Any]:
    """What the header says of each tensor, once the tensors lie side by side and are all that there is."""
    for name, entry in header.items():
        _entry(name, entry)
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, until = entry["data_offsets"]
        if begin != end:
            raise NotTensors(f"the bytes of `{name}` begin at {begin}, those before it end at {end}")
        end = until
    if end != size:
        raise NotTensors(f"its tensors would have {end} bytes, there are {size}")
    return dict(header)


def _entry(name: str, entry: Any) -> None:
    """Refuse what describes no tensor."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise NotTensors(f"it says of `{name}` something else than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_OF_CODE:
        raise NotTensors(f"`{name}` has the dtype {dtype!r}, not one of {', '.join(DTYPE_OF_CODE)}")
    if not _sizes(shape) or math.prod(n or 1 for n in shape) > MOST_NUMBERS:
        raise NotTensors(f"`{name}` has the shape {shape!r}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise NotTensors(f"the bytes of `{name}` are from {offsets!r}")
    wanted, found = math.prod(shape) * DTYPE_OF_CODE[dtype].itemsize, offsets[1] - offsets[0]
    if wanted != found:
        raise NotTensors(f"`{name}`, {dtype} {shape}, has {wanted} bytes, {found} are given")


def _sizes(x: Any) -> bool:
    return isinstance(x, list) and all(type(n) is int and n >= 0 for n in x)
