"""What a network that learns goes on with."""

from __future__ import annotations

import torch

from tttc.examples.networks.cycles import VOCABULARY, cycles
from tttc.examples.networks.training import Task
from tttc.networks.end_to_end import EndToEnd

READ, WRITTEN = 1024, 256


def sample(model: EndToEnd, task: Task) -> str:
    """A sequence held out, and what the network writes on: text, or how much of a walk without jumps is right."""
    if task.written is not None:
        given = task.held_out(1, READ + 1)[:, :READ]
        tokens = model.generate(given, WRITTEN, temperature=0.8, generator=torch.Generator().manual_seed(0))
        return f"… {task.written(tokens[0, READ - 80 : READ])}┃{task.written(tokens[0, READ:])}"
    walk = cycles(1, 5 * VOCABULARY, torch.Generator().manual_seed(7), noise=0.0)
    given = walk[:, : 4 * VOCABULARY]
    written = model.generate(given, VOCABULARY, temperature=0.0)[:, 4 * VOCABULARY :]
    right = int((written == walk[:, 4 * VOCABULARY :]).sum())
    numbers = " ".join(map(str, written[0, :16].tolist()))
    return f"after four rounds of a new cycle it writes {numbers} …: {right} of a round of {VOCABULARY} are right"
