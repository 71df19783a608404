// Shared by forward.cu and backward.cu. Compiled at run time (NVRTC) with, as macros:
//   IN          0: float32, 1: bfloat16, 2: float16 - the type of x, dt, B, C, z, y and their gradients
//   STATES      4, 8 or 16: d_state, filled up with states that stay zero
//   HAS_Z, HAS_D, HAS_BIAS, SOFTPLUS   0 or 1
//   VEC, VEC_BC bytes of an asynchronous copy of channels, of states (16, 8 or 4), 0 where rows are not aligned to 4
//   EVEN        whether pairs of channels are aligned to themselves in rows of y and of gradients
//   TILE        steps that are fetched together
//   THREADS     of a block
//   EVERY       steps between two checkpoints of the state
//   SHARED      bytes of shared memory
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

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
__device__ __forceinline__ float widen(in_t v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v)); return r; }
__device__ __forceinline__ in_t narrow(float v) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
#endif

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define CHANNELS 64  // channels of a block

__device__ __forceinline__ float ex2(float v) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float rcp(float v) { float r; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float sigmoid(float v) { return rcp(1.f + ex2(-v * LOG2E)); }

// log(1 + e^v) with full relative accuracy where it is small: log1p(w) = 2 artanh(w / (2 + w)).
__device__ __forceinline__ float softplus(float v) {
    float w = ex2(-fabsf(v) * LOG2E), s = w * rcp(2.f + w), q = s * s;
    float p = 1.f / 13;
    p = fmaf(p, q, 1.f / 11);
    p = fmaf(p, q, 1.f / 9);
    p = fmaf(p, q, 1.f / 7);
    p = fmaf(p, q, 1.f / 5);
    p = fmaf(p, q, 1.f / 3);
    p = fmaf(p, q, 1.f);
    return fmaxf(v, 0.f) + 2.f * s * p;
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

// A sequence is cut into segments that run side by side. Row t of segment s is row0[s] + t * go.
struct Segments {
    const i64 *row0;        // first row in the order of processing
    const int *length;      // 0: nothing to do
    const int *sequence;    // which sequence it is of
    const int *flags;       // 1: the first of its sequence; 2: the last
    const i64 *checkpoint;  // where its checkpoints begin
};

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }

// Copies `steps` rows of WIDTH columns into a tile of ROWS rows, BYTES at a time (0: one number at a time, at once);
// what lies beyond `columns` or `steps` becomes zero. Row t begins at from + t * stride.
template <int ROWS, int WIDTH, int BYTES>
__device__ __forceinline__ void fetch(in_t *tile, const in_t *from, i64 stride, int steps, int columns) {
    constexpr int PER = BYTES ? BYTES / (int)sizeof(in_t) : 1, PIECES = WIDTH / PER;
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        int t = i / PIECES, c = i % PIECES * PER;
        bool exists = t < steps && c < columns;
        const in_t *source = exists ? from + t * stride + c : from;
        if constexpr (BYTES == 0) {
            tile[i] = exists ? *source : (in_t)0;
        } else {
            u32 target = (u32)__cvta_generic_to_shared(tile + t * WIDTH + c);
            int size = exists ? BYTES : 0;
            if constexpr (BYTES == 16)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(size));
            else
                asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(target), "l"(source), "r"(size), "n"(BYTES));
        }
    }
}

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

// Writes two neighbouring channels of a row, as far as they exist.
__device__ __forceinline__ void put_pair(in_t *to, float2 v, int c, int channels) {
#if EVEN
    if (c < channels) {
#if IN == 0
        *(float2 *)to = v;
#else
        *(u32 *)to = (u32)narrow(v.x) | (u32)narrow(v.y) << 16;
#endif
    }
#else
    if (c < channels) to[0] = narrow(v.x);
    if (c + 1 < channels) to[1] = narrow(v.y);
#endif
}

__device__ __forceinline__ float2 channel_pair(const float *values, int c, int channels) {
    return make_float2(c < channels ? values[c] : 0.f, c + 1 < channels ? values[c + 1] : 0.f);
}
