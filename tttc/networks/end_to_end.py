"""`tttc.nn.EndToEnd`: a network some of whose weights learn at test time, from its own next-token loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tttc.declare.number import whole
from tttc.declare.update_rules import SGD, clip_norm, sgd
from tttc.errors import DeclarationError, NonFinite, ShapeError, StateMismatch
from tttc.explain.network import explain_network
from tttc.networks.causality import check_causal
from tttc.networks.chunk_loss import ChunkLoss
from tttc.networks.decoding import NetworkState, continued
from tttc.networks.documents import Documents
from tttc.networks.inference import outside_inference
from tttc.networks.inner_update import FastWeights, InnerUpdate
from tttc.networks.passes import Learning, by_graph, by_sweep, chunks
from tttc.networks.sampling import sampled

BACKWARDS = ("sweep", "graph")


@dataclass(frozen=True)
class Output:
    """Of a call: `loss`, the mean of the chunks' losses, whose backward is the meta-gradient; `nll` [B, T], of each
    token, in nats, 0 where it does not count; `chunks` [B, n], the mean loss of each chunk before its update.
    """

    loss: Tensor
    nll: Tensor
    chunks: Tensor


class EndToEnd(nn.Module):
    """A network whose last blocks learn while they read (TTT-E2E, arXiv:2512.23675).

    `prefix` runs once over the sequence, `suffix` chunk by chunk. What the suffix loses on a chunk, predicting its next
    tokens, is differentiated for the fast weights, which take a step of `update` before the next chunk:

        L_i = mean next-token loss of chunk i at W_i;   W_{i+1} = W_i - rate * lr * stage(d L_i / d W_i)

    The loss is the mean of L_i, and its gradient goes through every step: parameters are trained to be what learning
    starts well from. Both modules are the user's own:

        prefix(tokens [B, t], caches) -> h [B, t, d], caches          caches is None where a sequence begins
        suffix(h, caches)             -> logits [B, t, V], caches

    Caches are tensors with the batch first, in any dicts, lists and tuples; a call with those of the last one continues
    its sequences by any number of tokens. They are constants for the inner gradient, and differentiated by the outer
    one. The suffix is mapped over sequences by `torch.vmap` and differentiated twice.

    Args:
        prefix, suffix: as above; `tttc.models.e2e` has ready ones.
        fast: a pattern, or several, of the names of parameters of the suffix (`fnmatch`: * matches anything).
            These parameters are what every sequence begins with; each sequence learns its own, in float32 at least.
        chunk: b, the tokens that share one step. T need not be a multiple: the open chunk is kept.
        update: as declared for a layer, by `tttc.sgd`; stages that act on updates see them at rate one. Rates are
            numbers or `tttc.param` (trained by the outer loop), or dicts of these by pattern. None: a network that does
            not learn, chunk by chunk.
        backward: "sweep" computes the meta-gradient in the memory of one chunk, and only once; "graph" is its
            definition, in which autograd keeps every step, for small sizes and for derivatives of the gradient.
        keep: of the sweep: fast weights and caches are kept at every `keep`-th chunk, and computed again between.
        check: raise where a loss is not finite.

    Raises:
        DeclarationError: a pattern matches nothing, the rule has no meaning for a network, or a module is not causal.
        ShapeError: tokens that are not [B, T + 1] whole numbers, or T = 0.
        NonFinite: with `check=True`, a loss that is not finite.

    Example:
        model = tttc.nn.EndToEnd(prefix, suffix, fast="*.prime.*", chunk=256)
        out = model(tokens)                     # [B, T + 1]
        out.loss.backward()
        state = model.prefill(tokens)
        logits, state = model.decode(token, state)
    """

    def __init__(
        self,
        prefix: nn.Module,
        suffix: nn.Module,
        fast: str | Sequence[str] = "*.prime.*",
        chunk: int = 1024,
        update: SGD | None = sgd(lr=1.0, at_end=clip_norm(1.0, scope="all")),  # noqa: B008  (a frozen value)
        *,
        backward: str = "sweep",
        keep: int = 1,
        check: bool = False,
    ) -> None:
        super().__init__()
        self.chunk, self.keep = _positive("chunk", chunk), _positive("keep", keep)
        if backward not in BACKWARDS:
            raise DeclarationError(f"EndToEnd: backward is {backward!r}.\n  It is one of {', '.join(BACKWARDS)}.")
        self.prefix, self.suffix = prefix, suffix
        self.fast, self.backward, self.check = fast, backward, check
        loss = self._loss
        self.update = None if update is None else InnerUpdate(update, loss.fast)
        like = next(iter(loss.weights().values()))
        self.rates = nn.ParameterDict() if self.update is None else nn.ParameterDict(self.update.initial_rates(like))
        self._causal = False

    @outside_inference
    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, cu_seqlens: Any = None, rate: float | Tensor = 1.0
    ) -> Output:
        """The network's losses on its own next tokens.

        Args:
            tokens: [B, T + 1], whole numbers; token t + 1 is what token t is to predict.
            mask: [B, T], whether a prediction counts. Default: all do. Others are read, and teach nothing.
            cu_seqlens: [N + 1], where documents packed along the time axis of tokens [1, total] begin and end. Each is
                a sequence of its own, that begins with the weights of all; nothing predicts across a border.
            rate: scales the learning rates of the inner loop, which is warmed up over the steps of the outer one.

        Returns:
            `Output` with loss, nll [B, T] and chunks [B, n].
        """
        documents = Documents.of(tokens, mask, cu_seqlens)
        self._causal = self._causal or check_causal(self.prefix, self.suffix, documents.inputs)
        hidden, _ = self.prefix(documents.inputs, None)
        parts = chunks(hidden, documents.targets, documents.counts, self.chunk)
        fast, learning = self._begin(len(hidden)), self._learning(rate)
        recorded = torch.is_grad_enabled()
        if self.backward == "sweep" and self.update is not None and recorded:
            losses, nll = by_sweep(learning, fast, parts, hidden, self.keep)
        else:
            losses, nll = by_graph(learning, fast, parts)
        asked = documents.asked(self.chunk)
        if self.check:
            _refuse_not_finite(losses, self.chunk)
        return Output((losses * asked).sum() / asked.sum().clamp_min(1), documents.packed(nll), losses)

    @outside_inference
    def prefill(self, tokens: Tensor, *, rate: float = 1.0) -> NetworkState:
        """The state after tokens [B, T], T >= 1, which begin sequences; `state.logits` [B, V] are of what follows."""
        tokens = _checked_tokens(tokens)
        return continued(self, tokens, self._start(len(tokens)), rate)

    @outside_inference
    def decode(self, token: Tensor, state: NetworkState, *, rate: float = 1.0) -> tuple[Tensor, NetworkState]:
        """One token further: token [B] -> logits [B, V] of what follows it, and the state. Several, [B, t], are taken
        one after the other, and the logits are of the last. Fast weights take a step where a chunk has ended.
        """
        tokens = _checked_tokens(token[:, None] if token.dim() == 1 else token)
        if len(tokens) != state.batch:
            what = f"EndToEnd: there are tokens for {len(tokens)} sequences, the state is of {state.batch}"
            raise StateMismatch(f"{what}.\n  Pass the state that a call with as many returned.")
        state = continued(self, tokens, state, rate)
        return state.logits, state

    def generate(
        self,
        tokens: Tensor,
        new: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        state: NetworkState | None = None,
    ) -> Tensor:
        """`new` tokens after tokens [B, T], drawn one by one: [B, T + new]. `temperature=0` takes the likeliest;
        `state`: what the sequences have read before `tokens`.
        """
        return sampled(self, tokens, new, temperature, top_k, generator, state)

    @property
    def learns(self) -> bool:
        """Whether there is an inner loop at all."""
        return self.update is not None

    @property
    def _loss(self) -> ChunkLoss:
        """The suffix as it is now: modules may be moved, cast or replaced."""
        return ChunkLoss(self.suffix, self.fast)

    def fast_weights(self) -> dict[str, Tensor]:
        """The parameters that sequences begin with, by their names in the suffix."""
        return self._loss.weights()

    def explain(self, tokens: int | None = None) -> str:
        """Which weights are fast, how they learn, what a training step costs and keeps, as a text; for sequences of
        `tokens` tokens, by default four chunks.
        """
        return explain_network(self, 4 * self.chunk if tokens is None else tokens)

    def described(self) -> dict[str, Any]:
        """What a state has to fit: the chunk, the fast weights by name, and what their update carries."""
        with torch.device("meta"):
            empty = {n: torch.empty(1, *w.shape, dtype=_wide(w.dtype)) for n, w in self._loss.weights().items()}
            fast = FastWeights(empty) if self.update is None else self.update.begin(empty)
        groups = {n: x for n, x in vars(fast).items() if n != "begun"}
        carried = {g: {n: [str(x.dtype), *x.shape[1:]] for n, x in own.items()} for g, own in groups.items()}
        return {"chunk": self.chunk, **carried}

    def _learning(self, rate: float | Tensor) -> Learning:
        loss = self._loss
        return Learning(loss, self.update, loss.slow(), rate, dict(self.rates.items()))

    def _begin(self, batch: int) -> FastWeights:
        """What each of `batch` sequences begins with, in float32 at least."""
        if self.update is None:
            return FastWeights({})
        weights = self._loss.weights()
        return self.update.begin({n: w.to(_wide(w.dtype)).expand(batch, *w.shape) for n, w in weights.items()})

    def _start(self, batch: int) -> NetworkState:
        return NetworkState(self._begin(batch), self.chunk, batch)

    def extra_repr(self) -> str:
        rule = "update=None" if self.update is None else ", ".join(s.label for s in self.update.rule.at_end) or "sgd"
        return f"fast={self.fast!r}, chunk={self.chunk}, {rule}, backward={self.backward!r}, keep={self.keep}"


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Fast weights add up many small steps."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def _positive(name: str, value: Any) -> int:
    n = whole(value)
    if n is None or n < 1:
        raise DeclarationError(f"EndToEnd: {name} is {value!r}.\n  It is a positive int.")
    return n


def _checked_tokens(tokens: Tensor) -> Tensor:
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.shape[1] == 0:
        what = f"EndToEnd: tokens are {tokens.dtype} of the shape {list(tokens.shape)}"
        raise ShapeError(f"{what}, expected whole numbers [B, T] with T >= 1.\n  Begin with a token, such as <bos>.")
    return tokens


def _refuse_not_finite(losses: Tensor, chunk: int) -> None:
    bad = (~losses.detach().isfinite()).nonzero()
    if len(bad) == 0:
        return
    i, k = min(bad.tolist(), key=lambda at: at[1])
    before = "the weights were the network's own" if k == 0 else f"{k} inner steps had been taken"
    raise NonFinite(
        f"EndToEnd: the loss of sequence {i} is {losses[i, k].item()} in chunk {k}, from token {k * chunk} on; "
        f"{before}.\n"
        "  Lower the inner learning rate, pass rate= below 1 while the outer loop begins, or clip: "
        'at_end=tttc.clip_norm(1.0, scope="all").'
    )
