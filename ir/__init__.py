"""What the compiler thinks in: expressions over named axes, programs of them, and the stages that rewrite them.

Needs NumPy and SymPy alone; imports neither `tttc` nor `tttc.backends`. README.md has the grammar.
"""

if __name__ != "tttc.ir":
    raise ImportError("import this package as tttc.ir: a second copy would have an intern table of its own")

from tttc.ir import ops as _ops  # noqa: F401  fills the op table that expressions are typed by
from tttc.ir import program_text as _program_text  # noqa: F401  and what they are printed by
