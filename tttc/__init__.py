"""`tttc`: a compiler for Test-Time-Training layers.

Declare an inner-loop learner and its self-supervised loss as a `Variant`; `compile` differentiates it, derives its dual
form, and returns an ordinary PyTorch layer.
"""

import sys
from typing import NoReturn

from tttc import library, nn
from tttc.attention import NonParametric, SoftmaxAttention
from tttc.compiler.driver import compile
from tttc.compiler.pipeline import PIPELINE
from tttc.declare.checks import check
from tttc.declare.functions import (
    abs,
    along,
    div,
    dot,
    einsum,
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
    size,
    softmax,
    softplus,
    sqrt,
    stop_gradient,
    sum,
    tanh,
    where,
)
from tttc.declare.specs import gate, normal, param, state, token
from tttc.declare.suggest import instead
from tttc.declare.update_rules import (
    adam,
    at_end,
    clip_norm,
    muon,
    power_norm,
    sgd,
    sign_sgd,
    soft_clip,
    softmax_retention,
    weight_norm,
)
from tttc.declare.variant import Variant
from tttc.errors import FallbackWarning, TTTCError
from tttc.runtime.layer import Layer, State
from tttc.tuning.tune import tune
from tttc.verification.comparison import verify
from tttc.version import __version__ as __version__

__all__ = [
    "PIPELINE",
    "FallbackWarning",
    "Layer",
    "NonParametric",
    "SoftmaxAttention",
    "State",
    "TTTCError",
    "Variant",
    "abs",
    "adam",
    "along",
    "at_end",
    "check",
    "clip_norm",
    "compile",
    "div",
    "dot",
    "einsum",
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
    "muon",
    "nn",
    "normal",
    "param",
    "power_norm",
    "relu",
    "rms_norm",
    "rsqrt",
    "sgd",
    "sigmoid",
    "sign",
    "sign_sgd",
    "silu",
    "size",
    "soft_clip",
    "softmax",
    "softmax_retention",
    "softplus",
    "sqrt",
    "state",
    "stop_gradient",
    "sum",
    "tanh",
    "token",
    "tune",
    "verify",
    "weight_norm",
    "where",
]


def __getattr__(name: str) -> NoReturn:
    """Name what exists in the place of what does not: `tttc.leaky_relu`, `tttc.mse`."""
    said = "" if name.startswith("_") else f" {instead(name, __all__)}"
    raise AttributeError(f"tttc has no `{name}`.{said}", name=name, obj=sys.modules[__name__])
