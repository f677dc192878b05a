"""`tttc`: a compiler for Test-Time-Training layers."""

from tttc.compile import PIPELINE, check
from tttc.operations import (
    abs,
    dot,
    elementwise,
    exp,
    gelu,
    huber,
    l2_norm,
    layer_norm,
    log,
    mean,
    relu,
    rms_norm,
    rsqrt,
    sigmoid,
    sign,
    silu,
    softmax,
    softplus,
    sqrt,
    sum,
    tanh,
    where,
)
from tttc.variant import Variant, gate, normal, param, sgd, state, token
from tttc import library
from tttc.api import compile
from tttc.verify import verify
