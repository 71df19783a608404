// What stands around `step_rows` in one decode step of a layer of several sequences: the norm, a product with in_proj or
// out_proj, and the convolution together with the product with x_proj. No number depends on how many sequences there are.
// Compiled behind rows_common.cu with, as macros:
//   PART      1: norm_rows, 2: product_rows, 3: conv_rows     WARPS     of a block
//   1: WIDTH  of the stream     EPS_BITS  of a float
//   2: IN_SIZE     of a row of the weight, a multiple of 32 WARPS     OUTS, ROWS  of a block: in 16 outputs, in 8 sequences
//      ADDS   whether the stream is added and the sum is fp32
//   3: TAPS   of the convolution     N_OUT     outputs of x_proj     HAS_BIAS     of the convolution
#define THREADS (32 * WARPS)

// c += a b, of 16 outputs and 8 sequences. A thread has, of its rows of both, four neighbours of the 16 numbers that are
// summed; which they are is the same for both, and does not matter.
__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if IN == 1
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// The same of 32 numbers: eight neighbours of each row. low, high: of output g and g + 8, x: of sequence g, g: lane / 4.
__device__ __forceinline__ void multiply_32(float (&c)[4], const uint4 &low, const uint4 &high, const uint4 &x) {
    multiply(c, low.x, high.x, low.y, high.y, x.x, x.y);
    multiply(c, low.z, high.z, low.w, high.w, x.z, x.w);
}

#if PART == 1
extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(const float *stream, const in_t *weight, in_t *y) {
    __shared__ float sums[WARPS];
    const int thread = threadIdx.x;
    const i64 row = (i64)blockIdx.x * WIDTH;
    float v[(WIDTH + THREADS - 1) / THREADS], square = 0.f;
    wait_for_previous();
    let_next_begin();
#pragma unroll
    for (int i = 0; i < (WIDTH + THREADS - 1) / THREADS; i++) {
        const int c = i * THREADS + thread;
        v[i] = c < WIDTH ? stream[row + c] : 0.f;
        square = fmaf(v[i], v[i], square);
    }
    float factor[(WIDTH + THREADS - 1) / THREADS];
#pragma unroll
    for (int i = 0; i < (WIDTH + THREADS - 1) / THREADS; i++)
        factor[i] = i * THREADS + thread < WIDTH ? widen(weight[i * THREADS + thread]) : 0.f;
#pragma unroll
    for (int far = 16; far > 0; far /= 2) square += __shfl_xor_sync(FULL, square, far);
    if (thread % 32 == 0) sums[thread / 32] = square;
    __syncthreads();
    square = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) square += sums[w];
    const float scale = 1.f / sqrtf(square / WIDTH + __uint_as_float(EPS_BITS));
#pragma unroll
    for (int i = 0; i < (WIDTH + THREADS - 1) / THREADS; i++)
        if (i * THREADS + thread < WIDTH) y[row + i * THREADS + thread] = narrow(v[i] * scale * factor[i]);
}
#elif PART == 2
#define PIECES (IN_SIZE / THREADS)   // of 32 numbers that a warp sums
#define OUTPUTS (16 * OUTS)          // of a block
#define PITCH (OUTPUTS + 4)          // that no two threads of a warp write to one bank
#define PAIRS ((8 * ROWS * OUTPUTS / 2 + THREADS - 1) / THREADS)  // of outputs of a thread
struct __align__(2 * sizeof(in_t)) Two { in_t v[2]; };

extern "C" __global__ void __launch_bounds__(THREADS)
    product_rows(const in_t *x, i64 x_stride, const in_t *weight, const float *stream, void *out, int rows, int n_out) {
    // x `(rows, IN_SIZE)`, weight `(n_out, IN_SIZE)`, n_out a multiple of 16; stream, out `(rows, n_out)`
    extern __shared__ __align__(16) float sums[];  // `(WARPS, 8 ROWS, PITCH)`
    const int thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    const int out0 = blockIdx.x * OUTPUTS, row0 = blockIdx.y * 8 * ROWS, k0 = warp * 32 * PIECES + 8 * t;

    uint4 low[OUTS][PIECES], high[OUTS][PIECES];
#pragma unroll
    for (int o = 0; o < OUTS; o++)
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            low[o][p] = high[o][p] = make_uint4(0, 0, 0, 0);
            if (out0 + 16 * o < n_out) {
                const in_t *from = weight + (i64)(out0 + 16 * o + g) * IN_SIZE + k0 + 32 * p;
                low[o][p] = *(const uint4 *)from;
                high[o][p] = *(const uint4 *)(from + 8 * IN_SIZE);
            }
        }
    // of pair i: two outputs of a sequence
    auto row_of = [&](int i) { return (i * THREADS + thread) / (OUTPUTS / 2); };
    auto output_of = [&](int i) { return (i * THREADS + thread) % (OUTPUTS / 2) * 2; };
    auto is_there = [&](int i) { return row_of(i) < 8 * ROWS && row0 + row_of(i) < rows && out0 + output_of(i) < n_out; };
