"""Small byte-level language models that compare variants on text every machine has: Python's own library.

`train` trains one model per variant, all of the same hidden size and depth and of nearly the same number of
parameters, on the same batches; `bigram_bits_per_byte` is the yardstick that a model of sequences has to
beat. Everything here is a matter of minutes on a CPU: it shows that the layers learn, and is no statement
about which of them is best at scale.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from tttc.declare.variant import Variant
from tttc.errors import NonFinite
from tttc.library import TTTMLP, LinearAttention, TTTLinear
from tttc.nn.layer import TTT

# Tests quote odd bytes, and the tables (character sets, help topics) are no prose.
_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
_VALIDATION_SHARE = 0.1
_BYTES = 256


@dataclass(frozen=True)
class Corpus:
    """Text as bytes (int64 0..255): one training stream [N], and validation windows [windows, tokens + 1]."""

    train: Tensor
    validation: Tensor


@dataclass(frozen=True)
class Size:
    """What all compared models have in common; `feed_forward` grows where a variant has fewer parameters."""

    hidden: int = 128
    heads: int = 2
    layers: int = 2
    feed_forward: int = 256
    conv_kernel: int = 4
    tokens: int = 128
    batch: int = 4


class CurvePoint(NamedTuple):
    """One place on a learning curve."""

    step: int
    bits_per_byte: float


@dataclass(frozen=True)
class Curve:
    """How one variant's model learned."""

    name: str
    parameters: int
    steps: int
    train: list[CurvePoint] = field(repr=False)
    """One point per step, on that step's batch."""
    validation: list[CurvePoint] = field(repr=False)
    """On `Corpus.validation`, from before the first step to after the last."""
    seconds: float
    """Time spent in training steps, without compilation and validation."""
    tokens_per_second: float

    @property
    def bits_per_byte(self) -> float:
        """On the validation windows, at the end."""
        return self.validation[-1].bits_per_byte


def read_corpus(root: Path | None = None, *, tokens: int = Size.tokens, windows: int = 64) -> Corpus:
    """The .py files below `root`, by default Python's own standard library, in the order of their paths.

    A file belongs to training or to validation by a hash of its relative path, so that neither the order nor
    the other files matter. The validation windows of `tokens` + 1 bytes are spread evenly over the validation
    files.

    Raises:
        FileNotFoundError: there is too little source text, as in a Python that ships its library compiled.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED.isdisjoint(relative.parts):
            parts[_is_validation(relative.as_posix())].append(path.read_bytes())
    train, validation = _as_bytes(b"".join(parts[False])), _as_bytes(b"".join(parts[True]))
    if min(len(train), len(validation)) <= tokens:
        raise FileNotFoundError(
            f"{root} has {len(train)} bytes of training text and {len(validation)} of validation text in .py "
            f"files; windows of {tokens} + 1 bytes need more.\n"
            f"  Pass a folder with Python sources: read_corpus(root)."
        )
    starts = torch.linspace(0, len(validation) - tokens - 1, windows, dtype=torch.float64).long()
    return Corpus(train, _windows(validation, starts, tokens))


def _is_validation(name: str) -> bool:
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return first < _VALIDATION_SHARE * 2**32


def _as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long() if text else torch.zeros(0, dtype=torch.long)


def _windows(stream: Tensor, starts: Tensor, tokens: int) -> Tensor:
    """[len(starts), tokens + 1]: each window and the byte that follows it."""
    return stream[starts[:, None] + torch.arange(tokens + 1)]


def bigram_bits_per_byte(corpus: Corpus, k: float = 0.1) -> float:
    """The validation windows under p(next | byte) = (count + k) / (total + 256 k), counted in training."""
    pairs = corpus.train[:-1] * _BYTES + corpus.train[1:]
    counts = torch.bincount(pairs, minlength=_BYTES**2).view(_BYTES, _BYTES).double() + k
    bits = -torch.log2(counts / counts.sum(1, keepdim=True))
    return float(bits[corpus.validation[:, :-1], corpus.validation[:, 1:]].mean())


class SwiGLU(nn.Module):
    """(silu(x Wg) * (x Wu)) Wd (arXiv:2002.05202), bias-free."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TransformerBlock(nn.Module):
    """x + TTT(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, variant: type[Variant], size: Size, feed_forward: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(size.hidden, eps=1e-6)
        # Windows are short: keeping every chunk's values for the backward costs little memory and saves time.
        self.mixer = TTT(variant, size.hidden, size.heads, conv_kernel=size.conv_kernel, checkpoint=None)
        self.mlp_norm = nn.RMSNorm(size.hidden, eps=1e-6)
        self.mlp = SwiGLU(size.hidden, feed_forward)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class ByteModel(nn.Module):
    """A language model over bytes, [B, T] in 0..255 -> logits [B, T, 256] for the next; the head is tied."""

    def __init__(self, variant: type[Variant], size: Size, feed_forward: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_BYTES, size.hidden)
        self.blocks = nn.Sequential(*(TransformerBlock(variant, size, feed_forward) for _ in range(size.layers)))
        self.norm = nn.RMSNorm(size.hidden, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        # The head is the embedding: with rows of length about 1 the first logits are of order 1.
        nn.init.normal_(self.embedding.weight, std=size.hidden**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.norm(self.blocks(self.embedding(tokens))), self.embedding.weight)

    def bits_per_byte(self, windows: Tensor) -> Tensor:
        """Mean over the windows [B, T + 1] of -log2 p(byte | the bytes before it in the window)."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)


