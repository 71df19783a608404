"""What the CPU kernels share: Numba's code cache, elementary functions, cutting the work, threads."""
