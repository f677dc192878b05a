"""Every operation of the IR, and the names of `tttc.ir.numerics` that NumPy writes it with."""

from __future__ import annotations

from tttc.backends.rows import INFIX

ALIKE = (
    *("exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "erf", "abs", "sign", "step", "relu", "sigmoid", "softplus"),
    *("silu", "gelu", "huber", "less_equal", "select", "sum", "mean", "max", "last", "put_last", "segprod", "cumprod"),
    *("shift", "shift_back", "stop_gradient", "softmax", "layer_norm", "rms_norm", "l2_norm"),
)
ROWS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*INFIX, "leaf", "const", "size", "map", "pow", "rename"), ()),
    **{name: (name,) for name in ALIKE},
    "contract": ("outer", "einsum", "sum", "transpose"),
    "mask": ("tril", "triu", "broadcast_to"),
    "broadcast": ("broadcast_to", "zeros"),
    "solve": ("solve_lower",),
}
