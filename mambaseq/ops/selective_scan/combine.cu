// Takes a state across the segments of its sequence: `entering[s]` becomes what enters segment s, given what each
// segment does to a state (its own result from nothing, and how much it decays what comes in). go 1: in the order of
// the segments; -1: gradients, from the last to the first. A thread has one state of one channel of a sequence.
typedef long long i64;

extern "C" __global__ void combine(const float *local, const float *sum_dt, const float *A, const float *first,
                                   const i64 *begin, const i64 *count, int go, int channels, int d_state,
                                   float *entering) {
    const i64 size = (i64)channels * d_state, i = (i64)blockIdx.x * blockDim.x + threadIdx.x, sequence = blockIdx.y;
    if (i >= size) return;
    const float A2 = A[i] * 1.4426950408889634f;
    const i64 n = count[sequence], from = begin[sequence], c = i / d_state;
    float h = first ? first[sequence * size + i] : 0.f;
    for (i64 k = 0; k < n; k++) {
        const i64 segment = go > 0 ? from + k : from + n - 1 - k;
        entering[segment * size + i] = h;
        if (k + 1 < n) {
            float decay;
            asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(decay) : "f"(A2 * sum_dt[segment * channels + c]));
            h = fmaf(decay, h, local[segment * size + i]);
        }
    }
}
