"""How torch's memory is handled where it computes on a CPU."""

import ctypes
import os

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1

# Products of matrices that oneDNN keeps compiled. Each shape is one and took some 4 MB in bf16, so that the 1,024 which
# it would keep grew a run by gigabytes. All layers of a model have the same shapes: a micro-batch needs some 40.
KEPT_PRODUCTS = 128


def reuse_memory() -> None:
    """Lets this process use freed memory again; before its first product of matrices.

    Without this, each tensor above 32 MiB, such as the logits of a micro-batch, is new memory of the system and given
    back at once: steps of SmolLM2-135M took an eighth longer. Has no effect on other C libraries than glibc.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRODUCTS))
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LARGEST)
        set_option(M_TRIM_THRESHOLD, LARGEST)
