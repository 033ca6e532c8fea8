"""Whether this machine has an NVIDIA GPU, asked of its driver (not of torch, which takes seconds to import)."""

import pynvml


def count_gpus() -> int:
    """The number of NVIDIA GPUs; 0 where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
