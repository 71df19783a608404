// The selective scan forward, channel-last. A block takes CHANNELS channels through one segment; a channel has STATES / OWN
// threads of OWN states, each of which also makes the step size of every so-manieth step, hands it to the others, and
// gates and writes that step's output. While the recurrence runs over one tile of steps, B and C of the next are widened
// and the tile after that is on its way from memory: one barrier a tile.
#define SPLIT (STATES / OWN)       // threads of a channel
#define LANES (32 / SPLIT)         // channels of a warp
#define ROW (CHANNELS + LANES)     // spreads the steps that a warp reads over the banks

struct Shared {
    in_t x[3][TILE * ROW], dt[3][TILE * ROW], z[3][HAS_Z ? TILE * ROW : 8];
    in_t B[2][CONSTANT_B ? 8 : TILE * STATES], C[2][CONSTANT_C ? 8 : TILE * STATES];
    float bc[2][CONSTANT_B && CONSTANT_C ? 4 : TILE * 2 * STATES];
};
static_assert(sizeof(Shared) <= SHARED, "more shared memory than was asked for");

// Segments begin with the states `initial` of their sequences, or `entering` of their own. SUMMARY: instead of outputs, what
// a segment does to a state: adds `local`, after decaying it by exp(A sum_dt).
template <bool SUMMARY>
__device__ __forceinline__ void scan(const in_t *x, i64 x_stride, const in_t *dt, i64 dt_stride, const in_t *z,
                                     i64 z_stride, const in_t *B, i64 B_stride, const in_t *C, i64 C_stride,
                                     const weight_t *A, const weight_t *D, const weight_t *bias, const float *initial,
                                     const float *entering, const Segment &here, int segment, int go, int channels,
                                     int d_state, int per_group, in_t *y,
                                     i64 y_stride, float *final_state, float *checkpoints, float *local,
                                     total_t *sum_dt) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &s = *reinterpret_cast<Shared *>(memory);
    const int n_blocks = (channels + CHANNELS - 1) / CHANNELS;
    const int c0 = blockIdx.x % n_blocks * CHANNELS, length = here.length;
    if (length == 0) return;
    if (SUMMARY && (here.flags & 2)) return;  // nothing follows it
    const i64 row0 = here.row0;
    const int group_column = c0 / per_group * d_state;

    const int channel = threadIdx.x / SPLIT, sub = threadIdx.x % SPLIT, c = c0 + channel, first = sub * OWN;
    const bool is_channel = c < channels;
    float A2[OWN], h[OWN], own_B[OWN], own_C[OWN], rests[OWN];
    const float *const before = SUMMARY ? nullptr : entering ? entering : initial;
    const i64 from = entering ? segment : here.sequence;
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        bool exists = is_channel && first + n < d_state;
        A2[n] = exists ? rate(weight(A[(i64)c * d_state + first + n]), n) : 0.f;
        if (COMPLEX && n % 2) rests[n] = exists ? rest_of_rate(weight(A[(i64)c * d_state + first + n])) : 0.f;
        if (CONSTANT_B) own_B[n] = exists ? ((const float *)B)[(i64)c * d_state + first + n] : 0.f;
        if (CONSTANT_C) own_C[n] = exists && !SUMMARY ? of_C(((const float *)C)[(i64)c * d_state + first + n], n) : 0.f;
        h[n] = exists && before ? before[(from * channels + c) * d_state + first + n] : 0.f;
    }
    const float own_bias = HAS_BIAS && is_channel ? weight(bias[c]) : 0.f;
    const float own_D = HAS_D && is_channel ? weight(D[c]) : 0.f;
    total_t total_dt = 0;

    const int n_tiles = (length + TILE - 1) / TILE;
    const int present = channels - c0;
    Reader<TILE, CHANNELS, ROW, VEC> read_x(x + row0 * x_stride + c0, x_stride * go, present, 1);
    Reader<TILE, CHANNELS, ROW, VEC> read_dt(dt + row0 * dt_stride + c0, dt_stride * go, present, 1);
    Reader<TILE, CHANNELS, ROW, VEC> read_z(z + row0 * z_stride + c0, z_stride * go, present, 1);
    Reader<TILE, STATES, STATES, VEC_BC> read_B(B + row0 * B_stride + group_column, B_stride * go, d_state, 1);
    Reader<TILE, STATES, STATES, VEC_BC> read_C(C + row0 * C_stride + group_column, C_stride * go, d_state, 1);
    auto fetch_tile = [&](int k, int at) {
        const int steps = length - k * TILE;
        if (steps > 0) {
            read_x.fetch(s.x[at], steps);
            read_dt.fetch(s.dt[at], steps);
            if (HAS_Z && !SUMMARY) read_z.fetch(s.z[at], steps);
            if (!CONSTANT_B) read_B.fetch(s.B[k & 1], steps);
            if (!CONSTANT_C && !SUMMARY) read_C.fetch(s.C[k & 1], steps);
        }
        commit();
    };
    auto widen_tile = [&](int k) {
        if (CONSTANT_B && CONSTANT_C) return;
#pragma unroll
        for (int r = 0; r < (TILE * STATES + THREADS - 1) / THREADS; r++) {
            const int i = threadIdx.x + r * THREADS;
            if (TILE * STATES % THREADS && i >= TILE * STATES) break;
            float *to = s.bc[k & 1] + i / STATES * 2 * STATES + i % STATES;
            if (!CONSTANT_B) to[0] = widen(s.B[k & 1][i]);
            if (!CONSTANT_C && !SUMMARY) to[STATES] = of_C(widen(s.C[k & 1][i]), i);
        }
    };
    const int own = sub * ROW + channel;  // of a thread's first step in a tile
    float u, delta;                       // of its next
    auto prepare = [&](int i, bool exists) {
        u = widen(s.x[0][i]);
        delta = only_if(exists, step_size(widen(s.dt[0][i]), own_bias));
        if (SUMMARY) total_dt += delta;
    };

    fetch_tile(0, 0);
    fetch_tile(1, 1);
    wait<1>();
    __syncthreads();
    widen_tile(0);
    prepare(own, sub < length);
    const i64 slot_size = (i64)channels * STATES, y_go = y_stride * go * SPLIT;
    float *slot = checkpoints + here.checkpoint * slot_size + (i64)c * STATES + first;
    in_t *to = y + (row0 + sub * go) * y_stride + c;
    int at = 0;
    for (int k = 0; k < n_tiles; k++) {
        wait<0>();
        __syncthreads();
        const int next = at == 2 ? 0 : at + 1;
        fetch_tile(k + 2, next == 2 ? 0 : next + 1);
        if (k + 1 < n_tiles) widen_tile(k + 1);
        const float *bc = s.bc[k & 1] + first;
        int left = length - k * TILE - sub, now = at * TILE * ROW + own;
#pragma unroll 1
        for (int part = 0; part < TILE / EVERY; part++, left -= EVERY, bc += EVERY * 2 * STATES) {
            if (!SUMMARY && checkpoints && left + sub > 0) {
                if (is_channel) {
#pragma unroll
                    for (int n = 0; n < OWN; n += 4) *(float4 *)(slot + n) = make_float4(h[n], h[n + 1], h[n + 2], h[n + 3]);
                }
                slot += slot_size;
            }
            const int after = part + 1 < TILE / EVERY ? now + EVERY * ROW : next * TILE * ROW + own;
#pragma unroll
            for (int t = 0; t < EVERY; t += SPLIT) {
            const float own_u = u, own_delta = delta, own_du = delta * u;
            prepare(t + SPLIT < EVERY ? now + (t + SPLIT) * ROW : after, t + SPLIT < left);
            float v[SPLIT];
#pragma unroll
            for (int j = 0; j < SPLIT; j++) {
                const float d = SPLIT == 1 ? own_delta : __shfl_sync(~0u, own_delta, j, SPLIT);
                const float du = SPLIT == 1 ? own_du : __shfl_sync(~0u, own_du, j, SPLIT);
                const float *row = bc + (t + j) * 2 * STATES;
                v[j] = 0.f;
#pragma unroll
                for (int n = 0; n < OWN; n += 4) {
                    const float4 b = CONSTANT_B ? make_float4(own_B[n], own_B[n + 1], own_B[n + 2], own_B[n + 3])
                                                : *(const float4 *)(row + n);
#if COMPLEX
                    advance(h[n], h[n + 1], decay_of(d, A2[n], A2[n + 1], rests[n + 1]), du * b.x, du * b.y);
                    advance(h[n + 2], h[n + 3], decay_of(d, A2[n + 2], A2[n + 3], rests[n + 3]), du * b.z, du * b.w);
#else
                    h[n] = fmaf(ex2(d * A2[n]), h[n], du * b.x);
                    h[n + 1] = fmaf(ex2(d * A2[n + 1]), h[n + 1], du * b.y);
                    h[n + 2] = fmaf(ex2(d * A2[n + 2]), h[n + 2], du * b.z);
                    h[n + 3] = fmaf(ex2(d * A2[n + 3]), h[n + 3], du * b.w);
#endif
                    if (!SUMMARY) {
                        const float4 w = CONSTANT_C ? make_float4(own_C[n], own_C[n + 1], own_C[n + 2], own_C[n + 3])
                                                    : *(const float4 *)(row + STATES + n);
                        v[j] = fmaf(h[n], w.x, v[j]);
                        v[j] = fmaf(h[n + 1], w.y, v[j]);
                        v[j] = fmaf(h[n + 2], w.z, v[j]);
                        v[j] = fmaf(h[n + 3], w.w, v[j]);
                    }
                }
            }
            if (!SUMMARY) {
                // sums over the threads of a channel, each of which ends with that of its own step
                float out = v[0];
                if constexpr (SPLIT == 4) {
                    const bool high = sub & 2, odd = sub & 1;
                    float keep0 = high ? v[2] : v[0], keep1 = high ? v[3] : v[1];
                    keep0 += __shfl_xor_sync(~0u, high ? v[0] : v[2], 2);
                    keep1 += __shfl_xor_sync(~0u, high ? v[1] : v[3], 2);
                    out = (odd ? keep1 : keep0) + __shfl_xor_sync(~0u, odd ? keep0 : keep1, 1);
                } else if constexpr (SPLIT == 2) {
                    out = (sub ? v[1] : v[0]) + __shfl_xor_sync(~0u, sub ? v[0] : v[1], 1);
                }
                if (HAS_D) out = fmaf(own_D, own_u, out);
                if (HAS_Z) {
                    const float gate = widen(s.z[0][now + t * ROW]);
                    out *= gate * sigmoid(gate);
                }
                put(to, out, t < left && is_channel);
                to += y_go;
            }
            }
            now = after;
        }
        at = next;
    }
    if (SUMMARY) {
#pragma unroll
        for (int far = SPLIT / 2; far > 0; far /= 2) total_dt += __shfl_xor_sync(~0u, total_dt, far);
        if (sub == 0 && is_channel) sum_dt[(i64)segment * channels + c] = total_dt;
    }
    const bool last = here.flags & 2;
    float *const left_over = last ? final_state : local;
    if (left_over && is_channel) {
        const i64 number = last ? here.sequence : segment;
#pragma unroll
        for (int n = 0; n < OWN; n++)
            if (first + n < d_state) left_over[(number * channels + c) * d_state + first + n] = h[n];
    }
}

