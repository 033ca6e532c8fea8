"""Device kinds: everything that selects the kernels of a run, and so determines its results to the last bit.

A worker reports the kinds of its devices without importing torch, and a run records the kind that it runs on. Both
use these functions, so their kinds are comparable; a run passes in the values that torch reports.

A kind is a single string, for example ``cpu:AVX512:avx512_bf16:AuthenticAMD-25-17:torch-2.13.0+cpu`` or
``cuda:NVIDIA H200:9.0:torch-2.13.0+cu130``. Equal kinds select the same kernels. Different kinds may or may not compute
the same results.
"""

from __future__ import annotations

import importlib.util
import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

ATEN_VARIABLE = "ATEN_CPU_CAPABILITY"
# Variables by which torch and its libraries (MKL, oneDNN, OpenBLAS) choose their code paths.
CPU_VARIABLES = (
    ATEN_VARIABLE,
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "MKL_DISABLE_FAST_MM"),
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "TORCH_MKLDNN_MATMUL_MIN_DIM"),
    *("TORCH_MKLDNN_MATMUL_MIN_SIZE", "OPENBLAS_CORETYPE"),
)
GPU_VARIABLES = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT"),
    *("CUBLAS_WORKSPACE_CONFIG", "TORCH_CUDNN_USE_HEURISTIC_MODE_B"),
)
KERNEL_VARIABLES = (*CPU_VARIABLES, *GPU_VARIABLES)

# The instruction sets with kernels in MKL or oneDNN, highest first, named as in /proc/cpuinfo.
_LEVELS = ("amx_fp16", "amx_bf16", "avx512_fp16", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2", "avx")
_GPU_LIBRARIES = ("nvidia-cublas", "nvidia-cudnn")
_CPU_FILE = Path("/proc/cpuinfo")


def cpu_kind(environment: Mapping[str, str], *, capability: str | None = None, cpu: str | None = None) -> str | None:
    """The kind of this machine's CPU; ``None`` if torch is not installed.

    ``capability`` is torch's own report, if available; ``cpu`` is the text of ``/proc/cpuinfo``.
    """
    fields = _cpu_fields(_CPU_FILE.read_text() if cpu is None and _CPU_FILE.is_file() else cpu or "")
    flags = frozenset(fields.get("flags", fields.get("Features", "")).split())
    level = next((name for name in _LEVELS if name in flags), platform.machine())
    if "vendor_id" in fields:  # x86
        names = [capability or _capability(flags, environment.get(ATEN_VARIABLE)), level]
        names.append("-".join(fields.get(name, "?") for name in ("vendor_id", "cpu family", "model")))
        read = tuple(name for name in CPU_VARIABLES if name != ATEN_VARIABLE)
    else:  # features that determine torch's capability
        names = [*(name for name in ("sve", "sve2", "bf16", "i8mm") if name in flags), level]
        names.append("-".join(fields.get(name, "?") for name in ("CPU implementer", "CPU part")))
        read = CPU_VARIABLES
    return _joined("cpu", names, environment, read)


def gpu_kind(name: str, compute_capability: tuple[int, int], environment: Mapping[str, str]) -> str | None:
    """The kind of a GPU: its model and the libraries with its kernels; ``None`` if torch is not installed."""
    major, minor = compute_capability
    return _joined("cuda", [name, f"{major}.{minor}", *_gpu_libraries()], environment, GPU_VARIABLES)


def _joined(device: str, names: list[str], environment: Mapping[str, str], read: tuple[str, ...]) -> str | None:
    torch_version = _torch_version()
    if torch_version is None:
        return None
    variables = [f"{name}={environment[name]}" for name in read if environment.get(name)]
    return ":".join((device, *names, f"torch-{torch_version}", *variables))


def _cpu_fields(text: str) -> dict[str, str]:
    """The fields of the first processor."""
    first = text.strip().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _capability(flags: frozenset[str], chosen: str | None) -> str:
    """The value of `torch.backends.cpu.get_cpu_capability` on x86.

    As in pytorch/pytorch, aten/src/ATen/native/DispatchStub.cpp, `compute_cpu_capability`: the variable's values are
    lower case, and others are ignored.
    """
    if chosen in ("default", "avx2", "avx512"):
        return chosen.upper()
    if {"avx512vl", "avx512bw", "avx512dq", "fma"} <= flags:
        return "AVX512"
    return "AVX2" if {"avx2", "fma"} <= flags else "DEFAULT"


@cache
def _torch_version() -> str | None:
    """``torch.__version__``, read from its file: importing torch takes seconds and hundreds of megabytes."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    try:
        text = Path(torch.origin).with_name("version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^__version__ = ['\"](.+?)['\"]", text, re.MULTILINE)
    return None if match is None else match[1]


@cache
def _gpu_libraries() -> tuple[str, ...]:
    """The GPU libraries required by torch's wheel, with their installed versions."""
    try:
        required = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return ()
    names = sorted({re.split(r"[^\w-]", line, maxsplit=1)[0] for line in required if line.startswith(_GPU_LIBRARIES)})
    found: list[str] = []
    for name in names:
        try:
            found.append(f"{name.removeprefix('nvidia-')}-{metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue  # required on another platform
    return tuple(found)
