"""Training a network that learns at test time, and the same network without learning, on equal batches."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tttc import terminal
from tttc.examples.networks.cycles import cycles
from tttc.examples.networks.wikipedia import read_text
from tttc.models import inner_rate
from tttc.networks.end_to_end import EndToEnd

LONGER = 4  # times the training length: where memory is measured


@dataclass(frozen=True)
class Task:
    """What is trained on: `batch(size, length, generator)` and `held_out(count, length)` are tokens [size, length].

    `unit` is what a token's loss is counted in, `per_nat` how many of them a nat is; `written` makes tokens [n] text,
    where they are some.
    """

    name: str
    unit: str
    per_nat: float
    batch: Callable[[int, int, torch.Generator], Tensor]
    held_out: Callable[[int, int], Tensor]
    written: Callable[[Tensor], str] | None = None


def random_cycles() -> Task:
    """Each sequence along a cycle of its own."""

    def held_out(count: int, length: int) -> Tensor:
        return cycles(count, length, torch.Generator().manual_seed(99))

    return Task("random cycles", "nats per token", 1.0, cycles, held_out)


def wikipedia() -> Task:
    """Bytes of articles; windows of other articles are held out."""
    text = read_text()

    def written(tokens: Tensor) -> str:
        return bytes(tokens.tolist()).decode(errors="replace")

    return Task("Wikipedia", "bits per byte", 1 / math.log(2), text.batch, text.windows, written)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: batches of `batch` sequences of `length` tokens that are predicted; and measured: on
    `held_out` sequences.
    """

    steps: int
    length: int = 256
    batch: int = 16
    learning_rate: float = 3e-3
    held_out: int = 32


class Trainer:
    """The outer loop: AdamW, its rate warmed up over the first tenth of the steps and lowered along a cosine; gradients
    clipped at norm one; the inner rate by `tttc.models.inner_rate`. Where processes share the work, each takes batches
    of its own, and gradients are averaged.
    """

    def __init__(self, model: EndToEnd, task: Task, recipe: Recipe, seed: int) -> None:
        shared = dist.is_initialized()
        self.model, self.task, self.recipe = model, task, recipe
        self.called: nn.Module = DistributedDataParallel(model) if shared else model
        rank, self.share = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        self.generator = torch.Generator().manual_seed(1000 * seed + rank)
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, step: int) -> float:
        """One step of `recipe.steps`; returns the batch's loss before it, in nats."""
        r = self.recipe
        tokens = self.task.batch(max(1, r.batch // self.share), r.length + 1, self.generator)
        loss = self.called(tokens, rate=inner_rate(step, r.steps)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, error_if_nonfinite=True)
        for group in self.optimizer.param_groups:
            group["lr"] = r.learning_rate * outer_rate(step, r.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def seconds_per_step(self) -> float:
        """The median of three steps, after one that is not counted."""
        seconds = []
        for step in range(4):
            began = time.perf_counter()
            self.step(step)
            seconds.append(time.perf_counter() - began)
        return sorted(seconds[1:])[1]


def outer_rate(step: int, steps: int, warmup: float = 0.1, least: float = 0.1) -> float:
    """From 0 to 1 over the first tenth of the steps, along a cosine to `least` at the end."""
    warm = min(1.0, (step + 1) / max(1.0, warmup * steps))
    return warm * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def planned(model: EndToEnd, task: Task, recipe: Recipe, steps: int | None, minutes: float | None) -> Recipe:
    """The recipe with so many steps, or fewer where the model, which is spent on it, would take more minutes."""
    recipe = replace(recipe, steps=steps or recipe.steps)
    if minutes is None:
        return recipe
    each = Trainer(model, task, recipe, seed=0).seconds_per_step()
    fitting = torch.tensor(max(1, min(recipe.steps, int(60 * minutes / each))))
    if dist.is_initialized():  # all make as many
        dist.all_reduce(fitting, dist.ReduceOp.MIN)
    return replace(recipe, steps=int(fitting))


def train(model: EndToEnd, task: Task, recipe: Recipe, seed: int = 0, name: str = "training") -> float:
    """All steps of the recipe, with a bar on stderr; returns the seconds they took."""
    trainer = Trainer(model, task, recipe, seed)
    began = time.perf_counter()
    with _bar(name, recipe.steps) as told:
        for step in range(recipe.steps):
            told(completed=step + 1, loss=trainer.step(step) * task.per_nat)
    return time.perf_counter() - began


@torch.no_grad()
def losses_by_position(model: EndToEnd, task: Task, recipe: Recipe, size: int = 8) -> dict[int, Tensor]:
    """What each position loses, in the task's unit: the mean over sequences held out, [length] by length: that of
    training, and `LONGER` times as much.
    """
    found = {}
    for length in (recipe.length, LONGER * recipe.length):
        held_out = task.held_out(recipe.held_out, length + 1)
        total = torch.stack([model(tokens).nll.sum(0) for tokens in held_out.split(size)]).sum(0)
        found[length] = total / len(held_out) * task.per_nat
    return found


@contextmanager
def processes() -> Iterator[bool]:
    """Under `torchrun`, joined with the others; whether this is the one that prints."""
    if "WORLD_SIZE" not in os.environ:
        yield True
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


@contextmanager
def _bar(name: str, steps: int) -> Iterator[Callable[..., None]]:
    """A bar at a terminal, elsewhere ten lines; of the first process alone."""
    if dist.is_initialized() and dist.get_rank():
        yield lambda completed, loss: None
        return
    if not sys.stderr.isatty():
        yield partial(_line, name, steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=terminal.console(stderr=True), transient=True) as bar:
        yield partial(bar.update, bar.add_task(name, total=steps, loss=math.nan))


def _line(name: str, steps: int, completed: int, loss: float) -> None:
    if completed * 10 // steps > (completed - 1) * 10 // steps:
        print(f"{name}: {completed} of {steps} steps, {loss:.3f}", file=sys.stderr)
