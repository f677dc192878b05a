"""Tune for a GPU that is not there: kernels are compiled for it and ranked by an estimate; nothing runs on it.

    python -m examples.tune_for_absent_gpu --device sm_90 --budget 30s

Triton and its assembler come with tttc on Linux x86-64. What is found is kept, and `tttc.compile(..., device="cuda")`
takes it on such a GPU, unless one was measured there. No estimate has been compared with a measurement yet.
"""

from __future__ import annotations

import argparse

import torch

import tttc
from tttc.library import LinearAttention


def main(device: str, budget: str, width: int) -> None:
    # The call that is estimated: 16 sequences of 2048 tokens, 12 heads; what is taken holds for calls of any size.
    found = tttc.tune(LinearAttention, {"D": width}, torch.bfloat16, device, budget, batch=16, tokens=2048, heads=12)
    print(found)  # each candidate's registers, spilled and shared bytes and its estimate, and what was taken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="sm_90", help="sm_80, sm_90, sm_100 or gfx942")
    parser.add_argument("--budget", default="30s", help="how long it may take")
    parser.add_argument("--width", type=int, default=64, help="D, the width of a head")
    options = parser.parse_args()
    main(options.device, options.budget, options.width)
