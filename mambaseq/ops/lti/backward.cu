// The gradients of the time-invariant scan, channel-last, in two kernels of one body. INPUTS goes through a segment from its end:
// the gradients of the states, of x, of B and of the state that entered. The other one goes from its beginning, through the states
// and what each would be if a were a little larger (p_t = a p_(t-1) + h_(t-1)): the gradients of a, C, z and D. What B, a, C and
// D get is written for each segment and summed over them later: no atomics, so that results repeat.
struct Shared {
    in_t x[3][TILE * CH], dy[3][TILE * CH], z[3][HAS_Z ? TILE * CH : 8];
    float up[2][TILE * CH];  // the gradient of the output before its gate
    float y[TILE * ROW_Y];   // sums over states: of dx, or the output before its gate
};
static_assert(sizeof(Shared) <= SHARED, "more shared memory than was asked for");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    backward(const in_t *x, i64 x_stride, const in_t *z, i64 z_stride, const in_t *dy, i64 dy_stride, const float *a,
             const float *b, const float *c, const float *D, const float *entering, int by_segment, const float *leaving,
             int leaving_by_segment, SEGMENTS, int go, int channels, int d_state, in_t *dx, in_t *dz, i64 dz_stride,
             in_t *gated, i64 gated_stride, float *dB, float *dA,
             float *dC, float *dD, float *dinitial) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &s = *reinterpret_cast<Shared *>(memory);
    const int n_blocks = (channels + CH - 1) / CH;
    const int segment = blockIdx.x / n_blocks, c0 = blockIdx.x % n_blocks * CH;
    const Segment here = segment_of(GIVEN_SEGMENTS, segment, go);
    const int length = here.length;
    const int channel = threadIdx.x / SPLIT, sub = threadIdx.x % SPLIT, own_c = c0 + channel;
    const i64 size = (i64)channels * d_state;
    // INPUTS: h is the gradient of the state, sum_1 that of B. Else h is the state, p its slope in a, sum_1 that of C, sum_2 of a.
    Number A[OWN], B[OWN], C[OWN], h[OWN], p[OWN], sum_1[OWN], sum_2[OWN];
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        const int state = sub * OWN + n;
        const bool exists = own_c < channels && state < d_state;
        const i64 place = (i64)own_c * d_state + state;
        A[n] = number(a, place, exists), B[n] = number(b, place, exists), C[n] = number(c, place, exists);
        if (COMPLEX) C[n].r *= 2.f, C[n].i *= -2.f;
        h[n] = INPUTS ? number(leaving, (leaving_by_segment ? segment : here.sequence) * size + place, exists && length)
                      : number(entering, (by_segment ? segment : here.sequence) * size + place, exists && length);
        p[n] = sum_1[n] = sum_2[n] = Number{0.f, 0.f};
    }
    const int own = threadIdx.x % (CH / 2) * 2, rank = threadIdx.x / (CH / 2);
    const float2 own_D = HAS_D ? channel_pair(D, c0 + own, channels) : make_float2(0.f, 0.f);
    float2 sum_D = make_float2(0.f, 0.f);
    const int n_tiles = (length + TILE - 1) / TILE, present = channels - c0;
    // INPUTS reads a segment from its last row
    const i64 row0 = INPUTS ? here.row0 + (i64)(length - 1) * go : here.row0;
    const int along = INPUTS ? -go : go;
    Reader<TILE, CH, CH, VEC> read_x(x + row0 * x_stride + c0, x_stride * along, present, 1);
    Reader<TILE, CH, CH, VEC> read_z(z + row0 * z_stride + c0, z_stride * along, present, 1);
    Reader<TILE, CH, CH, VEC> read_dy(dy + row0 * dy_stride + c0, dy_stride * along, present, 1);
    auto fetch_tile = [&](int k) {
        if (k < n_tiles) {
            read_x.fetch(s.x[k % 3], length - k * TILE);
            read_dy.fetch(s.dy[k % 3], length - k * TILE);
            if (HAS_Z) read_z.fetch(s.z[k % 3], length - k * TILE);
        }
        commit();
    };
    auto prepare = [&](int k) {
#pragma unroll
        for (int t = rank; t < TILE; t += RANKS) {
            float2 v = pair(s.dy[k % 3] + t * CH + own);
            if (HAS_Z) {
                const float2 g = pair(s.z[k % 3] + t * CH + own);
                v.x *= g.x * sigmoid(g.x), v.y *= g.y * sigmoid(g.y);
            }
            *(float2 *)&s.up[k & 1][t * CH + own] = v;
        }
    };
    auto finish = [&](int k) {
        const int steps = min(TILE, length - k * TILE);
        const i64 row = row0 + (i64)(k * TILE + rank) * along, stride = INPUTS ? channels : dz_stride;
        in_t *to = (INPUTS ? dx : dz) + row * stride + c0 + own, *to_gated = gated + row * gated_stride + c0 + own;
#pragma unroll
        for (int t = rank; t < TILE; t += RANKS, to += RANKS * along * stride, to_gated += RANKS * along * gated_stride) {
            const float2 up = *(const float2 *)&s.up[k & 1][t * CH + own];
            if (INPUTS) {
                float2 v = *(const float2 *)&s.y[t * ROW_Y + own];
                if (HAS_D) v.x = fmaf(own_D.x, up.x, v.x), v.y = fmaf(own_D.y, up.y, v.y);
                put_pair(to, v, c0 + own, channels, t < steps);
                continue;
            }
            const float2 u = pair(s.x[k % 3] + t * CH + own);
            sum_D.x = fmaf(up.x, u.x, sum_D.x), sum_D.y = fmaf(up.y, u.y, sum_D.y);
            if (HAS_Z) {
                float2 v = *(const float2 *)&s.y[t * ROW_Y + own];
                const float2 g = pair(s.z[k % 3] + t * CH + own), o = pair(s.dy[k % 3] + t * CH + own);
                if (HAS_D) v.x = fmaf(own_D.x, u.x, v.x), v.y = fmaf(own_D.y, u.y, v.y);
                const float m = sigmoid(g.x), n = sigmoid(g.y);
                if (gated) put_pair(to_gated, make_float2(v.x * g.x * m, v.y * g.y * n), c0 + own, channels, t < steps);
                v.x *= o.x * m * (1.f + g.x * (1.f - m)), v.y *= o.y * n * (1.f + g.y * (1.f - n));
                put_pair(to, v, c0 + own, channels, t < steps);
            }
        }
    };
    auto step = [&](float u, float up) {
        float out = 0.f;
#pragma unroll
        for (int n = 0; n < OWN; n++) {
            Number &g = h[n];
            if (INPUTS) {
                // C holds 2 conj(C)
                g.r = fmaf(C[n].r, up, g.r);
                out = fmaf(g.r, B[n].r, out), sum_1[n].r = fmaf(g.r, u, sum_1[n].r);
                if (COMPLEX) {
                    g.i = fmaf(C[n].i, up, g.i);
                    out = fmaf(g.i, B[n].i, out), sum_1[n].i = fmaf(g.i, u, sum_1[n].i);
                    const float r = g.r * A[n].r, i = g.i * A[n].r, old = g.r;  // times conj(a)
                    g.r = fmaf(g.i, A[n].i, r), g.i = fmaf(-old, A[n].i, i);
                } else {
                    g.r *= A[n].r;
                }
                continue;
            }
            if (COMPLEX) {
                const float pr = fmaf(A[n].r, p[n].r, g.r), pi = fmaf(A[n].r, p[n].i, g.i), old_p = p[n].r;
                p[n].r = fmaf(-A[n].i, p[n].i, pr), p[n].i = fmaf(A[n].i, old_p, pi);
                const float r = fmaf(A[n].r, g.r, B[n].r * u), i = fmaf(A[n].r, g.i, B[n].i * u), old = g.r;
                g.r = fmaf(-A[n].i, g.i, r), g.i = fmaf(A[n].i, old, i);
                if (HAS_Z) out = fmaf(C[n].r, g.r, out), out = fmaf(C[n].i, g.i, out);
                sum_1[n].i = fmaf(g.i, up, sum_1[n].i), sum_2[n].i = fmaf(p[n].i, up, sum_2[n].i);
            } else {
                p[n].r = fmaf(A[n].r, p[n].r, g.r);
                g.r = fmaf(A[n].r, g.r, B[n].r * u);
                if (HAS_Z) out = fmaf(C[n].r, g.r, out);
            }
            sum_1[n].r = fmaf(g.r, up, sum_1[n].r), sum_2[n].r = fmaf(p[n].r, up, sum_2[n].r);
        }
        return out;
    };
    constexpr bool SUMS = INPUTS || HAS_Z;  // whether there is something to sum over states
    if (length) fetch_tile(0);
    for (int k = 0; k <= n_tiles && length; k++) {
        wait<0>();
        __syncthreads();
        fetch_tile(k + 1);
        if (k) finish(k - 1);
        if (k == n_tiles) break;
        prepare(k);
        __syncthreads();
        const in_t *from = s.x[k % 3] + channel;
        const float *ups = s.up[k & 1] + channel;
        float *to = s.y + sub * ROW_Y + channel;
        const int steps = length - k * TILE;
        float v[SPLIT];
        if (steps >= TILE) {
#pragma unroll 1
            for (int t = 0; t < TILE; t += SPLIT) {
#pragma unroll
                for (int j = 0; j < SPLIT; j++) v[j] = step(widen(from[(t + j) * CH]), ups[(t + j) * CH]);
                if (SUMS) to[t * ROW_Y] = share(v, sub);
            }
        } else {
            for (int t = 0; t < steps; t += SPLIT) {
#pragma unroll
                for (int j = 0; j < SPLIT; j++) v[j] = t + j < steps ? step(widen(from[(t + j) * CH]), ups[(t + j) * CH]) : 0.f;
                if (SUMS) to[t * ROW_Y] = share(v, sub);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        const int state = sub * OWN + n;
        const i64 place = (i64)own_c * d_state + state;
        if (own_c >= channels || state >= d_state) continue;
        if (INPUTS) {
            keep(dB, segment * size + place, sum_1[n]);
            if (length && (here.flags & 1)) keep(dinitial, here.sequence * size + place, h[n]);
            continue;
        }
        // of C: sum of up 2 conj(h); of a: sum of up 2 conj(C p), and the gradient of the state that leaves times conj(p)
        const Number exit = number(leaving, (leaving_by_segment ? segment : here.sequence) * size + place, length > 0);
        Number of_C = sum_1[n], of_A;
        if (COMPLEX) {
            of_C.r *= 2.f, of_C.i *= -2.f;
            of_A.r = C[n].r * sum_2[n].r + C[n].i * sum_2[n].i, of_A.i = C[n].i * sum_2[n].r - C[n].r * sum_2[n].i;
            of_A.r += exit.r * p[n].r + exit.i * p[n].i, of_A.i += exit.i * p[n].r - exit.r * p[n].i;
        } else {
            of_A = Number{fmaf(C[n].r, sum_2[n].r, exit.r * p[n].r), 0.f};
        }
        keep(dC, segment * size + place, of_C), keep(dA, segment * size + place, of_A);
    }
    if (!INPUTS && HAS_D) {
        // over the threads that had the same two channels, in a fixed order
        __syncthreads();
        float2 *sums = (float2 *)s.up;
        sums[rank * (CH / 2) + own / 2] = sum_D;
        __syncthreads();
        if (rank == 0) {
            for (int r = 1; r < RANKS; r++) {
                const float2 more = sums[r * (CH / 2) + own / 2];
                sum_D.x += more.x, sum_D.y += more.y;
            }
            if (c0 + own < channels) dD[(i64)segment * channels + c0 + own] = sum_D.x;
            if (c0 + own + 1 < channels) dD[(i64)segment * channels + c0 + own + 1] = sum_D.y;
        }
    }
}
