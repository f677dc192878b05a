"""`tttc.nn.Learner`: the learner of a declaration as a module, whose parameters are its fast weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tttc.compiler.driver import checked_dims
from tttc.compiler.frozen import FrozenLearner
from tttc.declare.frozen import frozen_signature
from tttc.declare.number import whole
from tttc.declare.pickling import PickledVariant
from tttc.declare.read import read_declaration
from tttc.declare.specs import ParamSpec, StateSpec, initial_value
from tttc.declare.variant import Variant
from tttc.errors import ShapeError
from tttc.nn.containers import MARK, Parameters
from tttc.runtime.layer_cache import shared_learner


class Learner(nn.Module):
    """The learner of the declaration `variant`, token by token, at the weights that the module has: a part of a network
    that learns, such as `tttc.nn.EndToEnd`, where the network says what the loss is.

    >>> class SwiGLU(tttc.Variant):
    ...     W1, W3 = tttc.state("D", "F", init=tttc.normal(0.02)), tttc.state("D", "F", init=tttc.normal(0.02))
    ...     W2 = tttc.state("F", "D", init=tttc.normal(0.02))
    ...
    ...     def learner(self, x):
    ...         return (tttc.silu(x @ self.W1) * (x @ self.W3)) @ self.W2
    >>> prime = tttc.nn.Learner(SwiGLU, dims={"D": 64, "F": 128})
    >>> y = prime(x)                                                    # [..., 64] -> [..., 64]
    >>> y = torch.vmap(lambda w, x: torch.func.functional_call(prime, w, (x,)))(weights_of_sequences, x)
    >>> print(prime.compiled(x.device, x.dtype).stages["adjoint"])      # both derivatives, as they are derived

    It can be differentiated as often as one likes, mapped over with weights of each sequence, and called under
    `torch.compile`. A pattern of fast weights that is to leave the params slow names the states: `fast="*.prime.W*"`.

    Args:
        variant: the declaration, a `tttc.Variant` subclass: its states, its params and its `learner`. Neither its loss
            nor its update is read.
        dims: the size of every dim that its learner names.
        backend: "auto", operations of PyTorch with the derivatives that PyTorch has for them; or "torch", "tvm" or
            "triton", kernels of that backend, also for the first and the second derivative, both derived by this
            compiler. They are right, and not faster: nothing is carried from token to token that a kernel could keep at
            hand, and the products of large matrices are better made by the libraries that PyTorch calls
            (`python -m benchmarks.learner`).
        dtype, device: of the parameters, as in `torch.nn`. Arithmetic is float32, with float64 float64.

    Parameters: each state under its name, [*dims], and `params.<name>` for each `tttc.param`, [*dims]. A name that
    `torch.nn.Module` has for something else, such as `half`, has an apostrophe behind it.

    Raises:
        DeclarationError: `variant` is not a valid declaration, or its learner reads more than x.
        ShapeError: a dim has no size.
        BackendRefusal: if the backend named cannot run the learner.
    """

    def __init__(
        self,
        variant: type[Variant],
        dims: Mapping[str, int],
        *,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.variant, self.backend = variant, backend
        self.dims = {d: size if (number := whole(size)) is None else number for d, size in dims.items()}
        declared = frozen_signature(variant, self.dims)
        sizes = checked_dims(declared, self.dims)

        def made(spec: StateSpec | ParamSpec) -> nn.Parameter:
            return nn.Parameter(torch.empty([sizes[d] for d in spec.dims], dtype=dtype, device=device))

        self.x_shape = [sizes[d] for d in declared.tokens["q"].dims]
        self.params = Parameters({n: made(s) for n, s in declared.params.items()})
        self._states = {n: n + MARK if hasattr(self, n) else n for n in declared.states}
        for n, attribute in self._states.items():
            self.register_parameter(attribute, made(declared.states[n]))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter anew, by its `init`."""
        declared, _ = read_declaration(self.variant)
        for name, parameter in self._weights().items():
            spec = (declared.states | declared.params)[name]
            shape = tuple(parameter.shape)
            with torch.device("cpu"):  # where the generator is, also inside `with torch.device("meta")`
                drawn = initial_value(declared.name, name, spec.init, shape, torch.default_generator)
            parameter.copy_(drawn)

    def forward(self, x: Tensor) -> Tensor:
        """learner(x) of every token: [..., *dims of x] -> [..., *dims of z], in the dtype of x.

        Raises:
            ShapeError: x has other last axes, or is on another device than the weights.
        """
        weights = self._weights()
        self._check(x, next(iter(weights.values())))
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self.compiled(x.device, compute)(x, weights).to(x.dtype)

    def compiled(self, device: torch.device, dtype: torch.dtype) -> FrozenLearner:
        """The learner for a device and a dtype of arithmetic, made on first use; modules of equal dims share it."""
        return shared_learner(self.variant, tuple(self.dims.items()), dtype, device, self.backend)

    def _weights(self) -> dict[str, Tensor]:
        """States and params by name: those of the module, or what `torch.func.functional_call` has in their place."""
        return {**{n: getattr(self, a) for n, a in self._states.items()}, **dict(self.params.items())}

    def _check(self, x: Tensor, weight: Tensor) -> None:
        name = f"tttc.nn.Learner({self.variant.__name__})"
        if list(x.shape[max(x.dim() - len(self.x_shape), 0) :]) != self.x_shape or not x.is_floating_point():
            wanted = f"[..., {', '.join(map(str, self.x_shape))}]"
            raise ShapeError(
                f"{name}: x is {x.dtype} of the shape {list(x.shape)}, expected numbers {wanted}.\n"
                f"  The sizes are those of dims: {', '.join(f'{d}={n}' for d, n in self.dims.items())}."
            )
        if x.device != weight.device:
            raise ShapeError(f"{name}: x is on {x.device}, the weights are on {weight.device}.\n  Move one of them.")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"variant": PickledVariant.of(self.variant)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"variant": state["variant"].variant})

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{d}={n}" for d, n in self.dims.items())
        return f"{self.variant.__name__}, {sizes}, backend={self.backend!r}"
