"""A process that leaves the network. On its own, because torch starts threads when imported."""

import ctypes
import sys

_NEWUSER, _NEWNET = 0x10000000, 0x40000000  # of clone(2)


def leave_network() -> bool:
    """Step into a network of its own, which is empty. Must come before any thread; False where the kernel refuses."""
    if sys.platform != "linux":
        return False
    unshare = getattr(ctypes.CDLL(None, use_errno=True), "unshare", None)
    return unshare is not None and any(unshare(f) == 0 for f in (_NEWNET, _NEWUSER | _NEWNET))
