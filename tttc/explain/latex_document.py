"""The mathematics of a layer as a LaTeX document that compiles by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tttc.ir.latex import program_latex

if TYPE_CHECKING:
    from tttc.runtime.layer import Layer

STAGES = {
    "declare": "Declaration",
    "simplify": "Gradient of the loss",
    "primal": "Update rule, token by token",
    "dualize": "Dual form",
}

DOCUMENT = r"""\documentclass[a4paper]{article}
\usepackage[margin=15mm]{geometry}
\usepackage{amsmath,amssymb}
\allowdisplaybreaks
\begin{document}
\section*{%s}
Tokens are rows: a vector over features is a row, a vector over tokens a column, $\mathbf{1}$ the column of ones,
and a number that is added to a matrix is added to each of its entries. $\odot$ is elementwise and binds looser
than a matrix product.
%s
%s
\end{document}
"""


LEGEND = {
    "segprod": r"$\operatorname{segprod}(x)_{ts} = x_{s+1} \cdots x_t$ where $s \le t$, otherwise $0$.",
    "cumprod": r"$\operatorname{cumprod}(x)_t = x_1 \cdots x_t$.",
    "shift": r"$\operatorname{shift}_f(x)_t = x_{t-1}$, and $f$ for the first token.",
    "last": r"$\operatorname{last}(x)$ is the row of the last token.",
}


def latex_document(layer: Layer) -> str:
    """The mathematics, from the declaration to the dual form, as a LaTeX document that compiles by itself."""
    sections = []
    for stage, title in STAGES.items():
        program = layer.stages[stage].program
        sections.append(f"\\subsection*{{{title}}}\n{program_latex(program)}")
    name = layer.signature.name.replace("_", r"\_")
    body = "\n\n".join(sections)
    legend = [text for operation, text in LEGEND.items() if rf"\operatorname{{{operation}}}" in body]
    return DOCUMENT % (name, "\n".join(legend), body)
