// Position after position of sequences by one kernel that stays: all of a model's steps, the drawing of each token
// included, as phases. The grid is groups of as many blocks; a group has SEQUENCES sequences at once, and then the next that no
// group has. A phase is rows of a linear map and what is done with each; a warp has a row, of all of its sequences, so that
// weights are read once for them, and a part of its lanes has one sequence's states.
//
// Nothing but numbers passes between blocks, and no barrier: each number is written together with the step that it is of, in
// 64 bits, and read again until it is of the step that is wanted. A vector is written once a step. A number is not written
// before it has been read, as each block has rows of the last phase, the logits, of which there are two by turns: what a step
// draws of all of them comes after all that the blocks read in the step before.
//
// Whatever SEQUENCES is, a sequence's sums are made in the same order. Compiled with, as macros:
//   THREADS  of a block
//   SEQUENCES   of a group at once: 1, 2, 4 or 8
//   ROOM     numbers of a sequence that a phase reads, at most
//   PIECES   of 128 numbers that the longest vector has, at most      USED   bits: how many pieces there are
//   HELD     times 32 states that a channel has, at most
//   STATES, TAPS   states and past inputs that a channel has, at most, as powers of two up to 32
//   CHOICES  tokens that a lane has, at most
//   KINDS    bits: the kinds of phases that there are      FLAGS    all of their flags
//   COMPLEX_STATES   0 or 1 where all states are alike, else 2      BIASED, POOLED   whether any phase has a bias, a pool
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
#define WARPS (THREADS / 32)
#define LANES (32 / SEQUENCES)  // that a sequence has
#define TEAM (THREADS / SEQUENCES)
#define MORE_STATES (STATES > LANES ? STATES / LANES : 1)  // that a lane has
#define MORE_TAPS (TAPS > LANES ? TAPS / LANES : 1)
#define FULL ~0u
#define POOLS (POOLED ? 4 : 0)  // at most
#define IS(k) ((KINDS >> (k) & 1) && p.kind == (k))
#define HAS(flag) ((FLAGS & (flag)) && (p.flags & (flag)))

enum { LINEAR, OUT, MAMBA, LTI, GATED, CONV, SCAN };
enum { EMBEDS = 1, GLU = 2, COMPLEX = 4, SWIGLU = 8 };

// As `mambaseq.ops.decoding.stretch.Phase` lays it out.
struct Phase {
    i64 kind, level, rows, cols;
    const float *in;
    i64 normed, eps;  // eps: bits of a float
    const float *weight, *bias;
    float *out;
    i64 flags;
    const float *a, *b, *c, *D;  // of the states, c as y is the sum of its products with them
    float *state;
    i64 n_states;
    const float *conv, *conv_bias;
    float *conv_state;
    i64 width;
    float *residual, *window, *copy;  // OUT: what is added to, where a window of positions and the sum itself go too;
    const float *up, *held;           // and what a coarser resolution gives. CONV: copy takes gates. SCAN: residual has
                                      // inputs, copy gates
    i64 held_cols, pool;              // pool: which, or -1
};

struct Vec { float4 v[PIECES]; };

// A lane's sequence among the group's, which has its last one's in place of those that there are not, and its place there.
struct Lane {
    int sequence, place;
    bool writes;  // whether it is a sequence's own, not in place of one that there is not
};

// Of a sequence, what the first has at `base`.
template <class T> __device__ __forceinline__ T *of(T *base, i64 apart, int sequence) {
    return (T *)((unsigned char *)base + apart * sequence);
}
#define OF(field, sequence) of(p.field, (i64)apart.field, sequence)

