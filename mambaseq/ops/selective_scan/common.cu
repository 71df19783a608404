// Shared by forward.cu and backward.cu. Compiled at run time (NVRTC) with, as macros:
//   IN          0: float32, 1: bfloat16, 2: float16 - the type of x, dt, B, C, z, y and their gradients
//   STATES      8, 16 or 32: d_state, filled up with states that stay zero; complex ones count twice
//   COMPLEX     states are complex: d_state and all rows of states count numbers, the real part and the imaginary part of
//               each state beside each other; y is 2 Re(C h)
//   CONSTANT_B, CONSTANT_C   whether B, C are (channels, d_state) of float32 instead of rows
//   HAS_Z, HAS_D, HAS_BIAS, SOFTPLUS   0 or 1
//   LOG_A       whether A is given as log(-A)
//   WEIGHTS     the type of A, D and bias, as IN; float32 where COMPLEX
//   VEC, VEC_BC bytes of an asynchronous copy of channels, of states (16, 8 or 4), 0 where rows are not aligned to 4
//   EVEN        whether pairs of channels are aligned to themselves in rows of y and of gradients
//   TILE        steps that are fetched together
//   THREADS     of a block
//   EVERY       steps between two checkpoints of the state
//   OWN         states of a thread (forward, forward_narrow)
//   BLOCKS      that a multiprocessor should have room for
//   SHARED      bytes of shared memory
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

