"""Tables of the command line: what was built for a GPU, and what is on this machine."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from tttc.backends.interface import Built
from tttc.cli.doctor import Diagnosis
from tttc.terminal import console, table


def kernel_table(kernels: list[Built]) -> Table:
    """What each takes; what it keeps outside where one of them says that."""
    outside = ("bytes outside per head",) if any(k.outside is not None for k in kernels) else ()
    numbers = ("registers", "spilled bytes", "shared bytes", *outside)
    found = table("kernel", "target", *numbers, numbers=numbers)
    for built in kernels:
        r = built.resources
        shown = (r.registers, r.spilled, r.shared, built.outside)[: len(numbers)]
        found.add_row(r.kernel, r.target, *("" if n is None else str(n) for n in shown))
    return found


def print_diagnosis(diagnosis: Diagnosis) -> None:
    styles = {"ok": "green", "absent": "yellow", "problem": "bold red"}
    found = table("", "status", "what was found → what to do")
    for group, findings in diagnosis.groups().items():
        found.add_row(Text(group, "bold"))
        for finding in findings:
            text = f"{finding.found} → {finding.remedy}" if finding.remedy else finding.found
            found.add_row(f"  {finding.name}", Text(finding.status, styles[finding.status]), text)
    console().print(found)
