"""Every library variant forward and backward on every backend, against the definition: `pytest tests/backends -k NAME`.

At small dims; what interprets or compiles its kernels is slow, and all but one variant of it are among the slow tests.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

import tttc
from tests.helpers import LIBRARY, differences, dims_of, inputs_for, layer_result, oracle_result
from tests.test_triton import compared

FIRST = "LinearAttention"
SHORT = 4  # tokens of a mini-batch that has more
TOKENS = 10  # two of these and a tail


def cases(*backends: str, fast: bool) -> list[Any]:
    slow = {name: () if fast or name == FIRST else pytest.mark.slow for name in LIBRARY}
    return [pytest.param(b, name, marks=slow[name]) for b in backends for name in LIBRARY]


def wrong(backend: str, name: str) -> str:
    """What differs from the oracle, in float64."""
    variant = LIBRARY[name]
    long = isinstance(variant.mini_batch, int) and variant.mini_batch > SHORT
    variant = variant.replace(mini_batch=SHORT) if long else variant
    layer = tttc.compile(variant, dims_of(variant, 3, 5), torch.float64, backend=backend)
    assert layer.backend == backend
    inputs = inputs_for(layer, TOKENS, heads=2)
    return differences(layer_result(layer, inputs), oracle_result(variant, inputs))


@pytest.mark.parametrize(("backend", "name"), cases("torch", "toy", fast=True))
def test_every_variant(backend: str, name: str) -> None:
    assert not wrong(backend, name)


@pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")
@pytest.mark.parametrize(("backend", "name"), cases("tvm", fast=False))
def test_every_variant_by_native_kernels(backend: str, name: str) -> None:
    assert not wrong(backend, name)


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no triton for this platform")
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # beyond the ends of blocks
@pytest.mark.parametrize(("backend", "name"), cases("triton", fast=False))
def test_every_variant_by_blocks(backend: str, name: str) -> None:
    """In float32: in Triton's interpreter, or on a GPU where there is one."""
    assert not compared(LIBRARY[name], dims_of(LIBRARY[name], 8, 16), 19)
