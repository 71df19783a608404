// Takes a state across the segments of its sequence: `entering[s]` becomes what enters segment s, given what each
// segment does to a state (its own result from nothing, and how much it decays what comes in). go 1: in the order of the
// segments, where that of a sequence's first segment is what it ended with; -1: gradients, from the last to the first,
// which `first` enters. A thread has one state of one channel of a sequence; sizes count states, COMPLEX ones are two numbers.
typedef long long i64;
#if COMPLEX
typedef float2 number;
typedef double total_t;
#else
typedef float number, total_t;
#endif
#if WEIGHTS  // A is bfloat16 (1) or float16 (2)
typedef unsigned short weight_t;
#else
typedef float weight_t;
#endif
__device__ __forceinline__ float weight(weight_t v) {
#if WEIGHTS == 1
    return __uint_as_float((unsigned int)v << 16);
#elif WEIGHTS == 2
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
#else
    return v;
#endif
}
#define AHEAD 8  // segments whose numbers are asked for together: they come from memory one by one otherwise

extern "C" __global__ void combine(const float *local, const total_t *sum_dt, const weight_t *A, const float *first,
                                   const i64 *begins, const i64 *counts, int count, int go, int channels, int d_state,
                                   float *entering) {
    const i64 size = (i64)channels * d_state, i = (i64)blockIdx.y * blockDim.x + threadIdx.x, sequence = blockIdx.x;
    if (i >= size) return;
#if COMPLEX
    // the angle of a whole segment may be thousands of turns
    const double turns = (go > 0 ? 0.15915494309189535 : -0.15915494309189535) * weight(A[2 * i + 1]);
    const float A2 = weight(A[2 * i]) * 1.4426950408889634f;
    const number nothing = make_float2(0.f, 0.f);
#else
    const float A2 = (LOG_A ? -expf(weight(A[i])) : weight(A[i])) * 1.4426950408889634f;
    const number nothing = 0.f;
#endif
    const number *const locals = (const number *)local, *const firsts = (const number *)first;
    number *const enters = (number *)entering;
    const i64 n = begins ? counts[sequence] : count, begin = begins ? begins[sequence] : sequence * count;
    const i64 from = go > 0 ? begin : begin + n - 1, c = i / d_state;
    if (n == 0) return;
    number h = go > 0 ? locals[from * size + i] : first ? firsts[sequence * size + i] : nothing;
    for (i64 k = go > 0 ? 1 : 0; k < n; k += AHEAD) {
        number add[AHEAD];
        total_t dt[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const i64 segment = from + go * (k + j);
            const bool used = k + j + 1 < n;  // the last one hands on to nobody
            add[j] = used ? locals[segment * size + i] : nothing, dt[j] = used ? sum_dt[segment * channels + c] : 0;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (k + j >= n) break;
            enters[(from + go * (k + j)) * size + i] = h;
            float decay;
            asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(decay) : "f"((float)(A2 * dt[j])));
#if COMPLEX
            const double all = turns * dt[j];
            float sine, cosine;
            sincospif(2.f * (float)(all - rint(all)), &sine, &cosine);
            const float r = decay * cosine, m = decay * sine;
            h = make_float2(fmaf(r, h.x, fmaf(-m, h.y, add[j].x)), fmaf(r, h.y, fmaf(m, h.x, add[j].y)));
#else
            h = fmaf(decay, h, add[j]);
#endif
        }
    }
}
