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
