"""The acceptance matrix: every library variant, mini-batch, width, read and length against the oracle, in float64.

Outputs and final weights within 1e-12, every gradient within 1e-11, relative in the Frobenius norm: float64 rounds at
1.1e-16, so this leaves room for the rounding of the thousands of operations behind a value, and for nothing else. The
worst of the matrix is about 3e-14; a wrong term of any kind is above 1e-4.
"""

from __future__ import annotations

import pytest

from tests.helpers import (
    MINI_BATCHES,
    READS,
    VARIANTS,
    compiled,
    differences,
    inputs_for,
    layer_result,
    oracle_result,
)

# Around one mini-batch of 16: none, one token, one short, exact, one over, two and a half.
LENGTHS = (0, 1, 15, 16, 17, 40)
# D -> (F, heads). The hidden width is 4 * D but at D = 64, where the oracle would take most of the time of the file;
# a second head is worth its time where the oracle is fast.
SIZES = {3: (12, 2), 16: (64, 1), 64: (24, 1)}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("mini_batch", MINI_BATCHES)
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_oracle(name, mini_batch, D, read):
    F, heads = SIZES[D]
    layer = compiled(name, D, F, mini_batch=mini_batch, read=read)
    wrong = {}
    for tokens in LENGTHS:
        inputs = inputs_for(layer, tokens, heads=heads, seed=tokens)
        found = differences(layer_result(layer, inputs), oracle_result(layer.signature.variant, inputs))
        if found:
            wrong[tokens] = found
    assert not wrong, "\n".join(f"T={tokens}\n{found}" for tokens, found in wrong.items())
