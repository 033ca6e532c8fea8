"""Device kinds: the name contains exactly what selects the kernels."""

import platform

import pytest

from zeta_core.system.device_kind import cpu_kind, gpu_kind

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 106
flags\t\t: fpu sse2 avx fma avx2 avx512f avx512dq avx512bw avx512vl avx512_vnni

processor\t: 1
vendor_id\t: GenuineIntel
flags\t\t: fpu
"""
OLD = "vendor_id\t: AuthenticAMD\ncpu family\t: 23\nmodel\t\t: 1\nflags\t\t: fpu sse2 avx fma avx2\n"
OLDEST = "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 42\nflags\t\t: fpu sse2 avx\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


def kind_of(cpu: str, **environment: str) -> str:
    kind = cpu_kind(environment, cpu=cpu)
    assert kind is not None
    return kind.partition(":torch-")[0]


@pytest.mark.parametrize(
    ("cpu", "kind"),
    [
        (XEON, "cpu:AVX512:avx512_vnni:GenuineIntel-6-106"),
        (OLD, "cpu:AVX2:avx2:AuthenticAMD-23-1"),
        (OLDEST, "cpu:DEFAULT:avx:GenuineIntel-6-42"),
        (ARM, f"cpu:sve:bf16:i8mm:{platform.machine()}:0x41-0xd40"),
    ],
)
def test_a_cpu_is_named_by_its_instruction_sets_and_its_model(cpu: str, kind: str) -> None:
    assert kind_of(cpu) == kind


@pytest.mark.parametrize(("chosen", "capability"), [("default", "DEFAULT"), ("avx2", "AVX2"), ("AVX2", "AVX512")])
def test_the_capability_follows_the_variable_that_torch_reads(chosen: str, capability: str) -> None:
    assert kind_of(XEON, ATEN_CPU_CAPABILITY=chosen).split(":")[1] == capability


def test_variables_that_select_kernels_are_part_of_the_kind_and_others_are_not() -> None:
    plain = cpu_kind({}, cpu=XEON)
    assert cpu_kind({"MKL_CBWR": "AVX2"}, cpu=XEON) == f"{plain}:MKL_CBWR=AVX2"
    assert cpu_kind({"OMP_NUM_THREADS": "4", "MKL_CBWR": ""}, cpu=XEON) == plain
    assert cpu_kind({"NVIDIA_TF32_OVERRIDE": "0"}, cpu=XEON) == plain
    assert cpu_kind({"ATEN_CPU_CAPABILITY": "default"}, cpu=ARM) != cpu_kind({}, cpu=ARM)


def test_a_gpu_is_named_by_its_model_its_compute_capability_and_torch() -> None:
    kind = gpu_kind("NVIDIA H200", (9, 0), {"NVIDIA_TF32_OVERRIDE": "0", "MKL_CBWR": "AVX2"}) or ""
    assert kind.startswith("cuda:NVIDIA H200:9.0:")
    assert ":torch-" in kind
    assert kind.endswith(":NVIDIA_TF32_OVERRIDE=0")
