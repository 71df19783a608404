// Takes a state across the segments of its sequence: `entering[s]` becomes what enters segment s, given what each
// segment does to a state (its own result from nothing, and how much it decays what comes in). go 1: in the order of the
// segments, where that of a sequence's first segment is what it ended with; -1: gradients, from the last to the first,
// which `first` enters. A thread has one state of one channel of a sequence.
typedef long long i64;
#define AHEAD 8  // segments whose numbers are asked for together: they come from memory one by one otherwise

extern "C" __global__ void combine(const float *local, const float *sum_dt, const float *A, const float *first,
                                   const i64 *begins, const i64 *counts, int count, int go, int channels, int d_state,
                                   float *entering) {
    const i64 size = (i64)channels * d_state, i = (i64)blockIdx.y * blockDim.x + threadIdx.x, sequence = blockIdx.x;
    if (i >= size) return;
    const float A2 = (LOG_A ? -expf(A[i]) : A[i]) * 1.4426950408889634f;
    const i64 n = begins ? counts[sequence] : count, begin = begins ? begins[sequence] : sequence * count;
    const i64 from = go > 0 ? begin : begin + n - 1, c = i / d_state;
    if (n == 0) return;
    float h = go > 0 ? local[from * size + i] : first ? first[sequence * size + i] : 0.f;
    for (i64 k = go > 0 ? 1 : 0; k < n; k += AHEAD) {
        float add[AHEAD], dt[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const i64 segment = from + go * (k + j);
            const bool used = k + j + 1 < n;  // the last one hands on to nobody
            add[j] = used ? local[segment * size + i] : 0.f, dt[j] = used ? sum_dt[segment * channels + c] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (k + j >= n) break;
            entering[(from + go * (k + j)) * size + i] = h;
            float decay;
            asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(decay) : "f"(A2 * dt[j]));
            h = fmaf(decay, h, add[j]);
        }
    }
}
