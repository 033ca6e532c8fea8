"""Tests and benchmarks on one NVIDIA GPU: ``python -m benchmarks.gpu`` writes docs/gpu.md."""