__device__ __forceinline__ float of_half(u16 v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v)); return r; }
#if IN == 0
typedef float in_t;
__device__ __forceinline__ float widen(in_t v) { return v; }
__device__ __forceinline__ in_t narrow(float v) { return v; }
#elif IN == 1
typedef u16 in_t;
__device__ __forceinline__ float widen(in_t v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ in_t narrow(float v) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
#else
typedef u16 in_t;
__device__ __forceinline__ float widen(in_t v) { return of_half(v); }
__device__ __forceinline__ in_t narrow(float v) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
#endif
#if WEIGHTS == 0
typedef float weight_t;
__device__ __forceinline__ float weight(weight_t v) { return v; }
#elif WEIGHTS == 1
typedef u16 weight_t;
__device__ __forceinline__ float weight(weight_t v) { return __uint_as_float((u32)v << 16); }
#else
typedef u16 weight_t;
__device__ __forceinline__ float weight(weight_t v) { return of_half(v); }
#endif

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define CHANNELS 64  // of a block

__device__ __forceinline__ float ex2(float v) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float rcp(float v) { float r; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float sigmoid(float v) { return rcp(1.f + ex2(-v * LOG2E)); }

// log(1 + e^v) with full relative accuracy where it is small: log1p(w) = w P(w), P a minimax polynomial on [0, 1] of
// relative error 3e-8, which spares a reciprocal.
__device__ __forceinline__ float softplus(float v) {
    const float w = ex2(-fabsf(v) * LOG2E);
    float p = 5.2326880395412445e-3f;
    p = fmaf(p, w, -2.9505213722586632e-2f);
    p = fmaf(p, w, 7.822591066360474e-2f);
    p = fmaf(p, w, -1.3663242757320404e-1f);
    p = fmaf(p, w, 1.9106005132198334e-1f);
    p = fmaf(p, w, -2.4842981994152069e-1f);
    p = fmaf(p, w, 3.331909775733948e-1f);
    p = fmaf(p, w, -4.999949336051941e-1f);
    p = fmaf(p, w, 9.999999403953552e-1f);
    return fmaf(w, p, fmaxf(v, 0.f));
}

__device__ __forceinline__ float decay_rate(float A) { return LOG_A ? -expf(A) : A; }

// What number n of A is kept as: a rate in powers of two, or, an imaginary part, in half turns; and what rounding took from it.
#define PER_HALF_TURN 0.3183098861837907
__device__ __forceinline__ float rate(float A, int n) {
    return COMPLEX && n % 2 ? (float)(A * PER_HALF_TURN) : decay_rate(A) * LOG2E;
}
__device__ __forceinline__ float rest_of_rate(float A) { return (float)(A * PER_HALF_TURN - (float)(A * PER_HALF_TURN)); }
#if COMPLEX
typedef double total_t;  // of step sizes: rounded, a slow decay's angle would be off
#else
typedef float total_t;
#endif
// What a gradient with respect to one of C counts times, where y is 2 Re(C h); and C, so that y is the sum of its products.
__device__ __forceinline__ float of_C(float v, int n) { return COMPLEX ? (n % 2 ? -2.f : 2.f) * v : v; }

struct Complex { float r, i; };
// exp of delta times a complex rate, whose half turns are the sum of two numbers. They are reduced before they are rounded, so
// that the error does not grow with them (up to 2^22). Minimax polynomials, errors below 5e-9: what the special function unit
// gives is not good enough for slow decays, whose errors add up over thousands of steps.
__device__ __forceinline__ Complex decay_of(float delta, float rate_r, float rate_i, float rest_i) {
    const float whole = fmaf(delta, rate_i, 12582912.f);
    const float turn = fmaf(delta, rest_i, fmaf(delta, rate_i, 12582912.f - whole)), q = turn * turn;
    const float size = __uint_as_float(__float_as_uint(ex2(delta * rate_r)) ^ (__float_as_uint(whole) << 31));
    float s = fmaf(7.7309059e-2f, q, -5.9809814e-1f);
    s = fmaf(s, q, 2.5500422f), s = fmaf(s, q, -5.1677077f), s = fmaf(s, q, 3.1415926f);
    float c = fmaf(-2.4428359e-2f, q, 2.3495888e-1f);
    c = fmaf(c, q, -1.3352172f), c = fmaf(c, q, 4.0587097f), c = fmaf(c, q, -4.9348022f), c = fmaf(c, q, 1.f);
    return Complex{size * c, size * (turn * s)};
}
// v times a and something more.
__device__ __forceinline__ void advance(float &r, float &i, Complex a, float more_r, float more_i) {
    const float real = fmaf(a.r, r, fmaf(-a.i, i, more_r));
    i = fmaf(a.r, i, fmaf(a.i, r, more_i)), r = real;
}

__device__ __forceinline__ float step_size(float dt, float bias) {
#if HAS_BIAS
    dt += bias;
#endif
#if SOFTPLUS
    dt = softplus(dt);
#endif
    return dt;
}

// The value where it is wanted, else 0; never a branch around its making, which would part what the compiler may interleave.
__device__ __forceinline__ float only_if(bool wanted, float value) {
    float r;
    asm("{.reg .pred p; setp.ne.s32 p, %1, 0; selp.f32 %0, %2, 0f00000000, p;}" : "=f"(r) : "r"((int)wanted), "f"(value));
    return r;
}

// A sequence is cut into segments that run side by side. Row t of segment s is row0 + t * go.
struct Segment {
    i64 row0;        // first row in the order of processing
    int length;      // 0: nothing to do
    int sequence;    // which sequence it is of
    int flags;       // 1: the first of its sequence; 2: the last
    i64 checkpoint;  // where its checkpoints begin
};
// Tables of them for packed sequences; null for sequences of one length, which are cut alike: after `first` steps and then
// every `steps`, into `count`.
struct Segments {
    const i64 *row0;
    const int *length, *sequence, *flags;
    const i64 *checkpoint;
    int whole, first, steps, count;
};
#define SEGMENTS                                                                                                       \
    const i64 *seg_row0, const int *seg_length, const int *seg_sequence, const int *seg_flags, const i64 *seg_checkpoint, \
        int whole, int first_steps, int steps_of_others, int count
#define GIVEN_SEGMENTS                                                                                                 \
    Segments { seg_row0, seg_length, seg_sequence, seg_flags, seg_checkpoint, whole, first_steps, steps_of_others, count }

__device__ __forceinline__ Segment segment_of(const Segments &s, int i, int go) {
    if (s.row0) return Segment{s.row0[i], s.length[i], s.sequence[i], s.flags[i], s.checkpoint[i]};
    const int sequence = i / s.count, k = i % s.count, begin = k ? s.first + (k - 1) * s.steps : 0;
    const int end = min(s.first + k * s.steps, s.whole);
    return Segment{(i64)sequence * s.whole + (go < 0 ? s.whole - 1 - begin : begin), end - begin, sequence,
                   (k == 0) + 2 * (k == s.count - 1), (i64)sequence * ((s.whole + EVERY - 1) / EVERY) + begin / EVERY};
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

// Where a row of a tile lies whose TURNS are set: two rows four apart are then in other banks.
__device__ __forceinline__ int turned(int row) { return row ^ (row >> 2 & 1); }

// Copies tiles of ROWS rows of WIDTH columns to shared memory, where rows lie ROW apart, BYTES at a time (0: one number at
// a time, at once); what lies beyond the columns and steps that exist becomes zero. A thread keeps the address of its
// first piece, and counts are known when compiling, else a tile costs hundreds of instructions.
template <int ROWS, int WIDTH, int ROW, int BYTES, int COUNT = THREADS, bool TURNS = false> struct Reader {
    static constexpr int PER = BYTES ? BYTES / (int)sizeof(in_t) : 1, PIECES = WIDTH / PER;
    static constexpr int APART = COUNT / PIECES;  // rows from one piece of a thread to its next
    static constexpr bool turns = TURNS;
    const in_t *from;
    i64 step, next;
    int row, column;
    bool exists;

    // rows begin at first + t * stride; `order` tiles on (-1: back) lies the next one
    __device__ __forceinline__ Reader(const in_t *first, i64 stride, int columns, int order) {
        row = threadIdx.x % COUNT / PIECES, column = threadIdx.x % PIECES * PER;
        exists = column < columns;
        from = first + row * stride + column;
        step = APART * stride, next = order * ROWS * stride;
    }
    __device__ __forceinline__ void fetch(in_t *tile, int steps) {
        const in_t *source = from;
        from += next;
        in_t *to = tile + (TURNS && APART % 8 == 0 ? turned(row) : row) * ROW + column;
#pragma unroll
        for (int t = 0; t < ROWS; t += APART, source += step, to += APART * ROW) {
            if (ROWS % APART && row + t >= ROWS) break;
            if (TURNS && APART % 8) to = tile + turned(row + t) * ROW + column;
            const bool here = exists && row + t < steps;
            if constexpr (BYTES == 0) {
                *to = here ? *source : (in_t)0;
            } else {
                const u32 target = (u32)__cvta_generic_to_shared(to), size = here ? BYTES : 0;
                if constexpr (BYTES == 16)
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(size));
                else
                    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(target), "l"(source), "r"(size),
                                 "n"(BYTES));
            }
        }
    }
};

// Two neighbours of a tile.
__device__ __forceinline__ float2 pair(const in_t *tile) {
#if IN == 0
    return *(const float2 *)tile;
#elif IN == 1
    u32 v = *(const u32 *)tile;
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
#else
    u32 v = *(const u32 *)tile;
    return make_float2(widen((u16)v), widen((u16)(v >> 16)));
#endif
}

// Writes one number, which nothing here reads again, where `exists`: without a branch and without a word about memory, either
// of which would keep the compiler from interleaving what comes before with what comes after.
__device__ __forceinline__ void put(in_t *to, float value, bool exists) {
#if IN == 0
    asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.f32 [%1], %2;}" ::"r"((int)exists), "l"(to), "f"(value));
#else
    asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.u16 [%1], %2;}" ::"r"((int)exists), "l"(to),
                 "h"(narrow(value)));
#endif
}

// Writes two neighbouring channels of a row that `exists`, as far as they do.
__device__ __forceinline__ void put_pair(in_t *to, float2 v, int c, int channels, bool exists) {
#if !EVEN
    put(to, v.x, exists && c < channels), put(to + 1, v.y, exists && c + 1 < channels);
#elif IN == 0
    asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v2.f32 [%1], {%2, %3};}" ::"r"((int)(exists && c < channels)),
                 "l"(to), "f"(v.x), "f"(v.y));
#else
    asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.u32 [%1], %2;}" ::"r"((int)(exists && c < channels)), "l"(to),
                 "r"((u32)narrow(v.x) | (u32)narrow(v.y) << 16));
#endif
}

__device__ __forceinline__ float2 channel_pair(const float *values, int c, int channels) {
    return make_float2(c < channels ? values[c] : 0.f, c + 1 < channels ? values[c + 1] : 0.f);
}
