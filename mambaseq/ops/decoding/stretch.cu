// Position after position of sequences by one kernel that stays: all of a model's steps, the drawing of each token
// included, as phases that a barrier parts. The grid is groups of as many blocks, each with a barrier of its own; a group has
// a sequence, and then the next that no group has. A phase is rows of a linear map and what is done with each; a warp has a
// row. Compiled with, as macros:
//   THREADS  of a block
//   PIECES   of 128 numbers that the longest vector has, at most
//   HELD     states of a channel that a lane has, at most
//   CHOICES  tokens that a lane has, at most
//   KINDS    bits: the kinds of phases that there are      FLAGS    all of their flags
//   COMPLEX_STATES   0 or 1 where all states are alike, else 2      BIASED, POOLED   whether any phase has a bias, a pool
//   SINGLE   whether no warp has more than one row of a phase. Otherwise weights are read when they are needed, by so many
//            warps that these hide the wait
typedef unsigned int u32;
typedef long long i64;
#define WARPS (THREADS / 32)
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

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
    for (int far = 16; far; far /= 2) v += __shfl_xor_sync(FULL, v, far);
    return v;
}
__device__ __forceinline__ void sums_of_warp(float &u, float &v, float &w) {
#pragma unroll
    for (int far = 16; far; far /= 2) {
        const float a = __shfl_xor_sync(FULL, u, far), b = __shfl_xor_sync(FULL, v, far), c = __shfl_xor_sync(FULL, w, far);
        u += a, v += b, w += c;
    }
}
__device__ __forceinline__ void sums_of_warp(float &u, float &v) {
#pragma unroll
    for (int far = 16; far; far /= 2) {
        const float a = __shfl_xor_sync(FULL, u, far), b = __shfl_xor_sync(FULL, v, far);
        u += a, v += b;
    }
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
__device__ __forceinline__ float dot(const Vec &x, const Vec &y) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);  // short chains: little else is there to hide them
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        sum.x = fmaf(x.v[i].x, y.v[i].x, sum.x), sum.y = fmaf(x.v[i].y, y.v[i].y, sum.y);
        sum.z = fmaf(x.v[i].z, y.v[i].z, sum.z), sum.w = fmaf(x.v[i].w, y.v[i].w, sum.w);
    }
    return (sum.x + sum.y) + (sum.z + sum.w);
}
// The same of a row that is yet to be read and a vector of this block, in the same order.
__device__ __forceinline__ float dot_of(const float *row, const float *vector, int cols) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int at = i * 128 + threadIdx.x % 32 * 4;
        if (at >= cols) continue;
        const float4 x = *(const float4 *)(vector + at), y = *(const float4 *)(row + at);
        sum.x = fmaf(x.x, y.x, sum.x), sum.y = fmaf(x.y, y.y, sum.y);
        sum.z = fmaf(x.z, y.z, sum.z), sum.w = fmaf(x.w, y.w, sum.w);
    }
    return (sum.x + sum.y) + (sum.z + sum.w);
}
// What other blocks have written, for all threads of this one.
__device__ __forceinline__ void stage(float *to, const float *from, int n) {
    for (int at = threadIdx.x * 4; at < n; at += THREADS * 4) *(float4 *)(to + at) = __ldcg((const float4 *)(from + at));
}

