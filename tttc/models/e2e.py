"""TTT-E2E (arXiv:2512.23675): a transformer with windowed attention whose last blocks learn from what they read.

    from tttc.models import e2e

    model = e2e.build(e2e.small(vocab=256))     # or PAPER_125M, or Config(...); a tttc.nn.EndToEnd
    model(tokens).loss.backward()               # tokens [B, T + 1]
    text = model.generate(tokens, 100)

Blocks are those of `tttc.models.blocks`: pre and post RMSNorm, QK-RMSNorm, interleaved RoPE, SwiGLU, no biases. The
last `suffix` of them have a second SwiGLU MLP, `prime`, between attention and feed-forward; its three matrices are the
fast weights, and everything else is slow. The embedding is also the output matrix.

Dtypes: parameters, fast weights and the stream between blocks are float32, unless the model is moved. With
`compute=torch.bfloat16` the matrix products are in bfloat16, of weights cast where they are used, and caches hold
bfloat16; norms, rotation, softmax, cross-entropy and the inner update stay in float32.

Values begin as normal ones: matrices with the deviation 0.5 / sqrt(width), 0.018 at 768, the embedding with
1 / sqrt(width), so that logits begin near one; norms begin at one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tttc.declare.update_rules import clip_norm, sgd
from tttc.errors import ShapeError
from tttc.models.blocks import GatedMLP, KeysValues, Linear, Norm, Shape, WindowBlock, joined, last, owned
from tttc.models.window import rotation
from tttc.networks.end_to_end import EndToEnd

Caches = Sequence[KeysValues]

_PIECE = 512  # tokens that a prefix block takes at a time


@dataclass(frozen=True)
class Config:
    """Sizes and options of a model; the defaults are those of the paper's 125M model.

    Args:
        vocab: tokens are whole numbers in [0, vocab).
        width, heads: of the stream, and of attention; width / heads is even.
        blocks, suffix: how many blocks there are, and how many of them, the last ones, learn.
        ffn, prime: hidden units of the SwiGLU MLPs, the slow ones and those that learn.
        window: how many tokens a query sees, itself included. chunk: how many tokens share an inner step.
        theta, eps: of the rotation and of the norms.
        compute: dtype of matrix products; None: that of the parameters.
        checkpoint: blocks of the prefix keep nothing inside for the backward, which runs them again.
        lr, clip, momentum: of the inner step; clip=None: no clipping.

    Raises:
        ShapeError: sizes that do not fit together; the message lists all.
    """

    vocab: int
    width: int = 768
    heads: int = 12
    blocks: int = 12
    suffix: int = 3
    ffn: int = 1664
    prime: int = 1664
    window: int = 8192
    chunk: int = 1024
    theta: float = 500_000.0
    eps: float = 1e-6
    compute: torch.dtype | None = None
    checkpoint: bool = True
    lr: float = 1.0
    clip: float | None = 1.0
    momentum: float | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab", "width", "heads", "blocks", "suffix", "ffn", "prime", "window", "chunk")
        wrong = [f"{n} is {getattr(self, n)!r}, not a whole number from 1" for n in sizes if not self._is_size(n)]
        if not wrong:
            if self.width % (2 * self.heads):
                wrong.append(f"width {self.width} is not {self.heads} heads of an even number of channels")
            if self.suffix > self.blocks:
                wrong.append(f"suffix is {self.suffix} of {self.blocks} blocks")
        if wrong:
            raise ShapeError("tttc.models.e2e.Config:\n" + "\n".join(f"  - {w}" for w in wrong))

    def _is_size(self, name: str) -> bool:
        size = getattr(self, name)
        return isinstance(size, int) and not isinstance(size, bool) and size >= 1

    @property
    def shape(self) -> Shape:
        return Shape(self.width, self.heads, self.ffn, self.window, self.eps, self.compute)


PAPER_125M = Config(vocab=128_256, compute=torch.bfloat16)
"""The paper's 125M model, with the vocabulary of Llama 3. MLPs have 1,664 hidden units, 2,048 without those that learn.
The paper warms the inner rate up from 0.1 to 1 over the first tenth of training, as `rate=` does. How it draws its
weights is not taken over.
"""


def small(**changes: Any) -> Config:
    """A model for tests and for a processor: 3 blocks of width 64, two of which learn; `changes` as in `Config`."""
    sizes: dict[str, Any] = dict(vocab=64, width=64, heads=4, blocks=3, suffix=2, ffn=64, prime=128)
    return Config(**{**sizes, "window": 32, "chunk": 32, "theta": 10_000.0, **changes})


def build(
    config: Config, learn: bool = True, prime: Callable[[int, int], nn.Module] | None = None, **options: Any
) -> EndToEnd:
    """The model, with values drawn from torch's default generator.

    Args:
        learn: False: the same network without learning, a baseline: fast weights are weights as any other.
        prime: makes another MLP that learns, of a width and a number of hidden units, in the place of SwiGLU; it draws
            its own values, is mapped over, and differentiated twice:
            `lambda width, hidden: tttc.nn.Learner(MyVariant, dims={"D": width, "F": hidden})`.
        options: `device` and `dtype` of the parameters, and those of `tttc.nn.EndToEnd`: `fast`, if not all of prime
            learns, `update` in the place of what `config` says, `backward`, `keep`, `check`.
    """
    made = {n: options.pop(n) for n in ("device", "dtype") if n in options}
    prefix = Prefix(config, **made)
    suffix = Suffix(config, prefix.embedding, twice=learn, prime=prime, **made)
    stages = () if config.clip is None else (clip_norm(config.clip, scope="all"),)
    update = sgd(lr=config.lr, momentum=config.momentum, at_end=stages)
    options = {"fast": "*.prime.*", "chunk": config.chunk, "update": update, **options}
    return EndToEnd(prefix, suffix, **(options if learn else options | {"update": None}))


class Prefix(nn.Module):
    """tokens [B, t], caches -> h [B, t, width], caches: the embedding, and the blocks that do not learn.

    More tokens than a piece are taken piece by piece, so that what is alive at a time does not grow with them.
    """

    def __init__(self, config: Config, **made: Any) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width, **made)
        self.blocks = nn.ModuleList(WindowBlock(config.shape, **made) for _ in range(config.blocks - config.suffix))
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        _draw(self.blocks, config)

    def forward(self, tokens: Tensor, caches: Caches | None = None) -> tuple[Tensor, Caches]:
        x, new = self.embedding(tokens), []
        turns = _turns(self.config, caches, x, min(_PIECE, x.shape[1]))
        for i, block in enumerate(self.blocks):
            past = None if caches is None else caches[i]
            run = self._whole if x.shape[1] <= _PIECE else self._in_pieces
            x, seen = run(block, x, past, turns)
            new.append(seen)
        return x, new

    def _whole(self, block: Any, x: Tensor, past: KeysValues | None, turns: Tensor) -> tuple[Tensor, KeysValues]:
        return self._kept(block)(x, past, turns)

    def _in_pieces(self, block: Any, x: Tensor, past: KeysValues | None, turns: Tensor) -> tuple[Tensor, KeysValues]:
        pieces = x.split(_PIECE, 1)
        make, read = self._kept(block.keys_values), self._kept(block.read)
        parts = [] if past is None else [past]
        out = []
        for piece in pieces:
            parts = [*_needed(parts, self.config.window - 1), make(piece)]
            out.append(read(piece, parts, turns))
        return torch.cat(out, 1), owned(last(joined(parts), self.config.window))

    def _kept(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, of which autograd keeps the arguments alone if the configuration says so."""
        if not (self.config.checkpoint and torch.is_grad_enabled()):
            return function
        return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


