"""`tttc`: a compiler for Test-Time-Training layers.

Declare an inner-loop learner and its self-supervised loss as a `Variant`; `compile` differentiates it, derives its dual
form, and returns an ordinary PyTorch layer.

What there is lists `tttc/public.py`, which is imported when the first of it is asked for.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tttc.version import __version__ as __version__

if TYPE_CHECKING:
    from tttc.public import *  # noqa: F403

if sys.argv[1:] != ["--version"]:  # which is answered without torch
    import_module("tttc.runtime.state")  # so that `torch.load` takes a `State` and a `Cache`


if not TYPE_CHECKING:  # which would take any name for one of these

    def __getattr__(name: str) -> Any:
        """A public name; of what there is not, `tttc.leaky_relu` or `tttc.mse`, what exists in its place."""
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"tttc has no `{name}`.", name=name, obj=sys.modules[__name__])
        public = import_module("tttc.public")
        globals().update({n: getattr(public, n) for n in public.__all__}, __all__=public.__all__)
        if name in globals():  # or a module beside these, which they have imported
            return globals()[name]
        said = import_module("tttc.declare.suggest").instead(name, public.__all__)
        raise AttributeError(f"tttc has no `{name}`. {said}", name=name, obj=sys.modules[__name__])

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
