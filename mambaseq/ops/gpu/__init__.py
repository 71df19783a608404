"""What kernels on GPUs stand on: Triton, CUDA C++ compiled by NVRTC, CUDA graphs."""