// part 0: outputs of all segments. Where sequences are cut, part 1: outputs of each sequence's first segment, whose state is
// known, and summaries of the others; part 2: outputs of the others.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    forward(int part, const in_t *x, i64 x_stride, const in_t *dt, i64 dt_stride, const in_t *z, i64 z_stride, const in_t *B,
            i64 B_stride, const in_t *C, i64 C_stride, const weight_t *A, const weight_t *D, const weight_t *bias,
            const float *initial, const float *entering, SEGMENTS, int go, int channels, int d_state, int per_group, in_t *y,
            i64 y_stride, float *final_state, float *checkpoints, float *local, total_t *sum_dt) {
    const int segment = blockIdx.x / ((channels + CHANNELS - 1) / CHANNELS);
    const Segment here = segment_of(GIVEN_SEGMENTS, segment, go);
    const bool is_first = here.flags & 1;
    if (part == 2 && is_first) return;
    if (part == 1 && !is_first)
        scan<true>(x, x_stride, dt, dt_stride, z, z_stride, B, B_stride, C, C_stride, A, D, bias, initial, entering, here,
                   segment, go, channels, d_state, per_group, y, y_stride, final_state, checkpoints, local, sum_dt);
    else
        scan<false>(x, x_stride, dt, dt_stride, z, z_stride, B, B_stride, C, C_stride, A, D, bias, initial, entering, here,
                    segment, go, channels, d_state, per_group, y, y_stride, final_state, checkpoints, local, sum_dt);
}
