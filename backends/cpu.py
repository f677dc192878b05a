"""What the system tells about its processor."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path


@cache
def processor() -> str:
    """The name of this processor, "Intel(R) Xeon(R) Processor @ 2.50GHz"."""
    return _told("model name") or platform.processor() or platform.machine()


@cache
def instruction_sets() -> frozenset[str]:
    """The flags of an x86 processor, the features of an ARM one; none where the system does not tell."""
    return frozenset(f"{_told('flags')} {_told('Features')}".split())


def usable_cores() -> int:
    """Cores that this process may use, where the system says so: in a container they are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _told(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo; nothing on systems without that file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((x.partition(":")[2].strip() for x in lines if x.partition(":")[0].strip() == key), "")