class Suffix(nn.Module):
    """h [B, t, width], caches -> logits [B, t, vocab], caches: the blocks that learn, the last norm, and the output
    matrix, which is the embedding. `prime`: as for `build`.
    """

    def __init__(
        self,
        config: Config,
        embedding: nn.Embedding,
        twice: bool = True,
        prime: Callable[[int, int], nn.Module] | None = None,
        **made: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList()
        for _ in range(config.suffix):
            mlp = (GatedMLP if prime is None else prime)(config.width, config.prime).to(**made)
            self.blocks.append(WindowBlock(config.shape, mlp, twice, **made))
        _draw(self.blocks, config)
        self.norm = Norm(config.width, config.eps, config.compute, **made)
        self.head = Linear(config.width, config.vocab, device="meta")
        self.head.weight = embedding.weight

    def forward(self, h: Tensor, caches: Caches | None = None) -> tuple[Tensor, Caches]:
        turns, new = _turns(self.config, caches, h, h.shape[1]), []
        for i, block in enumerate(self.blocks):
            h, seen = block(h, None if caches is None else caches[i], turns)
            new.append(seen)
        return self.head(self.norm(h)), new


@torch.no_grad()
def _draw(blocks: nn.ModuleList, config: Config) -> None:
    for module in blocks.modules():
        if isinstance(module, Linear):
            nn.init.normal_(module.weight, std=0.5 * config.width**-0.5)


def _turns(config: Config, caches: Caches | None, x: Tensor, tokens: int) -> Tensor:
    """The rotation at all positions that a call with so many tokens at a time has, from that of the oldest key."""
    past = 0 if not caches else min(caches[0][0].shape[2], config.window - 1)
    if x.shape[1] > tokens:  # which come after one another
        past = config.window - 1
    return rotation(past + tokens, config.width // config.heads, config.theta, x)


def _needed(parts: list[KeysValues], count: int) -> list[KeysValues]:
    """The last of consecutive parts, as few as hold `count` tokens."""
    sizes = [k.shape[2] for k, _ in parts]
    first = len(parts)
    while first > 0 and sum(sizes[first:]) < count:
        first -= 1
    return parts[first:]
