// The selective scan forward for few channels: a block takes a few channels through a whole sequence, so that time need not
// be cut, and the exponentials of each step are made once. A third of its threads (THREADS of them) run the recurrence, OWN
// states each, and nothing else; a third bring rows from memory, make step sizes and widen B and C for the tile after; a
// third sum, gate and write the outputs of the tile before. One barrier a tile, and one before the first: always of all
// threads, since race checkers do not follow a barrier of some.
#define SUBS (STATES / OWN)                  // threads of a channel
#define PAIRS (STATES / 2)                   // of states
#define NARROW (THREADS / SUBS)              // channels of a block
#define QUADS (TILE * NARROW / 4 / THREADS)  // times that a thread prepares or writes four steps of a channel
#define WARPS (THREADS / 32)
#define DT_ROW (2 * TILE + 4)                // these paddings spread what is read together over the banks
#define OUT_ROW (TILE + 8)
#define OUT_CHANNEL (SUBS * OUT_ROW + 4)
#define RING (AHEAD + 2)                     // tiles from the one that is written to the one that is fetched

struct Shared {
    in_t x[RING][TILE * NARROW], dt[RING][TILE * NARROW], z[RING][HAS_Z ? TILE * NARROW : 8];
    in_t B[RING][TILE * STATES], C[RING][TILE * STATES];
    float dt_u[2][NARROW * DT_ROW];      // step size, and input times it, of each step
    float4 bc[2][TILE * PAIRS];          // two of B and two of C
    float out[2][NARROW * OUT_CHANNEL];  // what the states of a thread add to outputs
};
typedef Reader<TILE, NARROW, NARROW, VEC, 32, NARROW * sizeof(in_t) == 32> Wide;
static_assert(sizeof(Shared) <= SHARED, "more shared memory than was asked for");
static_assert(NARROW <= 32, "a warp brings a row");

extern "C" __global__ void __launch_bounds__(3 * THREADS, BLOCKS)
    forward_narrow(const in_t *x, i64 x_stride, const in_t *dt, i64 dt_stride, const in_t *z, i64 z_stride, const in_t *B,
                   i64 B_stride, const in_t *C, i64 C_stride, const weight_t *A, const weight_t *D, const weight_t *bias,
                   const float *initial, SEGMENTS, int go, int channels, int d_state, int per_group, in_t *y,
                   i64 y_stride, float *final_state, float *checkpoints) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &s = *reinterpret_cast<Shared *>(memory);
    const int n_blocks = (channels + NARROW - 1) / NARROW, c0 = blockIdx.x % n_blocks * NARROW;
    const Segment here = segment_of(GIVEN_SEGMENTS, blockIdx.x / n_blocks, go);
    const int length = here.length, n_tiles = (length + TILE - 1) / TILE;
    if (length == 0) return;

    const int thread = threadIdx.x % THREADS;
    if (threadIdx.x < THREADS) {  // runs the recurrence
        // neighbouring lanes want the same B and C, which halves the reads of shared memory
        const int channel = thread / (2 * SUBS) * 2 + thread % 2, sub = thread / 2 % SUBS, c = c0 + channel;
        const i64 state = ((i64)here.sequence * channels + c) * d_state + OWN * sub;
        const int states = c < channels ? d_state - OWN * sub : 0;  // that exist
        float A2[OWN], h[OWN];
#pragma unroll
        for (int n = 0; n < OWN; n++) {
            A2[n] = n < states ? decay_rate(weight(A[(i64)c * d_state + OWN * sub + n])) * LOG2E : 0.f;
            h[n] = n < states && initial ? initial[state + n] : 0.f;
        }
        const i64 slot_size = (i64)channels * STATES;
        float *slot = checkpoints + here.checkpoint * slot_size + (i64)c * STATES + OWN * sub;
        __syncthreads();
        for (int k = 0; k <= n_tiles; k++) {
            __syncthreads();
            if (k == n_tiles) break;
            const float4 *bc = s.bc[k & 1] + OWN / 2 * sub;
            const float4 *du = (const float4 *)(s.dt_u[k & 1] + channel * DT_ROW);
            float4 *out = (float4 *)(s.out[k & 1] + channel * OUT_CHANNEL + sub * OUT_ROW);
            // Decays are made four steps ahead and what they are made of is read four steps before that: a warp runs
            // alone on its scheduler, so nothing else covers the time that a result takes to arrive.
            float4 m[2][4][OWN / 2], d[2][2];
            float e[2][4][OWN];
            auto read = [&](int t, int into) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
#pragma unroll
                    for (int q = 0; q < OWN / 2; q++) m[into][j][q] = bc[(t + j) * PAIRS + q];
                }
            };
            auto read_steps = [&](int t, int into) { d[into][0] = du[t / 2], d[into][1] = du[t / 2 + 1]; };
            auto decay = [&](int from) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float step = j & 1 ? d[from][j / 2].z : d[from][j / 2].x;
#pragma unroll
                    for (int n = 0; n < OWN; n++) e[from][j][n] = ex2(step * A2[n]);
                }
            };
            read_steps(0, 0), read(0, 0), read_steps(4, 1);
            decay(0);
