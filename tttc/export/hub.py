"""A compiled layer as a folder that the `kernels` library of Hugging Face loads: the file of `tttc.export.python`, with
what that library reads beside it.

layer = tttc.compile(tttc.library.TTTLinear, {"D": 64})
tttc.export.hub.save(layer, "ttt-linear")

kernel = kernels.get_local_kernel(Path("ttt-linear"))               # needs torch and kernels, not tttc
z, state = kernel.TTTLinear(num_heads=12)(q, k, v, lr, tau)
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import unicodedata
from pathlib import Path

import torch

from tttc.export.python.facts import Facts
from tttc.export.python.file import checked, plain
from tttc.runtime.layer import Layer

DEVICES = ("cpu", "cuda")  # a folder for each: the file is the same
README = """\
---
license: apache-2.0
library_name: kernels
tags:
- kernels
- test-time-training
---

# {name}

{about}

```python
from kernels import get_kernel

kernel = get_kernel("<you>/{name}", version=1, trust_remote_code=True)
layer = kernel.{title}(num_heads=12{given})
kernel.self_test()  # the layer against its definition, token by token
```
"""


def save(layer: Layer, folder: str | Path) -> Path:
    """Write the folder, once the file in it was seen to compute what the layer does: `build/torch-cpu`,
    `build/torch-cuda`, and a README with the mathematics. Pushed to the Hub it is a kernel of version 1.

    Raises:
        BackendRefusal: the layer has no such file yet; the reason is said.
        ExportMismatch: what the file computes is not what the layer does.
    """
    folder, facts, text = Path(folder), Facts(plain(layer, torch.float32)), checked(layer)
    name = kernel_name(layer.signature.name)
    module = name.replace("-", "_")
    exported = ["State", facts.title, "self_test"]
    about = ast.get_docstring(ast.parse(text)) or ""
    for device in DEVICES:
        into = folder / "build" / f"torch-{device}"
        into.mkdir(parents=True, exist_ok=True)
        files = {
            "__init__.py": f'"""{name}: see {module}.py."""\n\nfrom .{module} import {", ".join(exported)}\n\n'
            f"__all__ = {json.dumps(exported)}\n",
            f"{module}.py": text,
            "metadata.json": json.dumps(_metadata(name, device, text), indent=2) + "\n",
        }
        for file, content in files.items():
            (into / file).write_text(content, encoding="utf-8")
    given = "".join(f", {facts.attributes[p.name]}=..." for p in facts.drawn)
    readme = README.format(name=name, about=_markdown(about), title=facts.title, given=given)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def kernel_name(variant: str) -> str:
    """TTTLinear is ttt-linear: lower case, digits and dashes, at least two, a letter first."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", variant)
    ascii_words = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode().lower()
    name = "-".join(re.findall(r"[a-z0-9]+", ascii_words))
    return name if re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", name) else f"layer-{name}".rstrip("-")


def _metadata(name: str, device: str, text: str) -> dict[str, object]:
    """What `kernels` reads before it imports anything; the id is the name of the module in `sys.modules`."""
    made = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {
        "name": name,
        "id": f"_{name.replace('-', '_')}_{device}_{made}",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": device},
    }


def _markdown(about: str) -> str:
    """The docstring of the file; what is indented in it is a block of code in Markdown as well."""
    return about.partition("\nRun by itself")[0].strip()
