"""`tttc`: a compiler for Test-Time-Training layers.

Declare an inner-loop learner and its self-supervised loss as a `Variant`; `compile` differentiates it, derives its dual
form, and returns an ordinary PyTorch layer.
"""

from tttc import library, nn
from tttc.api import compile
from tttc.compile import PIPELINE
from tttc.declare import check
from tttc.errors import TTTCError
from tttc.layer import Layer, State
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
from tttc.verify import verify

__version__ = "0.1.0"

__all__ = [
    "PIPELINE",
    "Layer",
    "State",
    "TTTCError",
    "Variant",
    "abs",
    "check",
    "compile",
    "dot",
    "elementwise",
    "exp",
    "gate",
    "gelu",
    "huber",
    "l2_norm",
    "layer_norm",
    "library",
    "log",
    "mean",
    "nn",
    "normal",
    "param",
    "relu",
    "rms_norm",
    "rsqrt",
    "sgd",
    "sigmoid",
    "sign",
    "silu",
    "softmax",
    "softplus",
    "sqrt",
    "state",
    "sum",
    "tanh",
    "token",
    "verify",
    "where",
]