#pragma unroll
            for (int t = 0; t < TILE; t += 4) {
                const int at = t / 4 & 1;
                if (t % EVERY == 0 && checkpoints && k * TILE + t < length) {
                    if (c < channels) {
#pragma unroll
                        for (int n = 0; n < OWN; n += 2) *(float2 *)(slot + n) = make_float2(h[n], h[n + 1]);
                    }
                    slot += slot_size;
                }
                if (t + 4 < TILE) decay(at ^ 1), read(t + 4, at ^ 1);
                float v[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float u = j & 1 ? d[at][j / 2].w : d[at][j / 2].y;
#pragma unroll
                    for (int q = 0; q < OWN / 2; q++) {
                        const float4 w = m[at][j][q];
                        float &h0 = h[2 * q], &h1 = h[2 * q + 1];
                        h0 = fmaf(e[at][j][2 * q], h0, u * w.x);
                        h1 = fmaf(e[at][j][2 * q + 1], h1, u * w.y);
                        v[j] = fmaf(h1, w.w, q ? fmaf(h0, w.z, v[j]) : h0 * w.z);
                    }
                }
                if (t + 8 < TILE) read_steps(t + 8, at);
                out[t / 4] = make_float4(v[0], v[1], v[2], v[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < OWN; n++)
            if (n < states) final_state[state + n] = h[n];
        return;
    }

    const int channel = thread % NARROW, c = c0 + channel, first = thread / NARROW * 4;
    const bool is_channel = c < channels;

    if (threadIdx.x < 2 * THREADS) {  // fetches and prepares
        const float own_bias = HAS_BIAS && is_channel ? weight(bias[c]) : 0.f;
        // Each warp brings some of the five kinds of rows.
        const int warp = thread / 32, present = channels - c0, group_column = c0 / per_group * d_state;
        Wide read_x(x + here.row0 * x_stride + c0, x_stride * go, present, 1);
        Wide read_dt(dt + here.row0 * dt_stride + c0, dt_stride * go, present, 1);
        Wide read_z(z + here.row0 * z_stride + c0, z_stride * go, present, 1);
        Reader<TILE, STATES, STATES, VEC_BC, 32> read_B(B + here.row0 * B_stride + group_column, B_stride * go, d_state, 1);
        Reader<TILE, STATES, STATES, VEC_BC, 32> read_C(C + here.row0 * C_stride + group_column, C_stride * go, d_state, 1);
        int to = 0;  // of the ring
        auto fetch_tile = [&](int k) {
            const int steps = length - k * TILE;
            if (steps > 0) {
                if (warp == 0 % WARPS) read_x.fetch(s.x[to], steps);
                if (warp == 1 % WARPS) read_dt.fetch(s.dt[to], steps);
                if (HAS_Z && warp == 2 % WARPS) read_z.fetch(s.z[to], steps);
                if (warp == 3 % WARPS) read_B.fetch(s.B[to], steps);
                if (warp == 4 % WARPS) read_C.fetch(s.C[to], steps);
            }
            to = to == RING - 1 ? 0 : to + 1;
            commit();
        };
        int at = 0;
        auto prepare = [&](int k) {
            const int left = length - k * TILE;
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                const int t = first + q * (TILE / QUADS);
                float4 pairs[2];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int i = (Wide::turns ? turned(t + j) : t + j) * NARROW + channel;
                    const float d = only_if(t + j < left, step_size(widen(s.dt[at][i]), own_bias));
                    const float u = d * widen(s.x[at][i]);
                    if (j & 1) pairs[j / 2].z = d, pairs[j / 2].w = u;
                    else pairs[j / 2].x = d, pairs[j / 2].y = u;
                }
                float4 *into = (float4 *)(s.dt_u[k & 1] + channel * DT_ROW) + t / 2;
                into[0] = pairs[0], into[1] = pairs[1];
            }
#pragma unroll
            for (int i = thread; i < TILE * PAIRS; i += THREADS) {
                const float2 b = pair(s.B[at] + 2 * i), w = pair(s.C[at] + 2 * i);
                s.bc[k & 1][i] = make_float4(b.x, b.y, w.x, w.y);
            }
            at = at == RING - 1 ? 0 : at + 1;
        };
        for (int k = 0; k < AHEAD; k++) fetch_tile(k);
        wait<AHEAD - 1>();
        __syncthreads();  // all of the first tile is here
        prepare(0);
        wait<AHEAD - 2>();
        for (int k = 0; k <= n_tiles; k++) {
            __syncthreads();
            fetch_tile(k + AHEAD);
            if (k + 1 < n_tiles) prepare(k + 1);
            wait<AHEAD - 2>();
        }
        return;
    }

    // sums, gates and writes
    const float own_D = HAS_D && is_channel ? weight(D[c]) : 0.f;
    const i64 y_go = y_stride * go;
    in_t *to = y + (here.row0 + (i64)first * go) * y_stride + c;
    int at = 0;
    __syncthreads();
    __syncthreads();
    for (int k = 0; k < n_tiles; k++, to += TILE * y_go) {
        __syncthreads();
        const int left = is_channel ? length - k * TILE : 0;
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const int t = first + q * (TILE / QUADS);
            const float *from = s.out[k & 1] + channel * OUT_CHANNEL + t;
            float4 sum = *(const float4 *)from;
#pragma unroll
            for (int sub = 1; sub < SUBS; sub++) {
                const float4 more = *(const float4 *)(from + sub * OUT_ROW);
                sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
            }
            in_t *row = to + q * (TILE / QUADS) * y_go;
#pragma unroll
            for (int j = 0; j < 4; j++, row += y_go) {
                const int i = (Wide::turns ? turned(t + j) : t + j) * NARROW + channel;
                float out = j == 0 ? sum.x : j == 1 ? sum.y : j == 2 ? sum.z : sum.w;
                if (HAS_D) out = fmaf(own_D, widen(s.x[at][i]), out);
                if (HAS_Z) {
                    const float gate = widen(s.z[at][i]);
                    out *= gate * sigmoid(gate);
                }
                put(row, out, t + j < left);
            }
        }
        at = at == RING - 1 ? 0 : at + 1;
    }
}
