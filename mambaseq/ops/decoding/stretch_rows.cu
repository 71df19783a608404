// What a warp does for a row of a phase: what it fetches ahead, the steps of its states, and the drawing of a token.

// What a warp needs for a row and does not wait for others to know: it is fetched while they are waited for. States were
// written by the thread that reads them.
struct Ahead {
    Vec weight, other;
#if SEQUENCES == 1
    Vec up;
#endif
    float2 a[HELD * MORE_STATES], b[HELD * MORE_STATES], c[HELD * MORE_STATES], h[HELD * MORE_STATES];
    float past[MORE_TAPS], next[MORE_TAPS], tap[MORE_TAPS];
    float bias, other_bias, D, conv_bias, input, gate;
    // of what is made while the row's input is on its way: y is from_states + u from_input, the convolution from_past + tap v
    float from_states, from_input, from_past, last_tap;
    float v, u;  // what goes into the states when the row is done: nobody waits for those
};
__device__ __forceinline__ bool has_conv(const Phase &p) { return IS(MAMBA) || IS(CONV); }
__device__ __forceinline__ bool has_states(const Phase &p) { return IS(MAMBA) || IS(LTI) || IS(SCAN); }
__device__ __forceinline__ bool is_complex(const Phase &p) { return COMPLEX_STATES == 2 ? p.flags & COMPLEX : COMPLEX_STATES; }
__device__ __forceinline__ bool has_other(const Phase &p) { return has_conv(p) || HAS(GLU) || HAS(SWIGLU); }
// Which state a lane has as its i-th; those of one j are a warp's in `sum_of_lanes`.
#define EACH_STATE(i, state)                                                                \
    _Pragma("unroll") for (int i = 0; i < HELD * MORE_STATES; i++)                           \
        if (const int state = i / MORE_STATES * 32 + i % MORE_STATES * LANES + lane.place; true)
__device__ __forceinline__ const float *row_up(const Phase &p, int row, int slot) {
    return p.up + ((i64)slot * p.rows + row) * p.held_cols;
}
__device__ __forceinline__ void fetch(Ahead &f, const Phase &p, const Phase &apart, const Lane &lane, int row, int slot) {
    const int rows = (int)p.rows, cols = (int)p.cols;
    if (row >= rows) return;
    if (!IS(LTI)) {
        f.weight = part_of(p.weight + (i64)row * cols, cols);
        f.bias = BIASED && p.bias ? p.bias[row] : 0.f;
        if (has_other(p)) {
            f.other = part_of(p.weight + (i64)(rows + row) * cols, cols);
            f.other_bias = BIASED && p.bias ? p.bias[rows + row] : 0.f;
        }
    }
    if (IS(OUT) || IS(SCAN)) f.input = told(OF(residual, lane.sequence), row);
    if (IS(SCAN)) f.gate = told(OF(copy, lane.sequence), row);
#if SEQUENCES == 1
    if (POOLED && IS(OUT) && p.up) f.up = part_of(row_up(p, row, slot), (int)p.held_cols);
#endif
    if (has_conv(p)) {
        const int width = (int)p.width;
        const float *const past = OF(conv_state, lane.sequence) + (i64)row * (width - 1);
#pragma unroll
        for (int i = 0; i < MORE_TAPS; i++) {
            const int at = i * LANES + lane.place;
            f.past[i] = at < width - 1 ? past[at] : 0.f, f.next[i] = at < width - 2 ? past[at + 1] : 0.f;
            f.tap[i] = at < width - 1 ? p.conv[(i64)row * width + at] : 0.f;
        }
        f.conv_bias = p.conv_bias ? p.conv_bias[row] : 0.f, f.last_tap = p.conv[(i64)row * width + width - 1];
    }
    if (!has_states(p)) return;
    f.D = p.D[row];
    const int n = (int)p.n_states;
    const float *const states = OF(state, lane.sequence);
    EACH_STATE(i, state) {
        const i64 at = (i64)row * n + state;
        f.a[i] = f.b[i] = f.c[i] = f.h[i] = make_float2(0.f, 0.f);
        if (state >= n) continue;
        if (is_complex(p)) {
            f.a[i] = ((const float2 *)p.a)[at], f.h[i] = ((const float2 *)states)[at];
            if (!IS(SCAN)) f.b[i] = ((const float2 *)p.b)[at], f.c[i] = ((const float2 *)p.c)[at];
        } else {
            f.a[i].x = p.a[at], f.h[i].x = states[at];
            if (!IS(SCAN)) f.b[i].x = p.b[at], f.c[i].x = p.c[at];
        }
    }
}
// What a step of a channel's states is by, in place of what was fetched: the rates in `a`, and B and C beside the step size in
// `products`.
__device__ __forceinline__ void select(Ahead &f, const Phase &p, const Lane &lane, const float *products, float delta) {
    const int n = (int)p.n_states;
    const float *const B = products + p.cols, *const C = B + n * (is_complex(p) ? 2 : 1);
    EACH_STATE(i, state) {
        if (state >= n) continue;
        const float size = expf(delta * f.a[i].x);
        if (is_complex(p)) {
            float sine, cosine;
            sincosf(delta * f.a[i].y, &sine, &cosine);
            f.a[i] = make_float2(size * cosine, size * sine);
            f.b[i] = make_float2(delta * B[2 * state], delta * B[2 * state + 1]);
            f.c[i] = make_float2(2.f * C[2 * state], -2.f * C[2 * state + 1]);
        } else {
            f.a[i].x = size, f.b[i].x = delta * B[state], f.c[i].x = C[state];
        }
    }
}
// What comes of a row's states before its input is known.
__device__ __forceinline__ void prepare(Ahead &f, const Phase &p) {
    if (has_conv(p)) {
        float sums[MORE_TAPS];
#pragma unroll
        for (int i = 0; i < MORE_TAPS; i++) sums[i] = __fmul_rn(f.past[i], f.tap[i]);
        f.from_past = sum_of_lanes<MORE_TAPS>(sums) + f.conv_bias;
    }
    if (!has_states(p) || IS(SCAN)) return;
    float y[MORE_STATES], more[MORE_STATES];
#pragma unroll
    for (int i = 0; i < HELD * MORE_STATES; i++) {
        const float2 a = f.a[i], b = f.b[i], c = f.c[i], h = f.h[i];
        float &sum = y[i % MORE_STATES], &sum2 = more[i % MORE_STATES];
        if (i < MORE_STATES) sum = sum2 = 0.f;
        sum = fmaf(c.x, fmaf(a.x, h.x, -a.y * h.y), fmaf(c.y, fmaf(a.x, h.y, a.y * h.x), sum));
        sum2 = fmaf(c.x, b.x, fmaf(c.y, b.y, sum2));
    }
    f.from_states = sum_of_lanes<MORE_STATES>(y), f.from_input = sum_of_lanes<MORE_STATES>(more);
}
// The same where it depends on the input.
__device__ __forceinline__ float read_out(const Ahead &f, float u) {
    float y[MORE_STATES];
#pragma unroll
    for (int i = 0; i < HELD * MORE_STATES; i++) {
        const float2 a = f.a[i], b = f.b[i], c = f.c[i], h = f.h[i];
        float &sum = y[i % MORE_STATES];
        if (i < MORE_STATES) sum = 0.f;
        sum = fmaf(c.x, fmaf(a.x, h.x, fmaf(-a.y, h.y, b.x * u)), fmaf(c.y, fmaf(a.x, h.y, fmaf(a.y, h.x, b.y * u)), sum));
    }
    return sum_of_lanes<MORE_STATES>(y);
}
// A row's states and last inputs after this step.
__device__ __forceinline__ void keep(const Ahead &f, const Phase &p, const Phase &apart, const Lane &lane, int row) {
    const int n = (int)p.n_states, width = (int)p.width;
    if (!lane.writes) return;
    if (has_conv(p)) {
        float *const past = OF(conv_state, lane.sequence) + (i64)row * (width - 1);
#pragma unroll
        for (int i = 0; i < MORE_TAPS; i++) {
            const int at = i * LANES + lane.place;
            if (at < width - 1) past[at] = at == width - 2 ? f.v : f.next[i];
        }
    }
    if (!has_states(p)) return;
    float *const states = OF(state, lane.sequence);
    EACH_STATE(i, state) {
        const i64 at = (i64)row * n + state;
        const float2 a = f.a[i], b = f.b[i], h = f.h[i];
        const float2 now = make_float2(fmaf(a.x, h.x, fmaf(-a.y, h.y, b.x * f.u)), fmaf(a.x, h.y, fmaf(a.y, h.x, b.y * f.u)));
        if (state >= n) continue;
        if (is_complex(p)) ((float2 *)states)[at] = now;
        else states[at] = now.x;
    }
}

