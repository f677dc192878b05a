"""States as files of safetensors: the same to the last bit, or refused with the reason."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import tttc
from tests.test_state import VARIANTS, Sequences, same
from tttc.errors import FileRefused, StateMismatch
from tttc.nn import TTT, Cache
from tttc.runtime.state import PackedState, State
from tttc.runtime.state_file import checksum
from tttc.runtime.tensor_file import TensorFile, parsed, tensor_file

F64 = torch.float64


def measured_apart(state: State) -> State:
    return replace(state, telemetry={})


@pytest.mark.parametrize("decode", ["sums", "rows"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_state_goes_on_from_its_file(name: str, decode: str, tmp_path: Path) -> None:
    """Inside a mini-batch, where it holds all that it ever holds, and at its end."""
    sequences = Sequences(name)
    sequences.layer = tttc.compile(VARIANTS[name], sequences.layer.dims, F64, backend="torch", decode=decode)
    for stop in (7, 8):
        _, state = sequences.call(slice(0, stop))
        again = State.load(state.save(tmp_path / "a", sequences.layer), sequences.layer)
        same(again, measured_apart(state))
        assert torch.equal(sequences.call(slice(stop, 12), again)[0], sequences.call(slice(stop, 12), state)[0])


def test_two_files_of_one_state_are_equal_bytes_and_leave_nothing_beside_them(tmp_path: Path) -> None:
    sequences = Sequences("Titans")
    _, state = sequences.call(slice(0, 7))
    one, two = (state.save(tmp_path / n, sequences.layer).read_bytes() for n in "ab")
    assert one == two
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_packs_and_caches_have_files_too(tmp_path: Path) -> None:
    sequences = Sequences("TTTLinear", batch=1)
    _, pack = sequences.call(slice(0, 7), cu_seqlens=[0, 3, 7])
    again = PackedState.load(pack.save(tmp_path / "pack", sequences.layer), sequences.layer)
    assert len(again.sequences) == 2
    for one, other in zip(again.sequences, pack.sequences, strict=True):
        same(one, measured_apart(other))
    block = TTT(VARIANTS["TTTLinear"], 8, 2, conv_kernel=4, backend="torch").double()
    x = torch.rand(2, 9, 8, dtype=F64)
    with torch.no_grad():
        _, cache = block(x[:, :6], return_state=True)
        loaded = Cache.load(cache.save(tmp_path / "cache", block), block)
        assert torch.equal(block(x[:, 6:], loaded), block(x[:, 6:], cache))
    with pytest.raises(FileRefused, match=r"holds a Cache, asked for is a State.\n  Load it with Cache.load"):
        State.load(tmp_path / "cache", block)


def test_16_bits_are_kept(tmp_path: Path) -> None:
    sequences = Sequences("TTTLinear")
    _, state = sequences.call(slice(0, 7))
    half = measured_apart(state).to(torch.bfloat16)
    same(State.load(half.save(tmp_path / "a", sequences.layer), sequences.layer), half)


def test_readers_of_safetensors_read_it_and_what_they_write_is_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="of the extra dev: pip install 'tttc[dev]'")
    library = pytest.importorskip("safetensors.torch")
    sequences = Sequences("Titans")
    _, state = sequences.call(slice(0, 7))
    state.save(tmp_path / "a", sequences.layer)
    found = library.load_file(tmp_path / "a")
    assert torch.equal(found["start.W1"], state.start["W1"])
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        library.save_file(found, tmp_path / "b", file.metadata())
    same(State.load(tmp_path / "b", sequences.layer), state)


@pytest.mark.parametrize(
    "other", [lambda: Sequences("Titans"), lambda: Sequences("TTTLinear")], ids=["another rule", "another decode"]
)
def test_a_state_is_not_saved_for_a_layer_that_cannot_go_on_with_it(other: Any, tmp_path: Path) -> None:
    sequences = Sequences("TTTLinear")
    decode = "sums" if sequences.layer.decode == "rows" else "rows"
    sequences.layer = tttc.compile(VARIANTS["TTTLinear"], sequences.layer.dims, F64, backend="torch", decode=decode)
    _, state = sequences.call(slice(0, 7))
    with pytest.raises(StateMismatch, match="this is no state of Layer"):
        state.save(tmp_path / "a", other().layer)
    assert not list(tmp_path.iterdir())


# -- refusals ----------------------------------------------------------------------------------------------------------


class Mischief:
    """What a pickle would run."""

    done: ClassVar[list[str]] = []

    def __reduce__(self) -> Any:
        return Mischief.done.append, ("run",)


def torch_saved(_: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"weights": torch.ones(3), "more": Mischief()}, file)
    return file.getvalue()


def raw(header: bytes, length: int | None = None) -> Callable[[bytes], bytes]:
    """A file of this header."""
    return lambda _: struct.pack("<Q", len(header) if length is None else length) + header


def in_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """The same file with something in its header changed."""

    def changed(content: bytes) -> bytes:
        (n,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + n])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + n :]

    return changed


def of_tensor(name: str, **changed: Any) -> Callable[[bytes], bytes]:
    return in_header(lambda h: h[name].update(changed))


def sealed(change: Callable[[dict[str, str], dict[str, torch.Tensor]], Any]) -> Callable[[bytes], bytes]:
    """A whole file of other metadata and tensors, as another program might write it."""

    def changed(content: bytes) -> bytes:
        file = parsed(content)
        about, tensors = dict(file.about), file.tensors()
        change(about, tensors)
        made = tensor_file(tensors, about)
        return TensorFile({**about, "tttc.sha256": checksum(made)}, made.table, made.data).written()

    return changed


def said(**about: str) -> Callable[[bytes], bytes]:
    return sealed(lambda a, _: a.update({f"tttc.{n}": x for n, x in about.items()}))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[bytes], bytes]:
    return sealed(lambda _, t: change(t))


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


W, S = "weights.W1", "summed.S.W1"  # of Titans
REFUSED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    # no file of tensors
    "empty": (lambda _: b"", "it has 0 bytes"),
    "seven bytes": (lambda c: c[:7], "it has 7 bytes"),
    "a pickle": (lambda _: pickle.dumps(Mischief()), "no file of tensors"),
    "a file of torch.save": (torch_saved, "no file of tensors"),
    "text": (lambda _: b"import os\nos.system('true')\n", "more than any has"),
    "a header without end": (raw(b"{}", 2**63), "more than any has"),
    "a header longer than the file": (raw(b"{}", 5000), "its header alone would have 5000"),
    "a header of no bytes": (raw(b""), "no JSON"),
    "a header of other letters": (raw(b"\xff\xfe{}"), "no JSON"),
    "a header of Python": (raw(b"__import__('os')"), "no JSON"),
    "a header that nests without end": (raw(b'{"a":' * 100_000), "no JSON"),
    "a number of ten thousand digits": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "no JSON"),
    "a list": (raw(b"[1, 2]"), "its header is a list"),
    "a name twice": (raw(b'{"a": 1, "a": 2}'), "says 'a' twice"),
    # truncated, or more than it says
    "one byte less": (lambda c: c[:-1], "its tensors would have"),
    "half of it": (lambda c: c[: len(c) // 2], "no file of tensors, or not all of it"),
    "cut in the header": (lambda c: c[:100], "its header alone would have"),
    "one byte more": (lambda c: c + b"\0", "its tensors would have"),
    "metadata that are a list": (in_header(lambda h: h.update(__metadata__=[1])), "metadata are not texts"),
    "metadata that are numbers": (in_header(lambda h: h["__metadata__"].update(a=1)), "metadata are not texts"),
    "a tensor that is a number": (in_header(lambda h: h.update(a=1)), "something else than dtype"),
    "a tensor without a shape": (in_header(lambda h: h[W].pop("shape")), "something else than dtype"),
    "a tensor with code": (of_tensor(W, code="exec"), "something else than dtype"),
    "integers": (of_tensor(W, dtype="I64"), "has the dtype 'I64'"),
    "a dtype that is a list": (of_tensor(W, dtype=["F64"]), "has the dtype"),
    "a negative size": (of_tensor(W, shape=[-2, -2, 3, 4]), r"has the shape \[-2"),
    "a size that is true": (of_tensor(W, shape=[True, 2, 3, 4]), r"has the shape \[True"),
    "a size that is a fraction": (of_tensor(W, shape=[2.0, 2, 3, 4]), r"has the shape \[2.0"),
    "a size beyond all memory": (of_tensor(W, shape=[2**62, 2**62, 0]), r"has the shape \[4611"),
    "a shape of other bytes": (of_tensor(W, shape=[2**40]), "has 8796093022208 bytes"),
    "bytes that end before they begin": (of_tensor(W, data_offsets=[8, 0]), r"are from \[8, 0\]"),
    "bytes of three ends": (of_tensor(W, data_offsets=[0, 8, 16]), r"are from \[0, 8, 16\]"),
    "bytes of another tensor": (in_header(lambda h: h[W].update(data_offsets=h[S]["data_offsets"])), "those before it"),
    "bytes beyond the end": (
        in_header(lambda h: h[W].update(data_offsets=[n + 2**30 for n in h[W]["data_offsets"]])),
        "those before it",
    ),
    # tampered
    "a bit": (flipped, "changed after it was written"),
    "another position": (in_header(lambda h: h["__metadata__"].update({"tttc.positions": "[2]"})), "changed after"),
    "another digest": (in_header(lambda h: h["__metadata__"].update({"tttc.digest": "0" * 64})), "changed after"),
    "a note more": (in_header(lambda h: h["__metadata__"].update(a="b")), "changed after"),
    "names exchanged": (
        in_header(lambda h: h.update({W: h["start.W1"], "start.W1": h[W]})),
        "changed after",
    ),
    "no checksum": (in_header(lambda h: h["__metadata__"].pop("tttc.sha256")), "noted is missing"),
    # another version, kind or layer
    "a file of weights": (sealed(lambda about, _: about.clear()), "no tttc.format: it is no state of tttc"),
    "a later format": (said(format="2", version="9.0"), "its format is '2', written by tttc 9.0; this is tttc"),
    "a pack": (said(kind="PackedState"), "Load it with PackedState.load"),
    "another kind": (said(kind="Model"), "it holds a Model, asked for is a State"),
    "another declaration": (
        said(digest="0" * 64, variant="Mine"),
        "of another declaration, `Mine`, not of this `Titans`",
    ),
    "other dims": (said(digest="0" * 64, dims='{"D": 5}'), r'with dims {"D": 5}, this layer has {"D": 3'),
    "another way to keep a mini-batch": (said(decode="rows"), 'Compile the layer with decode="rows"'),
    # not what a state is
    "no position": (sealed(lambda about, _: about.pop("tttc.positions")), "does not say where"),
    "a position that is code": (said(positions="__import__('os')"), "does not say where"),
    "a negative position": (said(positions="[-1]"), "does not say where"),
    "two positions": (said(positions="[3, 3]"), "does not say where"),
    "a position past the mini-batch": (said(positions="[4]"), "it stands 4 tokens into a mini-batch of 4"),
    "tokens that a state does not count": (said(seen="7"), "does not say where"),
    "weights missing": (tensors(lambda t: t.pop(W)), f"`{W}` is missing"),
    "a sum missing": (tensors(lambda t: t.pop(S)), f"`{S}` is missing"),
    "memory missing": (
        tensors(lambda t: [t.pop(n) for n in list(t) if n.startswith("memory")]),
        "`memory.* is missing",
    ),
    "an unknown state": (tensors(lambda t: t.update({"weights.W9": t[W]})), "it has no `weights.W9`"),
    "an unknown group": (tensors(lambda t: t.update({"hooks.W1": t[W]})), "it has no `hooks.W1`"),
    "a name without a group": (tensors(lambda t: t.update(W1=t[W])), "it has no `W1`"),
    "convolution rows": (tensors(lambda t: t.update(taps=t[W])), "`taps` has the shape"),
    "other sizes": (tensors(lambda t: t.update({S: t[S].mT})), f"`{S}` has the shape"),
    "another batch": (tensors(lambda t: t.update({S: t[S][:1]})), f"`{S}` has the shape"),
    "another number of heads": (tensors(lambda t: t.update({S: t[S][:, :1]})), f"`{S}` has the shape"),
    "no batch": (tensors(lambda t: t.update({W: t[W][0, 0]})), f"`{W}` has the shape"),
    "one number": (tensors(lambda t: t.update({W: t[W].sum()})), f"`{W}` has the shape"),
}


def test_what_is_no_state_of_the_layer_is_refused_with_the_reason(tmp_path: Path) -> None:
    sequences = Sequences("Titans")
    layer = sequences.layer
    _, state = sequences.call(slice(0, 7))
    content = state.save(tmp_path / "whole", layer).read_bytes()
    path = tmp_path / "changed"
    path.write_bytes(sealed(lambda *_: None)(content))
    same(State.load(path, layer), state)  # what the changes below are made by changes nothing itself
    for name, (change, reason) in REFUSED.items():
        path.write_bytes(change(content))
        with pytest.raises(FileRefused, match=reason) as refused:
            State.load(path, layer)
        assert re.match(rf"{re.escape(str(path))}: .+\n  .+", str(refused.value)), name  # what, and the way out
    assert not Mischief.done
    with pytest.raises(OSError, match="No such file"):
        State.load(tmp_path / "none", layer)
