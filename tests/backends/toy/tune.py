"""What may be tuned: nothing but the schedule."""

from tttc.backends.untuned import versions


def toolchain() -> dict[str, str]:
    return versions("numpy")