// Numbers that pass between blocks.
__device__ __forceinline__ void store_pair(float *to, u64 pair) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(pair) : "memory");
}
__device__ __forceinline__ void load_pairs(const float *from, u64 &u, u64 &v) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(u), "=l"(v) : "l"(from) : "memory");
}
__device__ __forceinline__ void tell(float *vector, int at, float v, u32 step) {
    store_pair(vector + 2 * (i64)at, (u64)step << 32 | __float_as_uint(v));
}
// What this warp told of itself.
__device__ __forceinline__ float told(const float *vector, int at) { return __ldcg(vector + 2 * (i64)at); }
// n numbers of each sequence, which others tell, for all threads of this block: those of the step that `step_of` a place
// says, or, where it says 0, whatever there is. All n must be told: a number that nobody tells is waited for without end. Of an
// odd n the last has a neighbour, which is not waited for.
template <class Steps>
__device__ __forceinline__ void stage(float *to, const float *from, i64 apart, int last, int n, Steps step_of) {
    const int sequence = threadIdx.x / TEAM, own = min(sequence, last);
    if (sequence >= SEQUENCES) return;
    from = of(from, apart, own), to += sequence * ROOM;
    for (int first = threadIdx.x % TEAM * 2; first < n; first += TEAM * 8) {
        u64 u[4], v[4];
        u32 wanted[4];
#pragma unroll
        for (int i = 0; i < 4; i++) wanted[i] = first + i * TEAM * 2 < n ? step_of(first + i * TEAM * 2) : 0;
        bool early;
        do {
            early = false;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (first + i * TEAM * 2 < n) load_pairs(from + 2 * (i64)(first + i * TEAM * 2), u[i], v[i]);
#pragma unroll
            for (int i = 0; i < 4; i++)
                early |= wanted[i] && ((u32)(u[i] >> 32) != wanted[i] ||
                                       (first + i * TEAM * 2 + 1 < n && (u32)(v[i] >> 32) != wanted[i]));
        } while (early);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = first + i * TEAM * 2;
            if (at < n) *(float2 *)(to + at) = make_float2(__uint_as_float((u32)u[i]), __uint_as_float((u32)v[i]));
        }
    }
}

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
    for (int far = 16; far; far /= 2) v += __shfl_xor_sync(FULL, v, far);
    return v;
}
// The sums over all lanes of the sequences' values, each for its sequence's lanes: as `sum_of_warp` adds them.
__device__ __forceinline__ float sums_of_warp(float *v) {
    const int lane = threadIdx.x % 32;
    int far = 16;
#pragma unroll
    for (int n = SEQUENCES / 2; n; n /= 2, far /= 2) {
#pragma unroll
        for (int i = 0; i < n; i++) {
            const bool upper = lane & far;
            const float given = __shfl_xor_sync(FULL, upper ? v[i] : v[i + n], far);
            v[i] = (upper ? v[i + n] : v[i]) + given;
        }
    }
#pragma unroll
    for (far = LANES / 2; far; far /= 2) v[0] += __shfl_xor_sync(FULL, v[0], far);
    return v[0];
}
// The sum of a sequence's values, N of a lane: that of a warp in which each lane has one.
template <int N> __device__ __forceinline__ float sum_of_lanes(float *v) {
#pragma unroll
    for (int n = N / 2; n; n /= 2)
#pragma unroll
        for (int i = 0; i < n; i++) v[i] += v[i + n];
#pragma unroll
    for (int far = LANES / 2; far; far /= 2) v[0] += __shfl_xor_sync(FULL, v[0], far);
    return v[0];
}
__device__ __forceinline__ float silu(float v) { return v / (1.f + __expf(-v)); }
__device__ __forceinline__ float softplus(float v) { return fmaxf(v, 0.f) + log1pf(expf(-fabsf(v))); }
__device__ __forceinline__ float gelu(float v) { return .5f * v * (1.f + erff(v * .70710678f)); }

