"""The loops of an exported file as kernels, as text: what `emit.py` prints for them, and what launches it.

if triton is not None:

    @triton.jit(do_not_specialize=["T", "every", "groups"])
    def whole_kernel(W_ptr, W_b, W_h, q_ptr, ...):
        ...

They are laid out as they are printed. A function that they call has another name where one of the file has that name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

from tttc.backends.interface import FileKernels
from tttc.backends.triton import launch
from tttc.backends.triton.emit import module_text
from tttc.backends.triton.kernel_spec import KernelSpec, spec_of, unfused
from tttc.backends.triton.load import kernel_name
from tttc.backends.triton.tune import default_config
from tttc.ir.names import function, marked, worded
from tttc.ir.program import AdjointProgram, Scan

ABOUT = """\
On a GPU where Triton is, its loops are kernels, in float32; in float64, and where a second derivative may follow, they
are PyTorch. The kernels were checked in Triton's interpreter (TRITON_INTERPRET=1, on a CPU), and on no GPU yet: the
test compares them where they run.
"""
IMPORTS = """\
try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch does what the kernels do
    triton = None
"""
_DEFINED = re.compile(r"^(?:def|class) (\w+)", re.MULTILINE)


@dataclass(frozen=True)
class TritonKernels(FileKernels):
    """The kernels of a file."""

    text: str

    def within(self, file: str) -> str:
        body = indent(_apart(self.text, set(_DEFINED.findall(file))), "    ")
        return file.replace(self.place, self.place.replace("\n", f"\nif triton is not None:\n\n{body}\n"))


def file_kernels(program: AdjointProgram, scans: Mapping[str, Scan]) -> FileKernels | None:
    """Kernels of those of these scans that can be some; a file calls the scans by the words that they stand under."""
    specs = {word: spec_of(s, program) for word, s in scans.items() if not unfused(s, program)}
    if not specs:
        return None
    text = module_text(program.name, list(specs.values()))
    for word, spec in specs.items():
        for backward, name in zip((False, True), _names(word), strict=True):
            printed = marked(function(kernel_name(spec.scan, backward)))
            text = text.replace(f"def {printed}(", f"def {marked(function(name))}(")
    wording = worded(text)
    made = {w: [*(wording.called[function(n)] for n in _names(w)), *_settings(s)] for w, s in specs.items()}
    return TritonKernels(
        about=ABOUT,
        imports=IMPORTS,
        source=Path(launch.__file__),
        names=("Kernels", "placed"),
        head="triton and Kernels(",
        made=made,
        text=wording.text.partition("import triton.language as tl\n")[2].strip(),
    )


def _names(word: str) -> tuple[str, str]:
    return f"{word}_kernel", f"{word}_adjoint_kernel"


def _settings(spec: KernelSpec) -> list[str]:
    """The rest of a `Kernels`."""
    shared = tuple(i for i, p in enumerate(spec.scan.params) if spec.shared(p))
    options = ", ".join(json.dumps(default_config(spec, backward).options) for backward in (False, True))
    return [f"chunk={spec.chunk}", f"strips={spec.strips}", f"shared={shared!r}", f"options=({options})"]


def _apart(text: str, taken: set[str]) -> str:
    """The functions of a text under names that are not taken."""
    words = set(re.findall(r"\w+", text)) | taken
    for name in re.findall(r"^def (\w+)", text, re.MULTILINE):
        if name in taken:
            other = f"{name}_tl"
            while other in words:
                other += "_"
            words.add(other)
            text = re.sub(rf"(?<![\w.]){name}\(", f"{other}(", text)
    return text
