// The time-invariant scan forward, channel-last. A block takes CH channels through one segment of a sequence; a channel has
// SPLIT threads of OWN states each. While the recurrence runs over one tile of steps, the outputs of the tile before are gated
// and written, and the tile behind is on its way from memory: one barrier a tile.
struct Shared {
    in_t x[3][TILE * CH], z[3][HAS_Z ? TILE * CH : 8];
    float y[2][TILE * ROW_Y];
};
static_assert(sizeof(Shared) <= SHARED, "more shared memory than was asked for");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    forward(const in_t *x, i64 x_stride, const in_t *z, i64 z_stride, const float *a, const float *b, const float *c,
            const float *D, const float *entering, int by_segment, SEGMENTS, int go, int channels, int d_state, in_t *y,
            float *final_state) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &s = *reinterpret_cast<Shared *>(memory);
    const int n_blocks = (channels + CH - 1) / CH;
    const int segment = blockIdx.x / n_blocks, c0 = blockIdx.x % n_blocks * CH;
    const Segment here = segment_of(GIVEN_SEGMENTS, segment, go);
    const int length = here.length;
    if (length == 0) return;
    const int channel = threadIdx.x / SPLIT, sub = threadIdx.x % SPLIT, own_c = c0 + channel;
    Number A[OWN], B[OWN], C[OWN], h[OWN];
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        const int state = sub * OWN + n;
        const bool exists = own_c < channels && state < d_state;
        const i64 place = (i64)own_c * d_state + state;
        A[n] = number(a, place, exists), B[n] = number(b, place, exists), C[n] = number(c, place, exists);
        if (COMPLEX) C[n].r *= 2.f, C[n].i *= -2.f;
        h[n] = number(entering, (i64)(by_segment ? segment : here.sequence) * channels * d_state + place, exists);
    }
    const int own = threadIdx.x % (CH / 2) * 2, rank = threadIdx.x / (CH / 2);
    const float2 own_D = HAS_D ? channel_pair(D, c0 + own, channels) : make_float2(0.f, 0.f);
    const int n_tiles = (length + TILE - 1) / TILE, present = channels - c0;
    Reader<TILE, CH, CH, VEC> read_x(x + here.row0 * x_stride + c0, x_stride * go, present, 1);
    Reader<TILE, CH, CH, VEC> read_z(z + here.row0 * z_stride + c0, z_stride * go, present, 1);
    auto fetch_tile = [&](int k) {
        if (k < n_tiles) {
            read_x.fetch(s.x[k % 3], length - k * TILE);
            if (HAS_Z) read_z.fetch(s.z[k % 3], length - k * TILE);
        }
        commit();
    };
    auto finish = [&](int k) {
        const int steps = min(TILE, length - k * TILE);
        in_t *to = y + (here.row0 + (i64)(k * TILE + rank) * go) * channels + c0 + own;
#pragma unroll
        for (int t = rank; t < TILE; t += RANKS, to += (i64)RANKS * go * channels) {
            float2 v = *(const float2 *)&s.y[k & 1][t * ROW_Y + own];
            const float2 u = pair(s.x[k % 3] + t * CH + own);
            if (HAS_D) v.x = fmaf(own_D.x, u.x, v.x), v.y = fmaf(own_D.y, u.y, v.y);
            if (HAS_Z) {
                const float2 g = pair(s.z[k % 3] + t * CH + own);
                v.x *= g.x * sigmoid(g.x), v.y *= g.y * sigmoid(g.y);
            }
            put_pair(to, v, c0 + own, channels, t < steps);
        }
    };
    auto step = [&](float u) {
        float out = 0.f;
#pragma unroll
        for (int n = 0; n < OWN; n++) {
            if (COMPLEX) {
                const float r = fmaf(A[n].r, h[n].r, B[n].r * u), i = fmaf(A[n].r, h[n].i, B[n].i * u);
                const float old = h[n].r;
                h[n].r = fmaf(-A[n].i, h[n].i, r), h[n].i = fmaf(A[n].i, old, i);
                out = fmaf(C[n].r, h[n].r, out), out = fmaf(C[n].i, h[n].i, out);
            } else {
                h[n].r = fmaf(A[n].r, h[n].r, B[n].r * u);
                out = fmaf(C[n].r, h[n].r, out);
            }
        }
        return out;
    };
    fetch_tile(0);
    for (int k = 0; k <= n_tiles; k++) {
        wait<0>();
        __syncthreads();
        fetch_tile(k + 1);
        if (k) finish(k - 1);
        if (k == n_tiles) break;
        const in_t *from = s.x[k % 3] + channel;
        float *to = s.y[k & 1] + sub * ROW_Y + channel;
        const int steps = length - k * TILE;
        float v[SPLIT];
        if (steps >= TILE) {
#pragma unroll 2
            for (int t = 0; t < TILE; t += SPLIT) {
#pragma unroll
                for (int j = 0; j < SPLIT; j++) v[j] = step(widen(from[(t + j) * CH]));
                to[t * ROW_Y] = share(v, sub);
            }
        } else {
            for (int t = 0; t < steps; t += SPLIT) {
#pragma unroll
                for (int j = 0; j < SPLIT; j++) v[j] = t + j < steps ? step(widen(from[(t + j) * CH])) : 0.f;
                to[t * ROW_Y] = share(v, sub);
            }
        }
    }
    if (here.flags & 2) {
#pragma unroll
        for (int n = 0; n < OWN; n++)
            if (own_c < channels && sub * OWN + n < d_state)
                keep(final_state, ((i64)here.sequence * channels + own_c) * d_state + sub * OWN + n, h[n]);
    }
}
