// The selective scan forward, channel-last. A block takes 64 channels through one segment; a channel has STATES / 4
// threads of 4 states. While the recurrence runs over one tile of steps, the output of the tile before is gated and
// written, the step sizes of the next are made, and the one after that is on its way from memory: one barrier a tile.
#define SPLIT (STATES / 4)  // threads of a channel
constexpr int UNROLLED = 16 / SPLIT;  // 16 steps are written out; 4 to 32 took the same time
#define STRIDE_Y (CHANNELS + 8)  // spreads the steps over the banks

struct Shared {
    in_t x[4][TILE * CHANNELS], z[4][HAS_Z ? TILE * CHANNELS : 8];
    in_t dt[2][TILE * CHANNELS], B[2][TILE * STATES], C[2][TILE * STATES];
    float2 du[2][TILE * CHANNELS];  // delta, delta x
    float bc[2][TILE * 2 * STATES];
    float y[2][TILE * STRIDE_Y];
};
static_assert(sizeof(Shared) <= SHARED, "more shared memory than was asked for");

// SUMMARY: instead of outputs, what a segment does to a state: adds `local`, after decaying it by exp(A sum_dt).
template <bool SUMMARY>
__device__ __forceinline__ void scan(const in_t *x, i64 x_stride, const in_t *dt, i64 dt_stride, const in_t *z,
                                     i64 z_stride, const in_t *B, i64 B_stride, const in_t *C, i64 C_stride,
                                     const float *A, const float *D, const float *bias, const float *initial,
                                     Segments segments, int go, int channels, int d_state, int per_group, in_t *y,
                                     float *final_state, float *checkpoints, float *sum_dt) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &s = *reinterpret_cast<Shared *>(memory);
    const int n_blocks = (channels + CHANNELS - 1) / CHANNELS;
    const int segment = blockIdx.x / n_blocks, c0 = blockIdx.x % n_blocks * CHANNELS;
    const int length = segments.length[segment];
    if (length == 0) return;
    if (SUMMARY && (segments.flags[segment] & 2)) return;  // nothing follows it
    const i64 row0 = segments.row0[segment];
    const int group_column = c0 / per_group * d_state;

    const int channel = threadIdx.x / SPLIT, sub = threadIdx.x % SPLIT, c = c0 + channel;
    float A2[4], h[4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
        bool exists = c < channels && sub * 4 + n < d_state;
        A2[n] = exists ? A[(i64)c * d_state + sub * 4 + n] * LOG2E : 0.f;
        h[n] = exists && initial ? initial[((i64)segment * channels + c) * d_state + sub * 4 + n] : 0.f;
    }
    const int own = threadIdx.x % 32 * 2;  // the pair of channels whose outputs and step sizes this thread makes
    const int rank = threadIdx.x / 32;
    const float2 own_bias = HAS_BIAS ? channel_pair(bias, c0 + own, channels) : make_float2(0.f, 0.f);
    const float2 own_D = HAS_D ? channel_pair(D, c0 + own, channels) : make_float2(0.f, 0.f);
    float total_dt[2] = {0.f, 0.f};

    in_t *const own_y = y + (row0 + rank * go) * channels + c0 + own;
    const i64 ranks = (i64)(THREADS / 32) * go * channels;
    const int n_tiles = (length + TILE - 1) / TILE;
    auto fetch_tile = [&](int k) {
        if (k < n_tiles) {
            int steps = min(TILE, length - k * TILE), left = channels - c0;
            i64 row = row0 + (i64)k * TILE * go;
            fetch<TILE, CHANNELS, VEC>(s.x[k & 3], x + row * x_stride + c0, x_stride * go, steps, left);
            fetch<TILE, CHANNELS, VEC>(s.dt[k & 1], dt + row * dt_stride + c0, dt_stride * go, steps, left);
            fetch<TILE, STATES, VEC_BC>(s.B[k & 1], B + row * B_stride + group_column, B_stride * go, steps, d_state);
            if (!SUMMARY) {
                if (HAS_Z) fetch<TILE, CHANNELS, VEC>(s.z[k & 3], z + row * z_stride + c0, z_stride * go, steps, left);
                fetch<TILE, STATES, VEC_BC>(s.C[k & 1], C + row * C_stride + group_column, C_stride * go, steps, d_state);
            }
        }
        commit();
    };
    auto prepare = [&](int k) {
        int steps = length - k * TILE;
        const in_t *raw_dt = s.dt[k & 1], *raw_x = s.x[k & 3];
#pragma unroll
        for (int t = rank; t < TILE; t += THREADS / 32) {
            float2 d = pair(raw_dt + t * CHANNELS + own), u = pair(raw_x + t * CHANNELS + own);
            d.x = t < steps ? step_size(d.x, own_bias.x) : 0.f;
            d.y = t < steps ? step_size(d.y, own_bias.y) : 0.f;
            if (SUMMARY) total_dt[0] += d.x, total_dt[1] += d.y;
            *(float4 *)&s.du[k & 1][t * CHANNELS + own] = make_float4(d.x, d.x * u.x, d.y, d.y * u.y);
        }
        for (int i = threadIdx.x; i < TILE * STATES; i += THREADS) {
            float *to = s.bc[k & 1] + i / STATES * 2 * STATES + i % STATES;
            to[0] = widen(s.B[k & 1][i]);
            if (!SUMMARY) to[STATES] = widen(s.C[k & 1][i]);
        }
    };
    auto finish = [&](int k) {
        int steps = min(TILE, length - k * TILE);
        const in_t *raw_x = s.x[k & 3], *raw_z = s.z[k & 3];
        const float *out = s.y[k & 1];
        in_t *to = own_y + (i64)k * TILE * go * channels;
#pragma unroll
        for (int t = rank; t < TILE; t += THREADS / 32, to += ranks) {
            if (t >= steps) break;
            float2 v = *(const float2 *)(out + t * STRIDE_Y + own);
            if (HAS_D) {
                float2 u = pair(raw_x + t * CHANNELS + own);
                v.x = fmaf(own_D.x, u.x, v.x), v.y = fmaf(own_D.y, u.y, v.y);
            }
            if (HAS_Z) {
                float2 g = pair(raw_z + t * CHANNELS + own);
                v.x *= g.x * sigmoid(g.x), v.y *= g.y * sigmoid(g.y);
            }
            put_pair(to, v, c0 + own, channels);
        }
    };

    fetch_tile(0);
    fetch_tile(1);
    wait<1>();
    __syncthreads();
    prepare(0);
    const i64 slot_size = (i64)channels * STATES;
    float *slot = checkpoints + segments.checkpoint[segment] * slot_size + (i64)c * STATES + sub * 4;
    for (int k = 0; k < n_tiles; k++) {
        wait<0>();
        __syncthreads();
        fetch_tile(k + 2);
        if (!SUMMARY && k > 0) finish(k - 1);
        if (k + 1 < n_tiles) prepare(k + 1);
        const float2 *du = s.du[k & 1] + channel;
        const float *bc = s.bc[k & 1] + sub * 4;
        float *out = s.y[k & 1] + channel;
#pragma unroll UNROLLED
        for (int t0 = 0; t0 < TILE; t0 += SPLIT) {
            if (!SUMMARY && t0 % EVERY == 0 && checkpoints && k * TILE + t0 < length) {
                if (c < channels) *(float4 *)slot = make_float4(h[0], h[1], h[2], h[3]);
                slot += slot_size;
            }
            float v[SPLIT];
#pragma unroll
            for (int j = 0; j < SPLIT; j++) {
                float2 now = du[(t0 + j) * CHANNELS];
                float4 b = *(const float4 *)(bc + (t0 + j) * 2 * STATES);
                h[0] = fmaf(ex2(now.x * A2[0]), h[0], now.y * b.x);
                h[1] = fmaf(ex2(now.x * A2[1]), h[1], now.y * b.y);
                h[2] = fmaf(ex2(now.x * A2[2]), h[2], now.y * b.z);
                h[3] = fmaf(ex2(now.x * A2[3]), h[3], now.y * b.w);
                if (!SUMMARY) {
                    float4 w = *(const float4 *)(bc + (t0 + j) * 2 * STATES + STATES);
                    v[j] = fmaf(h[3], w.w, fmaf(h[2], w.z, fmaf(h[1], w.y, h[0] * w.x)));
                }
            }
            if (!SUMMARY) {
                // sums over the threads of a channel, each of which ends with the sum of one step
                if constexpr (SPLIT == 4) {
                    bool high = sub & 2, odd = sub & 1;
                    float keep0 = high ? v[2] : v[0], keep1 = high ? v[3] : v[1];
                    keep0 += __shfl_xor_sync(~0u, high ? v[0] : v[2], 2);
                    keep1 += __shfl_xor_sync(~0u, high ? v[1] : v[3], 2);
                    v[0] = (odd ? keep1 : keep0) + __shfl_xor_sync(~0u, odd ? keep0 : keep1, 1);
                } else if constexpr (SPLIT == 2) {
                    v[0] = (sub ? v[1] : v[0]) + __shfl_xor_sync(~0u, sub ? v[0] : v[1], 1);
                }
                out[(t0 + sub) * STRIDE_Y] = v[0];
            }
        }
    }
    if (SUMMARY) {
        // the sums over the rows that the threads of a pair of channels made
        __syncthreads();
        float *sums = (float *)s.y[0];
        *(float2 *)(sums + rank * CHANNELS + own) = make_float2(total_dt[0], total_dt[1]);
        __syncthreads();
        if (threadIdx.x < CHANNELS && c0 + threadIdx.x < channels) {
            float total = 0.f;
            for (int r = 0; r < THREADS / 32; r++) total += sums[r * CHANNELS + threadIdx.x];
            sum_dt[(i64)segment * channels + c0 + threadIdx.x] = total;
        }
    } else {
        __syncthreads();
        finish(n_tiles - 1);
    }
    bool last = SUMMARY || (segments.flags[segment] & 2);
    if (final_state && last && c < channels) {
        i64 to = SUMMARY ? segment : segments.sequence[segment];
#pragma unroll
        for (int n = 0; n < 4; n++)
            if (sub * 4 + n < d_state) final_state[(to * channels + c) * d_state + sub * 4 + n] = h[n];
    }
}

#define PARAMETERS                                                                                                     \
    const in_t *x, i64 x_stride, const in_t *dt, i64 dt_stride, const in_t *z, i64 z_stride, const in_t *B,           \
        i64 B_stride, const in_t *C, i64 C_stride, const float *A, const float *D, const float *bias,                 \
        const float *initial, const i64 *row0, const int *lengths, const int *sequence, const int *flags,             \
        const i64 *checkpoint, int go, int channels, int d_state, int per_group, in_t *y, float *final_state,         \
        float *checkpoints, float *sum_dt
#define ARGUMENTS                                                                                                      \
    x, x_stride, dt, dt_stride, z, z_stride, B, B_stride, C, C_stride, A, D, bias, initial,                           \
        Segments{row0, lengths, sequence, flags, checkpoint}, go, channels, d_state, per_group, y, final_state,       \
        checkpoints, sum_dt

extern "C" __global__ void __launch_bounds__(THREADS, 2) forward(PARAMETERS) { scan<false>(ARGUMENTS); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) forward_summary(PARAMETERS) { scan<true>(ARGUMENTS); }