def matched_widths(variants: Sequence[type[Variant]], size: Size) -> list[int]:
    """A feed-forward width per variant that brings all models to nearly the same number of parameters."""

    def count(variant: type[Variant], width: int) -> int:
        with torch.device("meta"):
            return _parameters(ByteModel(variant, size, width))

    counts = [count(variant, size.feed_forward) for variant in variants]
    per_unit = 3 * size.hidden * size.layers
    return [size.feed_forward + round((max(counts) - c) / per_unit) for c in counts]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def train(
    variants: Sequence[type[Variant]] = (TTTLinear, TTTMLP, LinearAttention),
    steps: int = 400,
    seconds: float | None = None,
    seed: int = 0,
    progress: bool = True,
    *,
    corpus: Corpus | None = None,
    size: Size | None = None,
    learning_rate: float = 6e-3,
    validations: int = 8,
    device: torch.device | str = "cpu",
) -> list[Curve]:
    """Train one model per variant and return their learning curves, in the order of `variants`.

    On a CPU, torch uses one thread meanwhile: tensors this small gain nothing from a second one, and lose much
    where another program wants that core. The result is then the same at every run on one machine.

    Args:
        variants: the declarations to compare.
        steps: optimiser steps for each.
        seconds: about how long all of it may take. Fewer steps are made, the same number for every variant, if
            by the time that a few of them take `steps` would not fit.
        seed: of the initial weights and of the batches, which are the same for every variant.
        progress: show a bar with the variant, the step, the loss and the time left.
        corpus: default `read_corpus()`.
        size: default `Size()`.
        learning_rate: the highest; reached after a warm-up over the first 5 %, then a cosine down to a tenth.
        validations: how often the validation windows are measured on the way; less often if `seconds` are few.
        device: where to train.

    Raises:
        NonFinite: a gradient is not finite.
    """
    size = Size() if size is None else size
    corpus = read_corpus(tokens=size.tokens) if corpus is None else corpus
    corpus = Corpus(corpus.train, corpus.validation.to(device))
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bits]:.2f} bits/byte"),
        TimeRemainingColumn(),
    )
    # A thread that redraws on its own would compete with the training.
    with one_thread(), Progress(*columns, disable=not progress, auto_refresh=False) as bar:
        trainers = []
        with torch.random.fork_rng(devices=[]):
            for variant, width in zip(variants, matched_widths(variants, size), strict=True):
                torch.manual_seed(seed)
                model = ByteModel(variant, size, width).to(device)
                trainers.append(_Trainer(model, corpus, size, seed))
        if seconds is not None:
            steps, validations = _within(seconds, trainers, steps, validations)
        curves = []
        for variant, trainer in zip(variants, trainers, strict=True):
            row = bar.add_task(variant.__name__, total=steps, bits=math.log2(_BYTES))
            shown = partial(bar.update, row, refresh=True)
            curves.append(_learn(variant.__name__, trainer, steps, learning_rate, validations, shown))
    return curves


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch meanwhile: what small tensors want, and what gives times that hold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Trainer:
    """A model with its optimiser and its source of batches."""

    def __init__(self, model: ByteModel, corpus: Corpus, size: Size, seed: int) -> None:
        self.model, self.corpus, self.size, self.seed = model, corpus, size, seed
        # Matrices decay; gains, biases, the embedding and the fast weights' start are left alone.
        matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        decayed = [p for p in model.parameters() if id(p) in matrices]
        others = [p for p in model.parameters() if id(p) not in matrices]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, rate: float) -> float:
        """One optimiser step on the next batch; returns the batch's bits per byte before it."""
        stream, tokens = self.corpus.train, self.size.tokens
        starts = torch.randint(len(stream) - tokens, (self.size.batch,), generator=self.generator)
        bits = self.model.bits_per_byte(_windows(stream, starts, tokens).to(self.corpus.validation.device))
        bits.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not norm.isfinite():
            raise NonFinite(
                f"training diverged: the loss is {bits.item()} and the gradient's norm {norm.item()}.\n"
                f"  Lower the learning rate, here {rate:g}."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return bits.item()

    @torch.no_grad()
    def validation(self) -> float:
        """Bits per byte over all validation windows."""
        parts = self.corpus.validation.split(32)
        total = sum(self.model.bits_per_byte(part).item() * len(part) for part in parts)
        return total / len(self.corpus.validation)

    def trial(self) -> _Trainer:
        """The same on a copy of the model, whose training leaves this one as it is."""
        return _Trainer(copy.deepcopy(self.model), self.corpus, self.size, self.seed)


def _within(seconds: float, trainers: Sequence[_Trainer], steps: int, validations: int) -> tuple[int, int]:
    """At most `steps` and `validations`, but no more than all trainers together can make in `seconds`."""
    began = time.perf_counter()
    per_step = per_validation = 0.0
    for trainer in trainers:
        trial = trainer.trial()
        trial.step(0.0)  # the first step of a layer compiles it
        per_step += min(_duration(partial(trial.step, 0.0)) for _ in range(3))
        per_validation += _duration(trial.validation)
    seconds -= time.perf_counter() - began
    # A curve of at least two points, for which a quarter of the time is enough.
    validations = max(1, min(validations, int(0.25 * seconds / per_validation) - 1))
    seconds -= (validations + 1) * per_validation
    return max(1, min(steps, int(seconds / per_step))), validations


def _duration(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _learn(
    name: str, trainer: _Trainer, steps: int, learning_rate: float, validations: int, shown: Callable[..., None]
) -> Curve:
    """Train to the end; `shown(completed=..., bits=...)` is told of every step."""
    trainer.trial().step(0.0)  # compiles, which is not training
    measured_at = {round(i * steps / validations) for i in range(1, validations + 1)}
    train: list[CurvePoint] = []
    validation = [CurvePoint(0, trainer.validation())]
    seconds = 0.0
    for step in range(1, steps + 1):
        warm_up = min(1.0, step / max(1.0, 0.05 * steps))
        cosine = 0.55 + 0.45 * math.cos(math.pi * (step - 1) / steps)
        began = time.perf_counter()
        train.append(CurvePoint(step, trainer.step(learning_rate * warm_up * cosine)))
        seconds += time.perf_counter() - began
        if step in measured_at:
            validation.append(CurvePoint(step, trainer.validation()))
        shown(completed=step, bits=train[-1].bits_per_byte)
    tokens = steps * trainer.size.batch * trainer.size.tokens
    return Curve(name, _parameters(trainer.model), steps, train, validation, seconds, tokens / seconds)
