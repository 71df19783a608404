"""What the CPU kernels share: elementary functions, cutting the work, threads."""
