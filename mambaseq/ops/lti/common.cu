// Shared by the kernels of the time-invariant scan, after selective_scan/common.cu. Compiled with, beside its macros:
//   COMPLEX  0: states are real, y = C h;  1: complex, y = 2 Re(C h)
//   CH       channels of a block
//   OWN      states of a thread
#define SPLIT (STATES / OWN)        // threads of a channel
#define LANES (32 / SPLIT)          // channels of a warp
#define ROW_Y (CH + LANES)          // spreads the steps that a warp writes over the banks
#define RANKS (THREADS / (CH / 2))  // rows that the block prepares and finishes at a time, two channels a thread

struct Number { float r, i; };  // of a state; i stays 0 where states are real
__device__ __forceinline__ Number number(const float *from, i64 place, bool exists) {
    if (!exists || !from) return Number{0.f, 0.f};
    if (COMPLEX) return Number{from[2 * place], from[2 * place + 1]};
    return Number{from[place], 0.f};
}
__device__ __forceinline__ void keep(float *to, i64 place, Number v) {
    if (COMPLEX) to[2 * place] = v.r, to[2 * place + 1] = v.i;
    else to[place] = v.r;
}

// Sums of SPLIT values over the SPLIT threads of a channel: thread `sub` ends with that of value `sub`.
__device__ __forceinline__ float share(float *v, int sub) {
#pragma unroll
    for (int half = SPLIT / 2; half; half /= 2) {
        const bool high = sub & half;
#pragma unroll
        for (int n = 0; n < half; n++) {
            const float mine = high ? v[n + half] : v[n], other = high ? v[n] : v[n + half];
            v[n] = mine + __shfl_xor_sync(~0u, other, half);
        }
    }
    return v[0];
}

