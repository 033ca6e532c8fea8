"""The number of NVIDIA GPUs according to the driver, because importing torch takes seconds."""

import pynvml


def count_gpus() -> int:
    """The number of NVIDIA GPUs; 0 without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
