"""Every operation of the IR as a node of ONNX, or the name of the method that writes several (lowering.py)."""

from __future__ import annotations

NODES = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "neg": "Neg",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
    "sin": "Sin",
    "cos": "Cos",
    "erf": "Erf",
    "abs": "Abs",
    "sign": "Sign",
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "softplus": "Softplus",
    "sum": "ReduceSum",
    "mean": "ReduceMean",
    "max": "ReduceMax",
}
# Of several nodes: elementwise ones are given the names of their operands, all others the expression.
METHODS = (
    *("rsqrt", "step", "silu", "gelu", "huber", "less_equal", "select"),
    *("leaf", "const", "size", "map", "pow", "contract", "mask", "broadcast", "rename", "stop_gradient"),
    *("last", "put_last", "segprod", "cumprod", "shift", "shift_back", "solve", "layer_norm"),
)
ROWS: dict[str, str] = {**NODES, **{name: f"_{name}" for name in METHODS}}
RECURRENCE = "LinearAttention"  # what ONNX calls the operator of linear recurrences (recurrence.py)
