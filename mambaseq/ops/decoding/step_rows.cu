// dt_proj, scan and gate of one decode step of a Mamba-1 block of several sequences. A block has CHANNELS channels of ROWS
// sequences. States are asked for at the beginning and used at the end. No number depends on how many sequences there are.
// Compiled behind rows_common.cu with, as macros:
//   HALF      whether states are bfloat16
//   CHANNELS  of a block     ROWS  sequences     SUBS  threads of a channel, which share its states
//   BLOCKS    that a multiprocessor should have room for
//   RANK, D_STATE     of dt_proj, of the states
//   PARTS     summands that each product with x_proj comes in, fp32; 0: they are whole, of the type of inputs
#define THREADS (CHANNELS * SUBS)
#define N_OUT (RANK + 2 * D_STATE)
#define OWN ((D_STATE + SUBS - 1) / SUBS)            // states of a thread
#define QUADS (D_STATE % (4 * SUBS) == 0)            // whether it has them by fours
#define PER ((RANK + SUBS - 1) / SUBS)               // columns of dt_proj of a thread
#define AT_A_TIME (RANK % (8 * SUBS) == 0 ? 8 : RANK % (4 * SUBS) == 0 ? 4 : 1)  // that it reads
#define RANKS ((RANK + 3) / 4 * 4)
#define STATES ((D_STATE + 3) / 4 * 4)
#define SUMS (RANKS + 2 * STATES)                    // sums of a row: for dt_proj, B, C, each begun at a multiple of four
#define AHEAD (PER % AT_A_TIME == 0 && PER <= 32)    // whether a thread holds its columns of dt_proj from the beginning

