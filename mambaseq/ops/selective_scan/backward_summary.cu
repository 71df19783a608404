// What a segment does to the gradient of the state after it: adds `local`, after decaying it by exp(A sum_dt). Arranged as
// forward.cu is: a channel has STATES / OWN threads, each of which makes what every so-manieth step needs.
#define SPLIT (STATES / OWN)    // threads of a channel
#define LANES (32 / SPLIT)      // channels of a warp
#define ROW (CHANNELS + LANES)  // spreads the steps that a warp reads over the banks

struct Shared {
    in_t dt[3][TILE * ROW], dy[3][TILE * ROW], z[3][HAS_Z ? TILE * ROW : 8];
    in_t C[2][CONSTANT_C ? 8 : TILE * STATES];
    float c[2][CONSTANT_C ? 4 : TILE * STATES];
};
static_assert(sizeof(Shared) <= SHARED, "more shared memory than was asked for");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    backward_summary(const in_t *dt, i64 dt_stride, const in_t *z, i64 z_stride, const in_t *C, i64 C_stride,
                     const float *A, const float *bias, const in_t *dy, i64 dy_stride, SEGMENTS, int go,
                     int channels, int d_state, int per_group, float *local, total_t *sum_dt) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &s = *reinterpret_cast<Shared *>(memory);
    const int n_blocks = (channels + CHANNELS - 1) / CHANNELS;
    const int segment = blockIdx.x / n_blocks, c0 = blockIdx.x % n_blocks * CHANNELS;
    const Segment here = segment_of(GIVEN_SEGMENTS, segment, go);
    const int length = here.length;
    if (length == 0 || (here.flags & 1)) return;  // nothing comes before it
    const int group_column = c0 / per_group * d_state, present = channels - c0;
    const int channel = threadIdx.x / SPLIT, sub = threadIdx.x % SPLIT, c = c0 + channel, first = sub * OWN;
    const bool is_channel = c < channels;
    float A2[OWN], dh[OWN], own_C[OWN], rests[OWN];
    total_t total = 0;
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        const bool exists = is_channel && first + n < d_state;
        A2[n] = exists ? rate(A[(i64)c * d_state + first + n], n) : 0.f;
        if (COMPLEX && n % 2) rests[n] = exists ? rest_of_rate(A[(i64)c * d_state + first + n]) : 0.f;
        if (CONSTANT_C) own_C[n] = exists ? of_C(((const float *)C)[(i64)c * d_state + first + n], n) : 0.f;
        dh[n] = 0.f;
    }
    const float own_bias = HAS_BIAS && is_channel ? bias[c] : 0.f;
    const int n_tiles = (length + TILE - 1) / TILE;
    const i64 last = here.row0 + (i64)(n_tiles - 1) * TILE * go;
    Reader<TILE, CHANNELS, ROW, VEC> read_dt(dt + last * dt_stride + c0, dt_stride * go, present, -1);
    Reader<TILE, CHANNELS, ROW, VEC> read_z(z + last * z_stride + c0, z_stride * go, present, -1);
    Reader<TILE, CHANNELS, ROW, VEC> read_dy(dy + last * dy_stride + c0, dy_stride * go, present, -1);
    Reader<TILE, STATES, STATES, VEC_BC> read_C(C + last * C_stride + group_column, C_stride * go, d_state, -1);
    auto fetch_tile = [&](int k, int at) {
        const int steps = length - k * TILE;
        if (k >= 0) {
            read_dt.fetch(s.dt[at], steps);
            read_dy.fetch(s.dy[at], steps);
            if (HAS_Z) read_z.fetch(s.z[at], steps);
            if (!CONSTANT_C) read_C.fetch(s.C[k & 1], steps);
        }
        commit();
    };
    auto widen_tile = [&](int k) {
        if (CONSTANT_C) return;
#pragma unroll
        for (int r = 0; r < TILE * STATES / THREADS; r++) {
            const int i = threadIdx.x + r * THREADS;
            s.c[k & 1][i] = of_C(widen(s.C[k & 1][i]), i);
        }
    };
    const int own = sub * ROW + channel;  // of a thread's first step in a tile
    float delta, out;                     // of its next
    auto prepare = [&](int i, bool exists) {
        delta = only_if(exists, step_size(widen(s.dt[0][i]), own_bias));
        out = widen(s.dy[0][i]);
        if (HAS_Z) {
            const float gate = widen(s.z[0][i]);
            out *= gate * sigmoid(gate);
        }
        total += delta;
    };
    constexpr int LAST = TILE - SPLIT;  // first step of the group that comes first
    fetch_tile(n_tiles - 1, 0);
    fetch_tile(n_tiles - 2, 1);
    wait<1>();
    __syncthreads();
    widen_tile(n_tiles - 1);
    prepare(LAST * ROW + own, (n_tiles - 1) * TILE + LAST + sub < length);
    int at = 0;
    for (int k = n_tiles - 1; k >= 0; k--) {
        wait<0>();
        __syncthreads();
        const int next = at == 2 ? 0 : at + 1, left = length - k * TILE - sub;
        fetch_tile(k - 2, next == 2 ? 0 : next + 1);
        if (k > 0) widen_tile(k - 1);
        const float *row = s.c[k & 1] + first;
#pragma unroll 4
        for (int t = LAST; t >= 0; t -= SPLIT) {
            const float own_delta = delta, own_out = out;
            const bool stays = t > 0;
            prepare((stays ? at * TILE + t - SPLIT : next * TILE + LAST) * ROW + own, stays ? t - SPLIT < left : k > 0);
#pragma unroll
            for (int j = SPLIT - 1; j >= 0; j--) {
                const float d = SPLIT == 1 ? own_delta : __shfl_sync(~0u, own_delta, j, SPLIT);
                const float o = SPLIT == 1 ? own_out : __shfl_sync(~0u, own_out, j, SPLIT);
#pragma unroll
                for (int n = 0; n < OWN; n += 4) {
                    const float4 w = CONSTANT_C ? make_float4(own_C[n], own_C[n + 1], own_C[n + 2], own_C[n + 3])
                                                : *(const float4 *)(row + (t + j) * STATES + n);
#if COMPLEX
                    const float more[4] = {o * w.x, o * w.y, o * w.z, o * w.w};
#pragma unroll
                    for (int m = 0; m < 4; m += 2) {
                        const Complex a = decay_of(d, A2[n + m], A2[n + m + 1], rests[n + m + 1]);
                        const float r = dh[n + m] + more[m], i = dh[n + m + 1] + more[m + 1];
                        dh[n + m] = fmaf(a.r, r, a.i * i), dh[n + m + 1] = fmaf(a.r, i, -a.i * r);
                    }
#else
                    dh[n] = ex2(d * A2[n]) * fmaf(o, w.x, dh[n]);
                    dh[n + 1] = ex2(d * A2[n + 1]) * fmaf(o, w.y, dh[n + 1]);
                    dh[n + 2] = ex2(d * A2[n + 2]) * fmaf(o, w.z, dh[n + 2]);
                    dh[n + 3] = ex2(d * A2[n + 3]) * fmaf(o, w.w, dh[n + 3]);
#endif
                }
            }
        }
        at = next;
    }
#pragma unroll
    for (int far = SPLIT / 2; far > 0; far /= 2) total += __shfl_xor_sync(~0u, total, far);
    if (!is_channel) return;
#pragma unroll
    for (int n = 0; n < OWN; n++)
        if (first + n < d_state) local[((i64)segment * channels + c) * d_state + first + n] = dh[n];
    if (sub == 0) sum_dt[(i64)segment * channels + c] = total;
}