// The barrier over the grid, in two parts. What was written before `arrive` may be read after `wait`, past this
// multiprocessor's own cache (`stage`): the wait is no acquire, which would empty that cache of the weights.
#define WATCH (THREADS - 32)  // the thread that arrives and waits for its block: its warp seldom has a row
__device__ __forceinline__ void arrive(u32 *counter) {
    __syncthreads();
    if (threadIdx.x == WATCH) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void wait(const u32 *counter, u32 goal) {
    if (threadIdx.x == WATCH) {
        u32 now;
        do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
        while ((int)(now - goal) < 0);
    }
    __syncthreads();
}

// What a warp needs for a row and does not wait for others to know: it is fetched while they are waited for. States were
// written by the thread that reads them.
struct Ahead {
    Vec weight, other, up;
    float2 a[HELD], b[HELD], c[HELD], h[HELD];
    float bias, other_bias, D, past, tap, conv_bias;
    // of what is made while the row's input is on its way: y is from_states + u from_input, the convolution from_past + tap v
    float from_states, from_input, from_past, last_tap;
    float v, u;  // what goes into the states when the row is done: nobody waits for those
};
__device__ __forceinline__ bool has_conv(const Phase &p) { return IS(MAMBA) || IS(CONV); }
__device__ __forceinline__ bool has_states(const Phase &p) { return IS(MAMBA) || IS(LTI) || IS(SCAN); }
__device__ __forceinline__ bool is_complex(const Phase &p) { return COMPLEX_STATES == 2 ? p.flags & COMPLEX : COMPLEX_STATES; }
__device__ __forceinline__ bool has_other(const Phase &p) { return has_conv(p) || HAS(GLU) || HAS(SWIGLU); }
__device__ __forceinline__ void fetch(Ahead &f, const Phase &p, int row, int slot) {
    const int rows = (int)p.rows, cols = (int)p.cols, lane = threadIdx.x % 32;
    if (row >= rows) return;
    if (!IS(LTI)) {
        if (SINGLE) f.weight = part_of(p.weight + (i64)row * cols, cols);
        f.bias = BIASED && p.bias ? p.bias[row] : 0.f;
        if (has_other(p)) {
            if (SINGLE) f.other = part_of(p.weight + (i64)(rows + row) * cols, cols);
            f.other_bias = BIASED && p.bias ? p.bias[rows + row] : 0.f;
        }
    }
    if (SINGLE && POOLED && p.up) f.up = part_of(p.up + ((i64)slot * rows + row) * p.held_cols, (int)p.held_cols);
    if (has_conv(p)) {
        const int width = (int)p.width;
        f.past = lane < width - 1 ? p.conv_state[(i64)row * (width - 1) + lane] : 0.f;
        f.tap = lane < width ? p.conv[(i64)row * width + lane] : 0.f;
        f.conv_bias = p.conv_bias ? p.conv_bias[row] : 0.f, f.last_tap = p.conv[(i64)row * width + width - 1];
    }
    if (!has_states(p)) return;
    f.D = p.D[row];
    const int n = (int)p.n_states;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int state = i * 32 + lane;
        const i64 at = (i64)row * n + state;
        f.a[i] = f.b[i] = f.c[i] = f.h[i] = make_float2(0.f, 0.f);
        if (state >= n) continue;
        if (is_complex(p)) {
            f.a[i] = ((const float2 *)p.a)[at], f.h[i] = ((const float2 *)p.state)[at];
            if (!IS(SCAN)) f.b[i] = ((const float2 *)p.b)[at], f.c[i] = ((const float2 *)p.c)[at];
        } else {
            f.a[i].x = p.a[at], f.h[i].x = p.state[at];
            if (!IS(SCAN)) f.b[i].x = p.b[at], f.c[i].x = p.c[at];
        }
    }
}
// What a step of a channel's states is by, in place of what was fetched: the rates in `a`, and B and C beside the step size in
// `products`.
__device__ __forceinline__ void select(Ahead &f, const Phase &p, const float *products, float delta) {
    const int n = (int)p.n_states;
    const float *const B = products + p.cols, *const C = B + n * (is_complex(p) ? 2 : 1);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int state = i * 32 + threadIdx.x % 32;
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
    if (has_conv(p)) f.from_past = sum_of_warp(threadIdx.x % 32 < p.width - 1 ? f.past * f.tap : 0.f) + f.conv_bias;
    if (!has_states(p) || IS(SCAN)) return;
    float y = 0.f, more = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const float2 a = f.a[i], b = f.b[i], c = f.c[i], h = f.h[i];
        y = fmaf(c.x, fmaf(a.x, h.x, -a.y * h.y), fmaf(c.y, fmaf(a.x, h.y, a.y * h.x), y));
        more = fmaf(c.x, b.x, fmaf(c.y, b.y, more));
    }
    f.from_states = sum_of_warp(y), f.from_input = sum_of_warp(more);
}
// The same where it depends on the input.
__device__ __forceinline__ float read_out(const Ahead &f, float u) {
    float y = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const float2 a = f.a[i], b = f.b[i], c = f.c[i], h = f.h[i];
        y = fmaf(c.x, fmaf(a.x, h.x, fmaf(-a.y, h.y, b.x * u)), fmaf(c.y, fmaf(a.x, h.y, fmaf(a.y, h.x, b.y * u)), y));
    }
    return sum_of_warp(y);
}
// A row's states and last inputs after this step.
__device__ __forceinline__ void keep(const Ahead &f, const Phase &p, int row) {
    const int lane = threadIdx.x % 32, n = (int)p.n_states, width = (int)p.width;
    if (has_conv(p)) {
        const float later = __shfl_down_sync(FULL, lane == width - 1 ? f.v : f.past, 1);
        if (lane < width - 1) p.conv_state[(i64)row * (width - 1) + lane] = later;
    }
    if (!has_states(p)) return;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int state = i * 32 + lane;
        const i64 at = (i64)row * n + state;
        const float2 a = f.a[i], b = f.b[i], h = f.h[i];
        const float2 now = make_float2(fmaf(a.x, h.x, fmaf(-a.y, h.y, b.x * f.u)), fmaf(a.x, h.y, fmaf(a.y, h.x, b.y * f.u)));
        if (state >= n) continue;
        if (is_complex(p)) ((float2 *)p.state)[at] = now;
        else p.state[at] = now.x;
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
    stretch(const Phase *phases, const i64 *strides, int n_phases, int n_steps, int batch, int groups, const float *embedding,
            const float *conditions, int d_model, const float *all_logits, int logits_stride, int vocabulary,
            const double *temperature, const double *all_uniforms, const i64 *first, i64 *all_tokens, const i64 *counts,
            const i64 *pools, int n_pools, u32 *counters, int *failed) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ __align__(16) float vector[128 * PIECES], held[128 * PIECES], staged[32 * CHOICES];
    Phase *const program = (Phase *)memory;
    const int blocks = gridDim.x / groups, group = blockIdx.x / blocks, block = blockIdx.x % blocks;
    const int lane = threadIdx.x % 32, worker = threadIdx.x / 32 * blocks + block, workers = WARPS * blocks;
    const double inverse = 1. / *temperature;
    u32 *const counter = counters + group * 32;
    u32 goal = 0;
    int count[POOLS + 1];
    bool all_finite = true;
    for (int sequence = group; sequence < batch; sequence += groups) {
        __syncthreads();  // no thread reads the program of the sequence before
        for (int i = threadIdx.x; i < n_phases * (int)(sizeof(Phase) / 8); i += THREADS)
            ((i64 *)program)[i] = ((const i64 *)phases)[i] + sequence * strides[i];
        __syncthreads();
        const float *const condition = conditions ? conditions + (i64)sequence * d_model : nullptr;
        const float *const logits = all_logits + (i64)sequence * logits_stride;
        const double *const uniforms = all_uniforms ? all_uniforms + (i64)sequence * n_steps : nullptr;
        i64 *const tokens = all_tokens + (i64)sequence * n_steps;
        int token = (int)first[sequence];
#pragma unroll
        for (int i = 0; i < POOLS; i++) count[i] = i < n_pools ? (int)counts[i] : 0;
        auto slot_of = [&](const Phase &p) {
            int slot = 0;
#pragma unroll
            for (int i = 0; i < POOLS; i++) slot = p.pool == i ? count[i] : slot;
            return slot;
        };
        // where a phase's input comes from: for all blocks that have rows, and for a warp's first row
        const float *from = nullptr, *from_row = nullptr;
        int n_from = 0;
        auto look = [&](const Phase &p) {
            from = p.in, n_from = p.flags & EMBEDS || block >= p.rows ? 0 : IS(SCAN) ? (int)p.held_cols : (int)p.cols;
            from_row = (IS(OUT) || IS(SCAN)) && worker < p.rows ? p.residual + worker : nullptr;
        };
        Ahead ahead;
        fetch(ahead, program[0], worker, 0);
        for (int step = 0; step < n_steps; step++) {
            // so many pools are whole with this position, one after the other
            int whole = 0;
#pragma unroll
            for (int i = 0; i < POOLS; i++)
                if (whole == i && i < n_pools && count[i] + 1 == (int)pools[i]) whole = i + 1;
            for (int k = 0; k < n_phases;) {
                const Phase &p = program[k];
                const int rows = (int)p.rows, cols = (int)p.cols, slot = slot_of(p);
                const int at = threadIdx.x * 4;
                float4 some = make_float4(0.f, 0.f, 0.f, 0.f), more = some;
                if (at < n_from) some = __ldcg((const float4 *)(from + at));
                float input = from_row ? __ldcg(from_row) : 0.f, gate = 0.f;
                if (IS(SCAN) && worker < rows) gate = __ldcg(p.copy + worker);
                if (POOLED && p.held && at < p.held_cols) more = __ldcg((const float4 *)(p.held + at));
                int done = -1;  // the row whose states are still to be kept
                const float share = 1.f / cols, eps = __int_as_float((int)p.eps);
                const bool normed = p.normed;
                if (block < rows) {
                    if (worker < rows) prepare(ahead, p);
                    if (p.flags & EMBEDS) {
                        for (int at = threadIdx.x; at < cols; at += THREADS) {
                            const float v = embedding[(i64)token * d_model + at] + (condition ? condition[at] : 0.f);
                            vector[at] = v;
                            if (block == 0) p.residual[at] = v;
                        }
                    } else if (at < n_from) {
                        *(float4 *)(vector + at) = some;
                    }
                    if (POOLED && p.held && at < p.held_cols) *(float4 *)(held + at) = more;
                    __syncthreads();
                }
                if (worker < rows) {
                    Vec x;
                    if (SINGLE) x = part_of(vector, cols);
                    const float own = SINGLE || !normed ? 0.f : sum_of_warp(dot_of(vector, vector, cols));
                    for (int row = worker; row < rows; row += workers) {
                        if (!SINGLE && row != worker) {
                            keep(ahead, p, done);
                            fetch(ahead, p, row, slot);
                            prepare(ahead, p);
                            if (IS(OUT) || IS(SCAN)) input = __ldcg(p.residual + row);
                            if (IS(SCAN)) gate = __ldcg(p.copy + row);
                        }
                        done = row;
                        // sums that are not wanted cost nothing beside those that are
                        float v = 0.f, other = 0.f, squares = own;
                        if (SINGLE) {
                            v = dot(x, ahead.weight), other = dot(x, ahead.other), squares = dot(x, x);
                            sums_of_warp(v, other, squares);
                        } else if (!IS(LTI)) {
                            const float *const weight = p.weight + (i64)row * cols;
                            v = dot_of(weight, vector, cols);
                            if (has_other(p)) other = dot_of(weight + (i64)rows * cols, vector, cols);
                            sums_of_warp(v, other);
                        }
                        // a norm's weight is in the rows'
                        const float scale = normed ? rsqrtf(fmaf(squares, share, eps)) : 1.f;
                        v = fmaf(scale, v, ahead.bias), other = fmaf(scale, other, ahead.other_bias);
                        if (IS(OUT)) {
                            float given = 0.f;
                            if (POOLED && p.held) {
                                const int n = (int)p.held_cols;
                                given = SINGLE ? dot(part_of(held, n), ahead.up) : dot_of(p.up + ((i64)slot * rows + row) * n, held, n);
                                given = sum_of_warp(given);
                            }
                            if (HAS(GLU)) v *= 1.f / (1.f + __expf(-other));
                            if (lane == 0) {
                                v += input;
                                if (POOLED && p.window) p.window[(i64)slot * rows + row] = v;
                                v += given;
                                if (POOLED && p.copy) p.copy[row] = v;
                            }
                        } else if (has_conv(p)) {
                            ahead.v = v, ahead.u = v = silu(fmaf(ahead.last_tap, v, ahead.from_past));
                            if (IS(MAMBA)) {
                                v = fmaf(ahead.D + ahead.from_input, v, ahead.from_states) * silu(other);
                            } else {
                                if (lane == 0) p.copy[row] = silu(other);
                            }
                        } else if (IS(SCAN)) {
                            select(ahead, p, vector, softplus(v));
                            ahead.u = input, v = fmaf(ahead.D, input, read_out(ahead, input)) * gate;
                        } else if (IS(LTI)) {
                            ahead.u = scale * vector[row];
                            v = gelu(fmaf(ahead.D + ahead.from_input, ahead.u, ahead.from_states));
                        } else if (IS(GATED)) {
                            v = HAS(SWIGLU) ? silu(v) * other : gelu(v);
                        }
                        if (lane == 0) p.out[row] = v;
                        if (SINGLE) break;
                    }
                }
                arrive(counter);
                if (done >= 0) keep(ahead, p, done);
                k++;
                while (k < n_phases && program[k].level > whole) k++;
                const Phase &next = program[k < n_phases ? k : 0];
                fetch(ahead, next, worker, slot_of(next));
                look(next);
                wait(counter, goal += blocks);
            }
            stage(staged, logits, vocabulary);
            __syncthreads();
            bool finite;
            token = draw(staged, vocabulary, inverse, uniforms ? uniforms + step : nullptr, finite);
            all_finite &= finite;
            if (worker == 0 && lane == 0) tokens[step] = token;
#pragma unroll
            for (int i = 0; i < POOLS; i++)
                if (i <= whole && i < n_pools) count[i] = count[i] + 1 == (int)pools[i] ? 0 : count[i] + 1;
        }
    }
    if (worker == 0 && lane == 0 && !all_finite) *failed = 1;
}