// A lane's part of a row: 4 neighbours of every 128 numbers.
__device__ __forceinline__ Vec part_of(const float *row, int cols) {
    Vec x;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int at = i * 128 + threadIdx.x % 32 * 4;
        x.v[i] = at < cols ? *(const float4 *)(row + at) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    return x;
}
__device__ __forceinline__ void add_products(float4 &sum, const float4 &x, const float4 &y) {
    // short chains: little else is there to hide them
    sum.x = fmaf(x.x, y.x, sum.x), sum.y = fmaf(x.y, y.y, sum.y);
    sum.z = fmaf(x.z, y.z, sum.z), sum.w = fmaf(x.w, y.w, sum.w);
}
__device__ __forceinline__ float total(const float4 &sum) { return (sum.x + sum.y) + (sum.z + sum.w); }

// For each lane's sequence the products of its vector with one row, with another, and with itself: v, or all of them.
enum { ONE, ALL, SQUARES };
template <int P, int WHAT>
__device__ __forceinline__ void dots(int pieces, const float *vectors, int cols, const Vec &row, const Vec &row2, float &v,
                                     float &other, float &squares) {
    if constexpr (P <= PIECES) {
        if (!(USED >> P & 1) || pieces != P) return dots<P + 1, WHAT>(pieces, vectors, cols, row, row2, v, other, squares);
        float one[SEQUENCES], two[SEQUENCES], three[SEQUENCES];
#pragma unroll
        for (int s = 0; s < SEQUENCES; s++) {
            const float4 none = make_float4(0.f, 0.f, 0.f, 0.f);
            float4 sum = none, sum2 = none, sum3 = none;
#pragma unroll
            for (int i = 0; i < P; i++) {
                const int at = i * 128 + threadIdx.x % 32 * 4;
                const float4 x = i + 1 < P || at < cols ? *(const float4 *)(vectors + s * ROOM + at) : none;
                if (WHAT != SQUARES) add_products(sum, x, row.v[i]);
                if (WHAT == ALL) add_products(sum2, x, row2.v[i]);
                if (WHAT != ONE) add_products(sum3, x, x);
            }
            one[s] = total(sum), two[s] = total(sum2), three[s] = total(sum3);
        }
        if (WHAT != SQUARES) v = sums_of_warp(one);
        if (WHAT == ALL) other = sums_of_warp(two);
        if (WHAT != ONE) squares = sums_of_warp(three);
    }
}

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

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    stretch(const Phase *phases, const Phase *strides, int n_phases, int n_steps, int batch, int groups, u32 steps_before,
            const float *embedding, const float *conditions, int d_model, const float *logits, i64 logits_stride,
            int logits_turn, int vocabulary, const double *temperature, const double *uniforms, const i64 *first,
            i64 *tokens, const i64 *counts, const i64 *pools, int n_pools, int *failed) {
    extern __shared__ __align__(16) unsigned char memory[];
    float *const vectors = (float *)memory;  // two by turns: a warp may begin a phase when others have not ended the one before
    int *const now = (int *)(vectors + 2 * SEQUENCES * ROOM);  // the sequences' tokens; room for 8
    Phase *const program = (Phase *)(now + 8), *const far = program + n_phases;
    const int blocks = gridDim.x / groups, group = blockIdx.x / blocks, block = blockIdx.x % blocks;
    const int warp = threadIdx.x / 32, worker = warp * blocks + block, workers = WARPS * blocks;
    const double inverse = 1. / *temperature;
    int count[POOLS + 1], size[POOLS + 1], turn = 0;
#pragma unroll
    for (int i = 0; i < POOLS; i++) size[i] = i < n_pools ? (int)pools[i] : 0;
    bool all_finite = true;
    for (int begin = group * SEQUENCES; begin < batch; begin += groups * SEQUENCES) {
        const int last = min(SEQUENCES, batch - begin) - 1, place = threadIdx.x % 32 / LANES;
        const Lane lane = {min(place, last), (int)threadIdx.x % LANES, place <= last};
        const bool tells = lane.writes && lane.place == 0;
        __syncthreads();  // no thread reads the program of the sequences before
        for (int i = threadIdx.x; i < n_phases * (int)(sizeof(Phase) / 8); i += THREADS) {
            const i64 stride = ((const i64 *)strides)[i];
            ((i64 *)program)[i] = ((const i64 *)phases)[i] + begin * stride, ((i64 *)far)[i] = stride;
        }
        if (threadIdx.x < SEQUENCES) now[threadIdx.x] = (int)first[begin + min((int)threadIdx.x, last)];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < POOLS; i++) count[i] = i < n_pools ? (int)counts[i] : 0;
        auto slot_of = [&](const Phase &p) {
            int slot = 0;
#pragma unroll
            for (int i = 0; i < POOLS; i++) slot = p.pool == i ? count[i] : slot;
            return slot;
        };
        Ahead ahead;
        fetch(ahead, program[0], far[0], lane, worker, 0);
        for (int step = 0; step < n_steps; step++) {
            const u32 current = steps_before + step + 1;
            // so many pools are whole with this position, one after the other
            int whole = 0;
#pragma unroll
            for (int i = 0; i < POOLS; i++)
                if (whole == i && i < n_pools && count[i] + 1 == size[i]) whole = i + 1;
            for (int k = 0; k < n_phases;) {
                const Phase &p = program[k], &apart = far[k];
                const int rows = (int)p.rows, cols = (int)p.cols, slot = slot_of(p);
                const bool embeds = p.flags & EMBEDS;
                int done = -1;  // the row whose states are still to be kept
                if (block < rows || (embeds && block < cols)) {
                    float *const vector = vectors + turn * SEQUENCES * ROOM;
                    turn ^= 1;
                    if (worker < rows) prepare(ahead, p);
                    int apart_steps = 1;  // of two positions of the phase's pool
#pragma unroll
                    for (int i = 0; i < POOLS; i++)
                        if (i < p.pool) apart_steps *= size[i];
                    // what was told so many steps ago; before this kernel began it was told for certain
                    auto past = [&](int steps) { return steps <= step ? current - steps : 0; };
                    if (embeds) {
                        const int sequence = threadIdx.x / TEAM, own = begin + min(sequence, last);
                        if (sequence < SEQUENCES)
                            for (int at = threadIdx.x % TEAM; at < cols; at += TEAM)
                                vector[sequence * ROOM + at] = embedding[(i64)now[sequence] * d_model + at] +
                                                               (conditions ? conditions[(i64)own * d_model + at] : 0.f);
                    } else if (POOLED && IS(LINEAR) && p.pool >= 0) {
                        const int width = cols / (slot + 1);
                        stage(vector, p.in, (i64)apart.in, last, cols,
                              [&](int at) { return past((slot - at / width) * apart_steps); });
                    } else {
                        stage(vector, p.in, (i64)apart.in, last, IS(SCAN) ? (int)p.held_cols : cols,
                              [&](int) { return current; });
                    }
                    if (POOLED && IS(OUT) && p.held)
                        stage(vector + cols, p.held, (i64)apart.held, last, (int)p.held_cols,
                              [&](int) { return past((slot + 1) * apart_steps); });
                    __syncthreads();
                    if (embeds && tells)
                        for (int at = worker; at < cols; at += workers)
                            tell(OF(residual, lane.sequence), at, vector[lane.sequence * ROOM + at], current);
                    const float share = 1.f / cols, eps = __int_as_float((int)p.eps);
                    const int pieces = (cols + 127) / 128;
                    float *const out = p.out + (k + 1 == n_phases ? (current & 1) * (i64)logits_turn * 2 : 0);
                    for (int row = worker; row < rows; row += workers) {
                        if (row != worker) {
                            keep(ahead, p, apart, lane, done);
                            fetch(ahead, p, apart, lane, row, slot);
                            prepare(ahead, p);
                        }
                        done = row;
                        float v = 0.f, other = 0.f, squares = 0.f;
                        if (IS(LTI)) dots<1, SQUARES>(pieces, vector, cols, ahead.weight, ahead.other, v, other, squares);
                        else if (p.normed || has_other(p))
                            dots<1, ALL>(pieces, vector, cols, ahead.weight, ahead.other, v, other, squares);
                        else dots<1, ONE>(pieces, vector, cols, ahead.weight, ahead.other, v, other, squares);
                        // a norm's weight is in the rows'
                        const float scale = p.normed ? rsqrtf(fmaf(squares, share, eps)) : 1.f;
                        v = fmaf(scale, v, ahead.bias), other = fmaf(scale, other, ahead.other_bias);
                        if (IS(OUT)) {
                            float given = 0.f;
                            if (POOLED && p.held) {
                                const int n = (int)p.held_cols;
#if SEQUENCES == 1
                                const Vec &up = ahead.up;
#else
                                const Vec up = part_of(row_up(p, row, slot), n);
#endif
                                float unused;
                                dots<1, ONE>((n + 127) / 128, vector + cols, n, up, up, given, unused, unused);
                            }
                            v = HAS(GLU) ? fmaf(v, 1.f / (1.f + __expf(-other)), ahead.input) : v + ahead.input;
                            if (POOLED && tells && p.window) tell(OF(window, lane.sequence), slot * rows + row, v, current);
                            v += given;
                            if (POOLED && tells && p.copy) tell(OF(copy, lane.sequence), row, v, current);
                        } else if (has_conv(p)) {
                            ahead.v = v, ahead.u = v = silu(fmaf(ahead.last_tap, v, ahead.from_past));
                            if (IS(MAMBA)) {
                                v = fmaf(ahead.D + ahead.from_input, v, ahead.from_states) * silu(other);
                            } else {
                                if (tells) tell(OF(copy, lane.sequence), row, silu(other), current);
                            }
                        } else if (IS(SCAN)) {
                            select(ahead, p, lane, vector + lane.sequence * ROOM, softplus(v));
                            ahead.u = ahead.input;
                            v = fmaf(ahead.D, ahead.input, read_out(ahead, ahead.input)) * ahead.gate;
                        } else if (IS(LTI)) {
                            ahead.u = scale * vector[lane.sequence * ROOM + row];
                            v = gelu(fmaf(ahead.D + ahead.from_input, ahead.u, ahead.from_states));
                        } else if (IS(GATED)) {
                            v = HAS(SWIGLU) ? silu(v) * other : gelu(v);
                        }
                        if (tells) tell(of(out, (i64)apart.out, lane.sequence), row, v, current);
                    }
                }
                if (done >= 0) keep(ahead, p, apart, lane, done);
                k++;
                while (k < n_phases && program[k].level > whole) k++;
                const int next = k < n_phases ? k : 0;
                fetch(ahead, program[next], far[next], lane, worker, slot_of(program[next]));
            }
            float *const staged = vectors + turn * SEQUENCES * ROOM;
            turn ^= 1;
            stage(staged, of(logits, logits_stride, begin) + (current & 1) * (i64)logits_turn * 2, logits_stride, last,
                  vocabulary, [&](int) { return current; });
            __syncthreads();
            if (warp < SEQUENCES) {
                const int own = begin + min(warp, last);
                const i64 at = (i64)own * n_steps + step;
                bool finite;
                const int token = draw(staged + warp * ROOM, vocabulary, inverse, uniforms ? uniforms + at : nullptr, finite);
                all_finite &= finite;
                if (threadIdx.x % 32 == 0) now[warp] = token;
                if (block == 0 && threadIdx.x % 32 == 0) tokens[at] = token;
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < POOLS; i++)
                if (i <= whole && i < n_pools) count[i] = count[i] + 1 == size[i] ? 0 : count[i] + 1;
        }
    }
    if (block == 0 && !all_finite) *failed = 1;
}
