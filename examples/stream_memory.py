"""Stream a memory token by token, save it in the middle, and go on in another program as if nothing had happened.

    python -m examples.stream_memory

What a sequence has left behind is a `State` of constant size: the fast weights, and what an open mini-batch needs.
Reading one token at a time gives what reading all at once gives. Takes a few seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import tttc
from tttc.library import TTTLinear

Tokens = dict[str, torch.Tensor]


def drawn(tokens: int, width: int) -> Tokens:
    """One sequence: q, k, v [1, T, 1, D] and the rates lr, tau [1, T, 1]."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(1, tokens, 1, width, generator=generator) for name in ("q", "k", "v")}
    return made | {name: torch.rand(1, tokens, 1, generator=generator) / width for name in ("lr", "tau")}


def read(layer: tttc.Layer, x: Tokens, state: Any = None) -> tuple[torch.Tensor, Any]:
    return layer(x["q"], x["k"], x["v"], gates={"lr": x["lr"], "tau": x["tau"]}, state=state)


def main(tokens: int = 50, width: int = 16) -> None:
    layer = tttc.compile(TTTLinear, dims={"D": width}, backend="torch")
    sequence = drawn(tokens, width)
    whole, _ = read(layer, sequence)

    outputs: list[torch.Tensor] = []
    state = None  # the weights as they are declared
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for t in range(tokens):
            z, state = read(layer, {name: x[:, t : t + 1] for name, x in sequence.items()}, state)
            outputs.append(z)
            if t == tokens // 2:  # in the middle of a mini-batch of 16
                file = state.save(Path(folder) / "memory.safetensors", layer)
                state = tttc.State.load(file, layer)
                print(f"after {t + 1} tokens: {state}, {file.stat().st_size:,} bytes on disk")

    error = (torch.cat(outputs, 1) - whole).abs().max().item()
    print(f"{tokens} tokens one by one, saved and loaded on the way: {error:.1e} from all at once")
    assert error < 1e-5


if __name__ == "__main__":
    main()
