"""What kernels on CPUs stand on: Numba's code kept on disk, elementary functions, how work is cut, threads."""