#if HALF
typedef u16 state_t;
__device__ __forceinline__ float held(state_t v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ state_t kept(float v) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
#else
typedef float state_t;
__device__ __forceinline__ float held(state_t v) { return v; }
__device__ __forceinline__ state_t kept(float v) { return v; }
#endif
__device__ __forceinline__ void fetch(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

struct __align__(4 * sizeof(state_t)) Four { state_t v[4]; };
struct __align__(AT_A_TIME * sizeof(in_t)) Some { in_t v[AT_A_TIME]; };
struct __align__(4 * sizeof(in_t)) Rates { in_t v[4]; };

// log(1 + e^v), its relative error small where it is small: log1p by the series of 2 artanh(e / (2 + e))
__device__ __forceinline__ float softplus(float v) {
    const float e = ex2(-fabsf(v) * LOG2E), s = __fdividef(e, 2.f + e), q = s * s;
    float p = 1.f / 13;
    p = fmaf(p, q, 1.f / 11), p = fmaf(p, q, 1.f / 9), p = fmaf(p, q, 1.f / 7), p = fmaf(p, q, 1.f / 5);
    p = fmaf(p, q, 1.f / 3), p = fmaf(p, q, 1.f);
    return fmaf(2.f * s, p, fmaxf(v, 0.f));
}

__device__ __forceinline__ int state_of(int i, int sub) {
    return QUADS ? i / 4 * 4 * SUBS + sub * 4 + i % 4 : sub + SUBS * i;
}

// Of a product with x_proj among the sums.
__device__ __forceinline__ int place_of(int o) {
    return o < RANK ? o : o < RANK + D_STATE ? o - RANK + RANKS : o - RANK - D_STATE + RANKS + STATES;
}

#if PARTS
typedef float product_t;
#else
typedef in_t product_t;
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    step_rows(const in_t *u, const product_t *products, const in_t *gates, i64 gate_stride, state_t *state,
              const in_t *dt_proj, const in_t *dt_bias, const in_t *A_log, const in_t *D, in_t *y, int rows, int channels) {
    // u, y: `(rows, channels)`; products: what x_proj made of u, `(rows, N_OUT)`, or `(PARTS, rows, N_OUT)`
    __shared__ __align__(16) float sums[ROWS][SUMS];
    const int thread = threadIdx.x, sub = thread % SUBS, blocks = (channels + CHANNELS - 1) / CHANNELS;
    const int c = blockIdx.x % blocks * CHANNELS + thread / SUBS, row0 = blockIdx.x / blocks * ROWS;
    const bool is_channel = c < channels;

    // the states, which take longest
    float h[ROWS][OWN];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const state_t *from = state + ((i64)(row0 + r) * channels + c) * D_STATE;
        const bool there = is_channel && row0 + r < rows;
#pragma unroll
        for (int i = 0; i < OWN; i += QUADS ? 4 : 1) {
            if (QUADS) {
                Four four = {};
                if (there) four = *(const Four *)(from + state_of(i, sub));
#pragma unroll
                for (int j = 0; j < 4; j++) h[r][(i + j) % OWN] = held(four.v[j]);
            } else
                h[r][i] = there && state_of(i, sub) < D_STATE ? held(from[state_of(i, sub)]) : 0.f;
        }
    }
    auto columns_of = [&](int q) {
        Some some = {};
        if (is_channel && sub * PER + q < RANK) some = *(const Some *)(dt_proj + (i64)c * RANK + sub * PER + q);
        return some;
    };
    Some columns[AHEAD ? PER / AT_A_TIME : 1];
#pragma unroll
    for (int q = 0; q < PER; q += AT_A_TIME) {
        if (AHEAD) columns[q / AT_A_TIME % (AHEAD ? PER / AT_A_TIME : 1)] = columns_of(q);
        else if (q % 16 == 0 && is_channel && sub * PER + q < RANK) fetch(dt_proj + (i64)c * RANK + sub * PER + q);
    }
    in_t log_rate[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i += QUADS ? 4 : 1) {
        const in_t *from = A_log + (i64)c * D_STATE + state_of(i, sub);
        if (QUADS) {
            Rates four = {};
            if (is_channel) four = *(const Rates *)from;
#pragma unroll
            for (int j = 0; j < 4; j++) log_rate[(i + j) % OWN] = four.v[j];
        } else
            log_rate[i] = is_channel && state_of(i, sub) < D_STATE ? *from : (in_t)0;
    }
    const in_t raw_bias = is_channel ? dt_bias[c] : (in_t)0, raw_skip = is_channel ? D[c] : (in_t)0;

    wait_for_previous();
    let_next_begin();
    float gate[(ROWS + SUBS - 1) / SUBS], x[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const bool there = is_channel && row0 + r < rows;
        if (r % SUBS == sub) gate[r / SUBS] = there ? widen(gates[(i64)(row0 + r) * gate_stride + c]) : 0.f;
        x[r] = there ? widen(u[(i64)(row0 + r) * channels + c]) : 0.f;
    }
    for (int at = thread; at < ROWS * N_OUT; at += THREADS) {
        const bool there = row0 + at / N_OUT < rows;
#if PARTS
        float sum = 0.f;
#pragma unroll
        for (int p = 0; p < PARTS; p++) sum += there ? products[((i64)p * rows + row0) * N_OUT + at] : 0.f;
#else
        const float sum = there ? widen(products[(i64)row0 * N_OUT + at]) : 0.f;
#endif
        sums[at / N_OUT][place_of(at % N_OUT)] = sum;
    }
    __syncthreads();

    const float bias = widen(raw_bias), skip = widen(raw_skip);
    float rate[OWN], steps[ROWS] = {};
#pragma unroll
    for (int i = 0; i < OWN; i++) rate[i] = -LOG2E * ex2(LOG2E * widen(log_rate[i]));
#pragma unroll
    for (int q = 0; q < PER; q += AT_A_TIME) {
        const Some some = AHEAD ? columns[q / AT_A_TIME % (AHEAD ? PER / AT_A_TIME : 1)] : columns_of(q);
#pragma unroll
        for (int j = 0; j < AT_A_TIME; j++)
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                if (sub * PER + q + j < RANK) steps[r] = fmaf(widen(some.v[j]), sums[r][sub * PER + q + j], steps[r]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float delta = steps[r];
#pragma unroll
        for (int far = 1; far < SUBS; far *= 2) delta += __shfl_xor_sync(FULL, delta, far);
        delta = softplus(delta + bias);
        const float driven = delta * x[r];
        float out = 0.f;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int n = state_of(i, sub);
            if (!QUADS && n >= D_STATE) break;
            h[r][i] = fmaf(ex2(delta * rate[i]), h[r][i], driven * sums[r][RANKS + n]);
            out = fmaf(h[r][i], sums[r][RANKS + STATES + n], out);
        }
#pragma unroll
        for (int far = 1; far < SUBS; far *= 2) out += __shfl_xor_sync(FULL, out, far);
        if (is_channel && row0 + r < rows) {
            state_t *to = state + ((i64)(row0 + r) * channels + c) * D_STATE;
#pragma unroll
            for (int i = 0; i < OWN; i += QUADS ? 4 : 1) {
                if (QUADS) {
                    Four four;
#pragma unroll
                    for (int j = 0; j < 4; j++) four.v[j] = kept(h[r][(i + j) % OWN]);
                    *(Four *)(to + state_of(i, sub)) = four;
                } else if (state_of(i, sub) < D_STATE)
                    to[state_of(i, sub)] = kept(h[r][i]);
            }
            if (r % SUBS == sub) {
                const float z = gate[r / SUBS];
                y[(i64)(row0 + r) * channels + c] = narrow(fmaf(skip, x[r], out) * z * sigmoid(z));
            }
        }
    }
}
