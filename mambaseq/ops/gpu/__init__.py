"""What the GPU kernels share: Triton, CUDA C++ compiled by NVRTC, CUDA graphs."""