#if ADDS
    float2 before[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
        before[i] = is_there(i) ? *(const float2 *)(stream + (i64)(row0 + row_of(i)) * n_out + out0 + output_of(i))
                                : make_float2(0.f, 0.f);
#endif
    wait_for_previous();
    let_next_begin();

    float c[OUTS][ROWS][4] = {};
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        uint4 some[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = row0 + 8 * r + g;
            some[r] = make_uint4(0, 0, 0, 0);
            if (row < rows) some[r] = *(const uint4 *)(x + row * x_stride + k0 + 32 * p);
        }
#pragma unroll
        for (int o = 0; o < OUTS; o++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) multiply_32(c[o][r], low[o][p], high[o][p], some[r]);
    }
#pragma unroll
    for (int o = 0; o < OUTS; o++)
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                sums[(warp * 8 * ROWS + 8 * r + 2 * t + i % 2) * PITCH + 16 * o + g + i / 2 * 8] = c[o][r][i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        if (!is_there(i)) continue;
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float2 one = *(const float2 *)(sums + (w * 8 * ROWS + row_of(i)) * PITCH + output_of(i));
            sum.x += one.x, sum.y += one.y;
        }
        const i64 at = (i64)(row0 + row_of(i)) * n_out + out0 + output_of(i);
#if ADDS
        *(float2 *)((float *)out + at) = make_float2(before[i].x + sum.x, before[i].y + sum.y);
#else
        *(Two *)((in_t *)out + at) = Two{{narrow(sum.x), narrow(sum.y)}};
#endif
    }
}
#else
#define TILES ((N_OUT + 15) / 16)
#define PITCH (16 * TILES + 4)
#define ROW (32 + 8)  // numbers of a sequence in `made`

extern "C" __global__ void __launch_bounds__(THREADS)
    conv_rows(const in_t *inner, i64 inner_stride, float *state, const in_t *weight, const in_t *bias, const in_t *x_proj,
              in_t *u, float *parts, int rows, int channels) {
    // Eight sequences, and a channel a thread; channels are a multiple of 32. state `(rows, channels, TAPS - 1)`, x_proj
    // `(N_OUT, channels)`, u `(rows, channels)`, parts `(blocks of channels, rows, N_OUT)`
    __shared__ __align__(16) in_t made[WARPS][8][ROW];
    __shared__ float sums[WARPS][8][PITCH];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int c = blockIdx.x * THREADS + thread, row0 = blockIdx.y * 8;
    const bool is_channel = c < channels;  // of a warp all or none

    float past[8][TAPS - 1], taps[TAPS];
#pragma unroll
    for (int r = 0; r < 8; r++)
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++)
            past[r][k] = is_channel && row0 + r < rows ? state[((i64)(row0 + r) * channels + c) * (TAPS - 1) + k] : 0.f;
#pragma unroll
    for (int k = 0; k < TAPS; k++) taps[k] = is_channel ? widen(weight[(i64)c * TAPS + k]) : 0.f;
    const float added = HAS_BIAS && is_channel ? widen(bias[c]) : 0.f;
    uint4 low[TILES], high[TILES];
#pragma unroll
    for (int o = 0; o < TILES; o++) {
        const in_t *from = x_proj + (i64)(16 * o + g) * channels + (c - lane) + 8 * t;
        low[o] = high[o] = make_uint4(0, 0, 0, 0);
        if (is_channel && 16 * o + g < N_OUT) low[o] = *(const uint4 *)from;
        if (is_channel && 16 * o + g + 8 < N_OUT) high[o] = *(const uint4 *)(from + (i64)8 * channels);
    }
    wait_for_previous();
    let_next_begin();

    in_t now[8];
#pragma unroll
    for (int r = 0; r < 8; r++) now[r] = is_channel && row0 + r < rows ? inner[(row0 + r) * inner_stride + c] : (in_t)0;
#pragma unroll
    for (int r = 0; r < 8; r++) {
        const float latest = widen(now[r]);
        float out = added;
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++) out = fmaf(past[r][k], taps[k], out);
        out = fmaf(latest, taps[TAPS - 1], out);
        const in_t result = narrow(out * sigmoid(out));
        made[warp][r][lane] = result;
        if (is_channel && row0 + r < rows) {
            const i64 at = (i64)(row0 + r) * channels + c;
            u[at] = result;
#pragma unroll
            for (int k = 0; k < TAPS - 1; k++) state[at * (TAPS - 1) + k] = k == TAPS - 2 ? latest : past[r][(k + 1) % (TAPS - 1)];
        }
    }
    __syncwarp();
    const uint4 x = *(const uint4 *)&made[warp][g][8 * t];
#pragma unroll
    for (int o = 0; o < TILES; o++) {
        float sum[4] = {};
        multiply_32(sum, low[o], high[o], x);
#pragma unroll
        for (int i = 0; i < 4; i++) sums[warp][2 * t + i % 2][16 * o + g + i / 2 * 8] = sum[i];
    }
    __syncthreads();
    for (int at = thread; at < 8 * N_OUT; at += THREADS) {
        if (row0 + at / N_OUT >= rows) break;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sums[w][at / N_OUT][at % N_OUT];
        parts[((i64)blockIdx.x * rows + row0) * N_OUT + at] = sum;
    }
}
#endif
