// Sums what the blocks of backward.cu left, in a fixed order.

// Those of B and C: `sums` (groups, blocks of a group, rows, 2, STATES) to (rows, groups, d_state) each, rows `stride` apart.
extern "C" __global__ void gather_states(const float *sums, i64 rows, int groups, int blocks, int d_state, i64 stride,
                                         in_t *dB, in_t *dC) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, size = rows * 2 * STATES;
    if (i >= size) return;
    const int group = blockIdx.y, n = i % STATES, kind = i / STATES % 2;
    const float *from = sums + (i64)group * blocks * size + i;
    float total = 0.f;
#pragma unroll 8
    for (int b = 0; b < blocks; b++) total += from[b * size];
    in_t *to = kind ? dC : dB;  // null where it is constant
    if (n < d_state && to) to[i / (2 * STATES) * stride + group * d_state + n] = narrow(total);
}

// Those of A, D and the bias, over the segments: (segments, channels, d_state) and (segments, channels) to their sums.
// Segments of length 0 have left nothing. What A gets becomes what log(-A) gets where that was given.
extern "C" __global__ void gather_channels(const float *part_A, const float *part_D, const float *part_bias,
                                           const int *lengths, int segments, int channels, int d_state,
                                           const float *A, float *dA, float *dD, float *dbias) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, size = (i64)channels * d_state;
    if (i >= size + 2 * channels) return;
    const bool is_A = i < size, is_D = !is_A && i < size + channels;
    const float *from = is_A ? part_A + i : is_D ? part_D + (i - size) : part_bias + (i - size - channels);
    const i64 apart = is_A ? size : channels;
    float total = 0.f;
#pragma unroll 16
    for (int s = 0; s < segments; s++)
        if (!lengths || lengths[s]) total += from[s * apart];
    if (LOG_A && is_A) total *= decay_rate(A[i]);
    *(is_A ? dA + i : is_D ? dD + (i - size) : dbias + (i - size - channels)) = total;
}
