"""The library against its papers: every declaration, compiled, against a transcription of the published equations."""

from __future__ import annotations

import inspect

import pytest
import torch

import tttc
from tests.helpers import LIBRARY, differences, dims_of, layer_result, result_of
from tests.transcriptions import TRANSCRIPTIONS
from tttc.declare.read import signature
from tttc.verification.comparison import random_inputs

INVENTED = {"GatedThreeLayer"}  # in no paper
TOLERANCE = 1e-11  # both sides round at 1e-16 in different orders, and some rules amplify that over the tokens
TOKENS = 11  # two mini-batches of 4, and one that ends early


def test_every_published_variant_has_a_transcription():
    assert set(TRANSCRIPTIONS) == set(LIBRARY) - INVENTED


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_a_declaration_is_short_and_cites_its_source(name):
    lines = inspect.getsource(LIBRARY[name]).rstrip().splitlines()
    assert len(lines) <= 25
    assert "arXiv:" in (LIBRARY[name].__doc__ or "") or name in INVENTED


def transcribed(name, inputs, mini_batch):
    """The transcription on every batch element and head."""
    batch, _, heads = inputs.q.shape[:3]
    outputs, finals = [], []
    for i in range(batch):
        for h in range(heads):
            z, final = TRANSCRIPTIONS[name](
                *(x[i, :, h] for x in (inputs.q, inputs.k, inputs.v)),
                {n: x[i, :, h] for n, x in inputs.gates.items()},
                {n: x[h] for n, x in inputs.params.items()},
                {n: x[i, h] for n, x in inputs.state.items()},
                {n: x[i, :, h] for n, x in inputs.tokens.items()},
                mini_batch,
            )
            outputs.append(z)
            finals.append(final)
    z = torch.stack(outputs).unflatten(0, (batch, heads)).transpose(1, 2)
    return z, {n: torch.stack([f[n] for f in finals]).unflatten(0, (batch, heads)) for n in finals[0]}


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("mini_batch", [1, 4, "all"])
@pytest.mark.parametrize("name", sorted(TRANSCRIPTIONS))
def test_the_layer_equals_its_transcription(name, mini_batch, chunk):
    """Outputs, final states and all gradients, at a ragged length."""
    variant = LIBRARY[name].replace(mini_batch=mini_batch)
    layer = tttc.compile(variant, dims_of(variant, 4, 6), torch.float64, chunk=chunk)
    inputs = random_inputs(signature(variant), layer.dims, 1, TOKENS, 2)
    wanted = result_of(*transcribed(name, inputs, mini_batch), inputs)
    assert differences(layer_result(layer, inputs), wanted, TOLERANCE, TOLERANCE) == ""