// The token whose share the number falls in, or, where there is none, the likeliest; every warp by itself, all alike.
__device__ __forceinline__ int draw(const float *logits, int n, double inverse, const double *uniform, bool &finite) {
    const int lane = threadIdx.x % 32;
    float v[CHOICES], most = -__int_as_float(0x7f800000);
    bool odd = false;
#pragma unroll
    for (int i = 0; i < CHOICES; i++) {  // a lane has neighbours
        const int at = lane * CHOICES + i;
        v[i] = at < n ? logits[at] : -__int_as_float(0x7f800000);
        most = fmaxf(most, v[i]), odd |= isnan(v[i]);
    }
#pragma unroll
    for (int far = 16; far; far /= 2) most = fmaxf(most, __shfl_xor_sync(FULL, most, far));
    finite = !__any_sync(FULL, odd) && fabsf(most) < __int_as_float(0x7f800000);
    if (!uniform) {
        int first = n;
#pragma unroll
        for (int i = CHOICES - 1; i >= 0; i--)
            if (v[i] == most) first = lane * CHOICES + i;
        return min((int)__reduce_min_sync(FULL, (u32)first), n - 1);
    }
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < CHOICES; i++) {
        v[i] = v[i] == most ? 1.f : expf((float)((double)(v[i] - most) * inverse));
        total += v[i];
    }
    total = sum_of_warp(total);
    double own = 0.;
#pragma unroll
    for (int i = 0; i < CHOICES; i++) v[i] = v[i] / total, own += (double)v[i];
    double upto = own;
#pragma unroll
    for (int far = 1; far < 32; far *= 2) {
        const double before = __shfl_up_sync(FULL, upto, far);
        if (lane >= far) upto += before;
    }
    const double goal = *uniform * __shfl_sync(FULL, upto, 31);
    double sum = upto - own;
    int passed = 0;
#pragma unroll
    for (int i = 0; i < CHOICES; i++) sum += (double)v[i], passed += lane * CHOICES + i < n && sum <= goal;
    return min((int)__reduce_add_sync(FULL, (u32)passed), n - 1);
}
