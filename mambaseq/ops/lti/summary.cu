// What a segment of a sequence makes of no state at all, each input entering every state as it is: the sum of a^(length - 1 - t)
// u_t. Forward u is x, which nothing gates; FROM_END, u is the gradient of the output, and a segment is read from its end.
struct Shared {
    in_t u[3][TILE * CH], z[3][HAS_Z ? TILE * CH : 8];
    float gated[2][HAS_Z ? TILE * CH : 4];
};
static_assert(sizeof(Shared) <= SHARED, "more shared memory than was asked for");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    summary(const in_t *u, i64 u_stride, const in_t *z, i64 z_stride, const float *a, SEGMENTS, int go, int channels,
            int d_state, float *local) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &s = *reinterpret_cast<Shared *>(memory);
    const int n_blocks = (channels + CH - 1) / CH;
    const int segment = blockIdx.x / n_blocks, c0 = blockIdx.x % n_blocks * CH;
    const Segment here = segment_of(GIVEN_SEGMENTS, segment, go);
    const int length = here.length;
    if (length == 0 || (here.flags & (FROM_END ? 1 : 2))) return;  // nothing follows the last one
    const int channel = threadIdx.x / SPLIT, sub = threadIdx.x % SPLIT, own_c = c0 + channel;
    Number A[OWN], h[OWN];
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        A[n] = number(a, (i64)own_c * d_state + sub * OWN + n, own_c < channels && sub * OWN + n < d_state);
        h[n] = Number{0.f, 0.f};
    }
    const int own = threadIdx.x % (CH / 2) * 2, rank = threadIdx.x / (CH / 2);
    const int n_tiles = (length + TILE - 1) / TILE, present = channels - c0;
    const i64 row0 = FROM_END ? here.row0 + (i64)(length - 1) * go : here.row0;
    const int along = FROM_END ? -go : go;
    Reader<TILE, CH, CH, VEC> read_u(u + row0 * u_stride + c0, u_stride * along, present, 1);
    Reader<TILE, CH, CH, VEC> read_z(z + row0 * z_stride + c0, z_stride * along, present, 1);
    auto fetch_tile = [&](int k) {
        if (k < n_tiles) {
            read_u.fetch(s.u[k % 3], length - k * TILE);
            if (HAS_Z) read_z.fetch(s.z[k % 3], length - k * TILE);
        }
        commit();
    };
    auto step = [&](float v) {
#pragma unroll
        for (int n = 0; n < OWN; n++) {
            if (COMPLEX) {
                const float r = fmaf(A[n].r, h[n].r, v), i = A[n].r * h[n].i, old = h[n].r;
                h[n].r = fmaf(-A[n].i, h[n].i, r), h[n].i = fmaf(A[n].i, old, i);
            } else {
                h[n].r = fmaf(A[n].r, h[n].r, v);
            }
        }
    };
    fetch_tile(0);
    for (int k = 0; k < n_tiles; k++) {
        wait<0>();
        __syncthreads();
        fetch_tile(k + 1);
        if (HAS_Z) {
#pragma unroll
            for (int t = rank; t < TILE; t += RANKS) {
                const float2 g = pair(s.z[k % 3] + t * CH + own);
                float2 v = pair(s.u[k % 3] + t * CH + own);
                v.x *= g.x * sigmoid(g.x), v.y *= g.y * sigmoid(g.y);
                *(float2 *)&s.gated[k & 1][t * CH + own] = v;
            }
            __syncthreads();
        }
        auto input = [&](int t) { return HAS_Z ? s.gated[k & 1][t * CH + channel] : widen(s.u[k % 3][t * CH + channel]); };
        const int steps = length - k * TILE;
        if (steps >= TILE) {
#pragma unroll 8
            for (int t = 0; t < TILE; t++) step(input(t));
        } else {
            for (int t = 0; t < steps; t++) step(input(t));
        }
    }
#pragma unroll
    for (int n = 0; n < OWN; n++)
        if (own_c < channels && sub * OWN + n < d_state)
            keep(local, ((i64)segment * channels + own_c) * d_state + sub * OWN + n, h[n]);
}
