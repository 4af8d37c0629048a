"""Devices that run kernels: CUDA, its emulator, and one that only counts."""
