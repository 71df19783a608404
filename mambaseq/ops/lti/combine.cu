// Takes states from segment to segment: what enters each is what entered the one before, decayed, and what that one added. go 1:
// states; -1: their gradients, from the last segment to the first, which are decayed once more before they leave a segment.
// Numbers are complex or real as the states are; a thread has one state of one channel of a sequence. Powers are of the a that
// the kernels multiply by, in double precision, since a small angle's error grows with the number of steps.
typedef long long i64;
#define FLOATS (COMPLEX ? 2 : 1)

struct Wide { double r, i; };
__device__ __forceinline__ Wide times(Wide p, Wide q) { return Wide{p.r * q.r - p.i * q.i, p.r * q.i + p.i * q.r}; }
__device__ __forceinline__ Wide power(Wide base, int n) {
    Wide result{1., 0.};
    for (; n; n >>= 1) {
        if (n & 1) result = times(result, base);
        base = times(base, base);
    }
    return result;
}

extern "C" __global__ void combine(const float *local, const float *a, const float *gain, const float *first,
                                   const i64 *begins, const i64 *counts, const int *lengths, int count, int whole,
                                   int first_steps, int steps, int go, int channels, int d_state, float *entering) {
    const i64 size = (i64)channels * d_state, i = (i64)blockIdx.y * blockDim.x + threadIdx.x, sequence = blockIdx.x;
    if (i >= size) return;
    auto read = [&](const float *from, i64 place) {
        return Wide{from[FLOATS * place], COMPLEX ? from[2 * place + 1] : 0.};
    };
    Wide decay = read(a, i), in = read(gain, i);
    if (go < 0) {
        decay.i = -decay.i;
        if (COMPLEX) in.r *= 2., in.i *= -2.;
        in = times(in, decay);
    }
    const i64 n = begins ? counts[sequence] : count, begin = begins ? begins[sequence] : sequence * count;
    Wide h = first ? read(first, sequence * size + i) : Wide{0., 0.}, over{1., 0.};
    int known = 0;  // steps that `over` is the power of
    for (i64 k = 0; k < n; k++) {
        const i64 number = go > 0 ? k : n - 1 - k, segment = begin + number;
        entering[FLOATS * (segment * size + i)] = h.r;
        if (COMPLEX) entering[2 * (segment * size + i) + 1] = h.i;
        if (k + 1 == n) break;
        const int own_steps = lengths ? lengths[segment]
                                      : min(first_steps + (int)number * steps, whole) - (number ? first_steps + (int)(number - 1) * steps : 0);
        if (own_steps != known) over = power(decay, own_steps), known = own_steps;
        Wide made = read(local, segment * size + i);
        if (go < 0) made.i = -made.i;  // the gradients' recurrence is that of the conjugate of a
        const Wide kept = times(over, h), added = times(in, made);
        h = Wide{kept.r + added.r, kept.i + added.i};
    }
}
