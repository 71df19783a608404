// The gradients of the selective scan, channel-last. A block takes CHANNELS channels back through one segment; two channels have
// STATES / 4 threads of 4 states of each. A tile is the steps between two checkpoints: its states are made again from the
// first and kept, those of its first half in shared memory and those of its second in registers, and walked back. What B
// and C get is summed over the block's channels in a fixed order and written for each block; gather.cu sums over the
// blocks. No atomics: runs do not differ.
#define SPLIT (STATES / 4)  // threads of a pair of channels
#define KEPT (TILE / 2)     // steps whose states are kept in shared memory, and in registers
#define STRIDE_Y (CHANNELS + 16)  // spreads two steps over the banks
#define PART_G (TILE * CHANNELS + 16)  // and the two gradients
#define VALUES (2 * STATES)
#define ORDERS (COMPLEX ? 2 : 4)
#define WARPS (THREADS / 32)
#define SUMMED (SPLIT == 8 ? 64 : 32)  // numbers of a step that a warp sums over its channels
#define RANKS (THREADS / (CHANNELS / 2))  // rows that the block prepares at a time, two channels a thread
#define ROWS (TILE / RANKS)               // of a tile that a thread prepares
constexpr int UNROLLED = 2;  // steps of the first half that are written out

struct Shared {
    in_t x[2][TILE * CHANNELS], dt[2][TILE * CHANNELS], dy[2][TILE * CHANNELS], z[2][HAS_Z ? TILE * CHANNELS : 8];
    in_t B[2][CONSTANT_B ? 8 : TILE * STATES], C[2][CONSTANT_C ? 8 : TILE * STATES];
    float2 du[TILE * CHANNELS];  // delta, delta x
    float dout[TILE * CHANNELS];
    float bc[ORDERS][TILE * VALUES + 16];  // B and C in four orders, half of which lie in other banks
    float4 states[KEPT][2][THREADS];
    float y[TILE * STRIDE_Y];
    float g[2 * PART_G];  // gradients of delta x, and of the exponent
    float bc_sums[WARPS * TILE * SUMMED];
};
static_assert(sizeof(Shared) <= SHARED, "more shared memory than was asked for");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    backward(const in_t *x, i64 x_stride, const in_t *dt, i64 dt_stride, const in_t *z, i64 z_stride, const in_t *B,
             i64 B_stride, const in_t *C, i64 C_stride, const float *A, const float *D, const float *bias,
             const in_t *dy, i64 dy_stride, const float *dstate, SEGMENTS, int go, int channels, int d_state,
             int per_group, const float *checkpoints, i64 rows, in_t *dx, i64 dx_stride, in_t *ddt, in_t *dz, i64 dz_stride,
             in_t *gated, i64 gated_stride, float *dBC, float *dA,
             float *dD, float *dbias, float *dinitial, float *dB, float *dC) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &s = *reinterpret_cast<Shared *>(memory);
    const int n_blocks = (channels + CHANNELS - 1) / CHANNELS;
    const int segment = blockIdx.x / n_blocks, block = blockIdx.x % n_blocks, c0 = block * CHANNELS;
    const Segment here = segment_of(GIVEN_SEGMENTS, segment, go);
    const int length = here.length;
    if (length == 0) return;
    const i64 row0 = here.row0;
    const int group_column = c0 / per_group * d_state;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int channel = threadIdx.x / SPLIT * 2, sub = threadIdx.x % SPLIT, c = c0 + channel, first = sub * 4;
    // Register n of a channel holds state n ^ order: what a lane keeps in a sum over lanes then always lies in the lower half
    // of its registers, which spares the sums their selections.
    const int order = (lane >> 4 & 1) << 1 | (COMPLEX ? 0 : lane >> 3 & 1);
    auto number = [&](int n) { return first + (n % 4 ^ order); };  // of the state in register n
    float A2[8], rests[8], dh[8], sum_A[8], own_B[8], own_C[8], sum_B[8], sum_C_own[8];
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const i64 own_c = c + n / 4;
        bool exists = own_c < channels && number(n) < d_state;
        A2[n] = exists ? rate(A[own_c * d_state + number(n)], n) : 0.f;
        if (COMPLEX && n % 2) rests[n] = exists ? rest_of_rate(A[own_c * d_state + number(n)]) : 0.f;
        if (CONSTANT_B) own_B[n] = exists ? ((const float *)B)[own_c * d_state + number(n)] : 0.f, sum_B[n] = 0.f;
        if (CONSTANT_C) own_C[n] = exists ? of_C(((const float *)C)[own_c * d_state + number(n)], n) : 0.f, sum_C_own[n] = 0.f;
        dh[n] = exists && dstate ? dstate[((i64)segment * channels + own_c) * d_state + number(n)] : 0.f;
        sum_A[n] = 0.f;
    }
    const int own = threadIdx.x % (CHANNELS / 2) * 2, rank = threadIdx.x / (CHANNELS / 2);
    const float2 own_bias = HAS_BIAS ? channel_pair(bias, c0 + own, channels) : make_float2(0.f, 0.f);
    const float2 own_D = HAS_D ? channel_pair(D, c0 + own, channels) : make_float2(0.f, 0.f);
    float2 sum_D = make_float2(0.f, 0.f), sum_bias = make_float2(0.f, 0.f);

    const int n_tiles = (length + TILE - 1) / TILE;
    const int present = channels - c0;
    const i64 last = row0 + (i64)(n_tiles - 1) * TILE * go;
    Reader<TILE, CHANNELS, CHANNELS, VEC> read_x(x + last * x_stride + c0, x_stride * go, present, -1);
    Reader<TILE, CHANNELS, CHANNELS, VEC> read_dt(dt + last * dt_stride + c0, dt_stride * go, present, -1);
    Reader<TILE, CHANNELS, CHANNELS, VEC> read_z(z + last * z_stride + c0, z_stride * go, present, -1);
    Reader<TILE, CHANNELS, CHANNELS, VEC> read_dy(dy + last * dy_stride + c0, dy_stride * go, present, -1);
    Reader<TILE, STATES, STATES, VEC_BC> read_B(B + last * B_stride + group_column, B_stride * go, d_state, -1);
    Reader<TILE, STATES, STATES, VEC_BC> read_C(C + last * C_stride + group_column, C_stride * go, d_state, -1);
    auto fetch_tile = [&](int k) {
        const int steps = length - k * TILE, at = k & 1;
        if (k >= 0) {
            read_x.fetch(s.x[at], steps);
            read_dt.fetch(s.dt[at], steps);
            read_dy.fetch(s.dy[at], steps);
            if (HAS_Z) read_z.fetch(s.z[at], steps);
            if (!CONSTANT_B) read_B.fetch(s.B[at], steps);
            if (!CONSTANT_C) read_C.fetch(s.C[at], steps);
        }
        commit();
    };
    auto prepare = [&](int k) {
        int steps = length - k * TILE, at = k & 1;
        // all are read before any is written: the compiler does not know that the places differ
        float2 d[ROWS], u[ROWS], o[ROWS], v[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int place = (rank + r * RANKS) * CHANNELS + own;
            d[r] = pair(s.dt[at] + place), u[r] = pair(s.x[at] + place), o[r] = pair(s.dy[at] + place);
            if (HAS_Z) v[r] = pair(s.z[at] + place);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int t = rank + r * RANKS, place = t * CHANNELS + own;
            const float a = only_if(t < steps, step_size(d[r].x, own_bias.x));
            const float b = only_if(t < steps, step_size(d[r].y, own_bias.y));
            if (HAS_Z) o[r].x *= v[r].x * sigmoid(v[r].x), o[r].y *= v[r].y * sigmoid(v[r].y);
            *(float4 *)&s.du[place] = make_float4(a, a * u[r].x, b, b * u[r].y);
            *(float2 *)&s.dout[place] = o[r];
        }
        if (CONSTANT_B && CONSTANT_C) return;
#pragma unroll
        for (int r = 0; r < TILE * VALUES / 4 / THREADS; r++) {
            const int i = threadIdx.x + r * THREADS, t = i / (VALUES / 4), kind = i / (STATES / 4) % 2, n = i % (STATES / 4) * 4;
            const in_t *from = (kind ? s.C[at] : s.B[at]) + t * STATES + n;
            if (kind ? CONSTANT_C : CONSTANT_B) continue;
            const float2 a = pair(from), b = pair(from + 2);
            float *to = s.bc[0] + t * VALUES + kind * STATES + n;
#if COMPLEX
            const float over_r = kind ? 2.f : 1.f, over_i = kind ? -2.f : 1.f;
            *(float4 *)to = make_float4(over_r * a.x, over_i * a.y, over_r * b.x, over_i * b.y);
            *(float4 *)(to + (s.bc[1] - s.bc[0])) = make_float4(over_r * b.x, over_i * b.y, over_r * a.x, over_i * a.y);
#else
            *(float4 *)to = make_float4(a.x, a.y, b.x, b.y);
            *(float4 *)(to + (s.bc[1] - s.bc[0])) = make_float4(a.y, a.x, b.y, b.x);
            *(float4 *)(to + (s.bc[2] - s.bc[0])) = make_float4(b.x, b.y, a.x, a.y);
            *(float4 *)(to + (s.bc[3] - s.bc[0])) = make_float4(b.y, b.x, a.y, a.x);
#endif
        }
    };
    auto finish = [&](int k) {
        const int steps = min(TILE, length - k * TILE), at = k & 1;
        const i64 tile_row = row0 + (i64)k * TILE * go, row = tile_row + rank * go;
        in_t *to_dx = dx + row * dx_stride + c0 + own, *to_ddt = ddt + row * channels + c0 + own;
        in_t *to_dz = dz + row * dz_stride + c0 + own, *to_gated = gated + row * gated_stride + c0 + own;
#pragma unroll
        for (int t = rank; t < TILE; t += RANKS) {
            const int place = t * CHANNELS + own;
            const bool exists = t < steps;
            const float2 u = pair(s.x[at] + place), o = *(const float2 *)&s.dout[place];
            const float4 d = *(const float4 *)&s.du[place];
            const float2 gu = *(const float2 *)&s.g[place], ge = *(const float2 *)&s.g[PART_G + place];
            const float2 v = pair(s.dt[at] + place);
            float2 r = make_float2(fmaf(gu.x, d.x, own_D.x * o.x), fmaf(gu.y, d.z, own_D.y * o.y));
            put_pair(to_dx, r, c0 + own, channels, exists);
            if (HAS_Z) {
                const float2 gate = pair(s.z[at] + place), up = pair(s.dy[at] + place);
                const float m = sigmoid(gate.x), n = sigmoid(gate.y);
                float2 out = *(const float2 *)&s.y[t * STRIDE_Y + own];
                out.x = fmaf(own_D.x, u.x, out.x), out.y = fmaf(own_D.y, u.y, out.y);
                if (gated) put_pair(to_gated, make_float2(out.x * gate.x * m, out.y * gate.y * n), c0 + own, channels, exists);
                r.x = up.x * out.x * m * (1.f + gate.x * (1.f - m));
                r.y = up.y * out.y * n * (1.f + gate.y * (1.f - n));
                put_pair(to_dz, r, c0 + own, channels, exists);
            }
            r = make_float2(fmaf(gu.x, u.x, ge.x * LN2), fmaf(gu.y, u.y, ge.y * LN2));
            if (SOFTPLUS) r.x *= sigmoid(v.x + own_bias.x), r.y *= sigmoid(v.y + own_bias.y);
            put_pair(to_ddt, r, c0 + own, channels, exists);
            sum_D.x = fmaf(o.x, u.x, sum_D.x), sum_D.y = fmaf(o.y, u.y, sum_D.y);
            sum_bias.x += only_if(exists, r.x), sum_bias.y += only_if(exists, r.y);
            to_dx += RANKS * go * dx_stride, to_ddt += (i64)RANKS * go * channels, to_dz += RANKS * go * dz_stride;
            to_gated += RANKS * go * gated_stride;
        }
        if (CONSTANT_B && CONSTANT_C) return;
        // which of the 4 numbers of a thread a sum over its lanes is left with
        const int left = order | (COMPLEX ? lane >> 3 & 1 : 0);
        const int kind = SPLIT == 8 ? 0 : lane >> 2 & 1, column = kind * STATES + first + left;
        float *sums = dBC + ((i64)block * rows + tile_row + warp * go) * VALUES + column;
#pragma unroll
        for (int t = warp; t < TILE; t += WARPS, sums += WARPS * VALUES * go) {
            float total = 0.f, total_C = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                total += s.bc_sums[(w * TILE + t) * SUMMED + lane];
                if (SPLIT == 8) total_C += s.bc_sums[(w * TILE + t) * SUMMED + 32 + lane];
            }
            if (t < steps && (SPLIT >= 4 || (lane & 2) == 0)) *sums = SPLIT < 8 && kind ? of_C(total, left) : total;
            if (SPLIT == 8 && t < steps) sums[STATES] = of_C(total_C, left);
        }
    };
    // Sums of 4 states' values over lanes that differ in bits 3 and 4: each lane ends with the one of its register 0.
    auto butterfly = [&](const float *v) {
        const float p = v[0] + __shfl_xor_sync(~0u, v[2], 16), q = v[1] + __shfl_xor_sync(~0u, v[3], 16);
        if constexpr (COMPLEX) {
            const bool high = lane & 8;
            return (high ? q : p) + __shfl_xor_sync(~0u, high ? p : q, 8);
        }
        return p + __shfl_xor_sync(~0u, q, 8);
    };
    // Sums over lanes that differ in a bit: the lane keeps the one of two values that the bit chooses.
    auto halve = [&](int bit, float a, float b) {
        const bool high = lane & bit;
        return (high ? b : a) + __shfl_xor_sync(~0u, high ? a : b, bit);
    };
    // Of 8 threads of a pair of channels the upper 4 have the other part of each sum; both then write the same number.
    const int half = SPLIT == 8 ? sub >> 1 & 1 : sub >> 1;
    auto over_four = [&](float v) { return SPLIT == 8 ? v + __shfl_xor_sync(~0u, v, 4) : v; };
    const float *const own_bc = s.bc[COMPLEX ? order / 2 : order] + first;
    const float2 *const own_du = s.du + channel;
    const float *const own_dout = s.dout + channel;
    float *const own_sums = s.bc_sums + warp * TILE * SUMMED + lane;
    float y_even[2];
    // What a step takes from shared memory; read one step ahead, before the step in between writes there.
    struct Step {
        float4 now;  // delta, delta x of both channels
        float2 o;
        float4 b, w;
    };
    auto look = [&](int t) {
        Step step{*(const float4 *)(own_du + t * CHANNELS), *(const float2 *)(own_dout + t * CHANNELS)};
        if (!CONSTANT_B) step.b = *(const float4 *)(own_bc + t * VALUES);
        if (!CONSTANT_C) step.w = *(const float4 *)(own_bc + t * VALUES + STATES);
        return step;
    };
    auto B_of = [&](const float *step, int n) { return CONSTANT_B ? own_B[n] : step[n % 4]; };
    auto C_of = [&](const float *step, int n) { return CONSTANT_C ? own_C[n] : step[n % 4]; };
    // Takes the states over step t; returns this lane's part of what C gets.
    auto ahead = [&](int t, const Step &step, float *h) {
        const float4 now = step.now;
        const float b[4] = {step.b.x, step.b.y, step.b.z, step.b.w}, w[4] = {step.w.x, step.w.y, step.w.z, step.w.w};
        float y[2] = {0.f, 0.f}, v[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int m = n + 4;
#if COMPLEX
            if (n % 2 == 0) {
                advance(h[n], h[n + 1], decay_of(now.x, A2[n], A2[n + 1], rests[n + 1]), now.y * B_of(b, n), now.y * B_of(b, n + 1));
                advance(h[m], h[m + 1], decay_of(now.z, A2[m], A2[m + 1], rests[m + 1]), now.w * B_of(b, m), now.w * B_of(b, m + 1));
            }
#else
            h[n] = fmaf(ex2(now.x * A2[n]), h[n], now.y * B_of(b, n));
            h[m] = fmaf(ex2(now.z * A2[m]), h[m], now.w * B_of(b, m));
#endif
            if (CONSTANT_C)
                sum_C_own[n] = fmaf(h[n], step.o.x, sum_C_own[n]), sum_C_own[m] = fmaf(h[m], step.o.y, sum_C_own[m]);
            else
                v[n] = fmaf(h[n], step.o.x, h[m] * step.o.y);
            if (HAS_Z) y[0] = fmaf(h[n], C_of(w, n), y[0]), y[1] = fmaf(h[m], C_of(w, m), y[1]);
        }
        if (HAS_Z) {
            if constexpr (SPLIT >= 4) {
                if (t % 2 == 0) {
                    y_even[0] = y[0], y_even[1] = y[1];
                } else {
                    const float a = halve(2, y_even[0], y[0]), b = halve(2, y_even[1], y[1]);
                    s.y[(t - 1 + half) * STRIDE_Y + channel + (sub & 1)] = over_four(halve(1, a, b));
                }
            } else {
                s.y[t * STRIDE_Y + channel + sub] = halve(1, y[0], y[1]);
            }
        }
        if (CONSTANT_C) return 0.f;
        return butterfly(v);
    };
    // Takes the gradient of the states back over step t, before which they were `before`.
    auto back = [&](int t, const Step &step, const float *before, float sum_C) {
        const float b[4] = {step.b.x, step.b.y, step.b.z, step.b.w}, w[4] = {step.w.x, step.w.y, step.w.z, step.w.w};
        float gu[2] = {0.f, 0.f}, ge[2] = {0.f, 0.f}, v[4];
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const int i = n / 4;
            const float d = i ? step.now.z : step.now.x, u = i ? step.now.w : step.now.y;
            const float g = fmaf(i ? step.o.y : step.o.x, C_of(w, n), dh[n]);
            if (CONSTANT_B)
                sum_B[n] = fmaf(g, u, sum_B[n]);
            else
                v[n % 4] = i ? fmaf(g, u, v[n % 4]) : g * u;
            gu[i] = fmaf(g, B_of(b, n), gu[i]);
#if COMPLEX
            dh[n] = g;
            if (n % 2) {
                const Complex a = decay_of(d, A2[n - 1], A2[n], rests[n]);
                const float r = fmaf(a.r, dh[n - 1], a.i * g), m = fmaf(a.r, g, -a.i * dh[n - 1]);
                const float e = fmaf(before[n - 1], r, before[n] * m), f = fmaf(before[n - 1], m, -before[n] * r);
                ge[i] = fmaf(A2[n - 1], e, ge[i]), ge[i] = fmaf(A2[n] * (float)(1 / (PER_HALF_TURN * LN2)), f, ge[i]);
                sum_A[n - 1] = fmaf(d, e, sum_A[n - 1]), sum_A[n] = fmaf(d, f, sum_A[n]);
                dh[n - 1] = r, dh[n] = m;
            }
#else
            dh[n] = ex2(d * A2[n]) * g;
            const float e = dh[n] * before[n];
            ge[i] = fmaf(A2[n], e, ge[i]);
            sum_A[n] = fmaf(d, e, sum_A[n]);
#endif
        }
        float total = CONSTANT_B ? 0.f : butterfly(v);
        if constexpr (SPLIT == 8)
            own_sums[t * SUMMED + 32] = sum_C;
        else if constexpr (!CONSTANT_B || !CONSTANT_C)
            total = halve(4, total, sum_C);
        if constexpr (SPLIT >= 4) {
            const float a = halve(2, gu[0], ge[0]), b = halve(2, gu[1], ge[1]);
            s.g[half * PART_G + t * CHANNELS + channel + (sub & 1)] = over_four(halve(1, a, b));
        } else {
            total += __shfl_xor_sync(~0u, total, 2);
            s.g[t * CHANNELS + channel + sub] = halve(1, gu[0], gu[1]);
            s.g[PART_G + t * CHANNELS + channel + sub] = halve(1, ge[0], ge[1]);
        }
        own_sums[t * SUMMED] = total;
    };

    const i64 slot0 = here.checkpoint;
    fetch_tile(n_tiles - 1);
    for (int k = n_tiles - 1; k >= 0; k--) {
        float start[8];
        {
            const float *from = checkpoints + ((slot0 + k) * channels + c) * STATES;
#pragma unroll
            for (int n = 0; n < 8; n++) start[n] = c + n / 4 < channels ? from[n / 4 * STATES + number(n)] : 0.f;
        }
        wait<0>();
        __syncthreads();
        fetch_tile(k - 1);
        prepare(k);
        __syncthreads();
        float h[8];
#pragma unroll
        for (int n = 0; n < 8; n++) h[n] = start[n];
        Step step = look(0), next;
#pragma unroll UNROLLED
        for (int t = 0; t < KEPT; t++) {
            next = look(t + 1);
            s.states[t][0][threadIdx.x] = make_float4(h[0], h[1], h[2], h[3]);
            s.states[t][1][threadIdx.x] = make_float4(h[4], h[5], h[6], h[7]);
            own_sums[t * SUMMED] = ahead(t, step, h);
            step = next;
        }
        float before[KEPT][8], sum_C[KEPT];
#pragma unroll
        for (int t = 0; t < KEPT; t++) {
            if (t + 1 < KEPT) next = look(KEPT + t + 1);
#pragma unroll
            for (int n = 0; n < 8; n++) before[t][n] = h[n];
            sum_C[t] = ahead(KEPT + t, step, h);
            if (t + 1 < KEPT) step = next;
        }
#pragma unroll
        for (int t = KEPT - 1; t >= 0; t--) {
            next = look(KEPT + t - 1);
            back(KEPT + t, step, before[t], sum_C[t]);
            step = next;
        }
        auto remember = [&](int t, float *was) {
            *(float4 *)was = s.states[t][0][threadIdx.x];
            *(float4 *)(was + 4) = s.states[t][1][threadIdx.x];
            was[8] = own_sums[t * SUMMED];
        };
        float was[9], was_before[9];
        remember(KEPT - 1, was);
#pragma unroll UNROLLED
        for (int t = KEPT - 1; t >= 0; t--) {
            const int earlier = max(t - 1, 0);
            next = look(earlier);
            remember(earlier, was_before);
            back(t, step, was, was[8]);
            step = next;
#pragma unroll
            for (int n = 0; n < 9; n++) was[n] = was_before[n];
        }
        __syncthreads();
        finish(k);
    }
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const i64 own_c = c + n / 4;
        if (own_c >= channels || number(n) >= d_state) continue;
        const i64 place = ((i64)segment * channels + own_c) * d_state + number(n);
        dA[place] = sum_A[n];
        if (CONSTANT_B) dB[place] = sum_B[n];
        if (CONSTANT_C) dC[place] = of_C(sum_C_own[n], n);
        if (here.flags & 1) dinitial[((i64)here.sequence * channels + own_c) * d_state + number(n)] = dh[n];
    }
    __syncthreads();
    float2 *sums = (float2 *)s.g;
    sums[rank * CHANNELS + own] = make_float2(sum_D.x, sum_bias.x);
    sums[rank * CHANNELS + own + 1] = make_float2(sum_D.y, sum_bias.y);
    __syncthreads();
    if (threadIdx.x < CHANNELS && c0 + threadIdx.x < channels) {
        float2 total = make_float2(0.f, 0.f);
        for (int r = 0; r < RANKS; r++) {
            float2 part = sums[r * CHANNELS + threadIdx.x];
            total.x += part.x, total.y += part.y;
        }
        dD[(i64)segment * channels + c0 + threadIdx.x] = total.x;
        dbias[(i64)segment * channels + c0 + threadIdx.x] = total.y;
    }
}
