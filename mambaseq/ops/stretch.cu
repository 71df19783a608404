// Position after position of one sequence by one kernel that stays: all of a model's steps, the drawing of each token
// included, as phases that a barrier over the grid parts. A phase is rows of a linear map and what is done with each; a warp
// has a row. Compiled with, as macros:
//   THREADS  of a block
//   PIECES   of 128 numbers that the longest vector has, at most
//   HELD     states of a channel that a lane has, at most
//   CHOICES  tokens that a lane has, at most
typedef unsigned int u32;
typedef long long i64;
#define WARPS (THREADS / 32)
#define FULL ~0u

enum { LINEAR, OUT, MAMBA, LTI, GATED };
enum { EMBEDS = 1, GLU = 2, COMPLEX = 4, SWIGLU = 8 };

// As `mambaseq.ops.stretch.Phase` lays it out.
struct Phase {
    i64 kind, level, rows, cols;
    const float *in, *norm;
    i64 eps;  // bits of a float
    const float *weight, *bias;
    float *out;
    i64 flags;
    const float *a, *b, *c, *D;  // of the states, c as y is the sum of its products with them
    float *state;
    i64 n_states;
    const float *conv, *conv_bias;
    float *conv_state;
    i64 width;
    float *residual, *window, *copy;  // OUT: what is added to, where a window of positions and the sum itself go too
    const float *up, *held;           // and what a coarser resolution gives
    i64 held_cols, pool;              // pool: which, or -1
};

struct Vec { float4 v[PIECES]; };

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
    for (int far = 16; far; far /= 2) v += __shfl_xor_sync(FULL, v, far);
    return v;
}
__device__ __forceinline__ float silu(float v) { return v / (1.f + __expf(-v)); }
__device__ __forceinline__ float gelu(float v) { return .5f * v * (1.f + erff(v * .70710678f)); }

// Numbers that others may have written since the kernel began, so not from this multiprocessor's own cache.
__device__ __forceinline__ void load(Vec &to, const float *from, int cols) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int at = i * 128 + lane * 4;
        to.v[i] = at < cols ? __ldcg((const float4 *)(from + at)) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
}
__device__ __forceinline__ float part(const Vec &x, const float *row, int cols) {
    const int lane = threadIdx.x % 32;
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int at = i * 128 + lane * 4;
        if (at < cols) {
            const float4 w = *(const float4 *)(row + at);
            total = fmaf(w.x, x.v[i].x, total), total = fmaf(w.y, x.v[i].y, total);
            total = fmaf(w.z, x.v[i].z, total), total = fmaf(w.w, x.v[i].w, total);
        }
    }
    return total;
}
__device__ __forceinline__ float part_of_squares(const Vec &x) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        total = fmaf(x.v[i].x, x.v[i].x, total), total = fmaf(x.v[i].y, x.v[i].y, total);
        total = fmaf(x.v[i].z, x.v[i].z, total), total = fmaf(x.v[i].w, x.v[i].w, total);
    }
    return total;
}

// All blocks wait for all: `goal` counts what has come since the kernel began.
__device__ __forceinline__ void meet(u32 *counter, u32 &goal) {
    __syncthreads();
    goal += gridDim.x;
    if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
        u32 now;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
        while ((int)(now - goal) < 0);
    }
    __syncthreads();
}

// One step of a channel's states; the sum over states of what C reads.
struct States {
    float2 a[HELD], b[HELD], c[HELD], h[HELD];
};
__device__ __forceinline__ void look(States &s, const Phase &p, int channel) {
    const int lane = threadIdx.x % 32, n = (int)p.n_states;
    const bool is_complex = p.flags & COMPLEX;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int state = i * 32 + lane;
        const i64 at = (i64)channel * n + state;
        const float2 none = make_float2(0.f, 0.f);
        s.a[i] = s.b[i] = s.c[i] = s.h[i] = none;
        if (state >= n) continue;
        if (is_complex) {
            s.a[i] = ((const float2 *)p.a)[at], s.b[i] = ((const float2 *)p.b)[at];
            s.c[i] = ((const float2 *)p.c)[at], s.h[i] = ((const float2 *)p.state)[at];
        } else {
            s.a[i].x = p.a[at], s.b[i].x = p.b[at], s.c[i].x = p.c[at], s.h[i].x = p.state[at];
        }
    }
}
__device__ __forceinline__ float advance(States &s, const Phase &p, int channel, float u) {
    const int lane = threadIdx.x % 32, n = (int)p.n_states;
    const bool is_complex = p.flags & COMPLEX;
    float y = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int state = i * 32 + lane;
        const i64 at = (i64)channel * n + state;
        const float2 a = s.a[i], b = s.b[i], h = s.h[i];
        const float2 now = make_float2(fmaf(a.x, h.x, fmaf(-a.y, h.y, b.x * u)), fmaf(a.x, h.y, fmaf(a.y, h.x, b.y * u)));
        y = fmaf(s.c[i].x, now.x, fmaf(s.c[i].y, now.y, y));
        if (state >= n) continue;
        if (is_complex) ((float2 *)p.state)[at] = now;
        else p.state[at] = now.x;
    }
    return sum_of_warp(y);
}

// The token whose share the number falls in, or, where there is none, the likeliest; every warp by itself, all alike.
__device__ __forceinline__ int draw(const float *logits, int n, double temperature, const double *uniform, bool &finite) {
    const int lane = threadIdx.x % 32;
    float v[CHOICES], most = -__int_as_float(0x7f800000);
    bool odd = false;
#pragma unroll
    for (int i = 0; i < CHOICES; i++) {  // a lane has neighbours
        const int at = lane * CHOICES + i;
        v[i] = at < n ? __ldcg(logits + at) : -__int_as_float(0x7f800000);
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
        v[i] = expf((float)((double)(v[i] - most) / temperature));
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
    stretch(const Phase *phases, int n_phases, int n_steps, const float *embedding, const float *condition, int d_model,
            const float *logits, int vocabulary, const double *temperature, const double *uniforms, const i64 *first,
            i64 *tokens, i64 *counts, const i64 *pools, int n_pools, u32 *counter, int *failed) {
    extern __shared__ __align__(16) unsigned char memory[];
    Phase *const program = (Phase *)memory;
    for (int i = threadIdx.x; i < n_phases * (int)(sizeof(Phase) / 8); i += THREADS) ((i64 *)program)[i] = ((const i64 *)phases)[i];
    __syncthreads();
    const int lane = threadIdx.x % 32, worker = threadIdx.x / 32 * gridDim.x + blockIdx.x, workers = WARPS * gridDim.x;
    u32 goal = 0;
    int token = (int)*first;
    int count[4];
#pragma unroll
    for (int i = 0; i < 4; i++) count[i] = i < n_pools ? (int)counts[i] : 0;
    bool all_finite = true;
    for (int step = 0; step < n_steps; step++) {
        // so many pools are whole with this position, one after the other
        int whole = 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (whole == i && i < n_pools && count[i] + 1 == (int)pools[i]) whole = i + 1;
        for (int k = 0; k < n_phases; k++) {
            const Phase &p = program[k];
            if (p.level > whole) continue;
            const int rows = (int)p.rows, cols = (int)p.cols;
            if (worker < rows) {
                Vec x;
                if (p.flags & EMBEDS) {
                    load(x, embedding + (i64)token * d_model, cols);
#pragma unroll
                    for (int i = 0; i < PIECES; i++) {
                        const int at = i * 128 + lane * 4;
                        if (at >= cols) continue;
                        if (condition) {
                            const float4 more = *(const float4 *)(condition + at);
                            x.v[i].x += more.x, x.v[i].y += more.y, x.v[i].z += more.z, x.v[i].w += more.w;
                        }
                        if (worker == 0) *(float4 *)(p.residual + at) = x.v[i];
                    }
                } else {
                    load(x, p.in, cols);
                }
                if (p.norm) {
                    const float scale = rsqrtf(sum_of_warp(part_of_squares(x)) / cols + __int_as_float((int)p.eps));
#pragma unroll
                    for (int i = 0; i < PIECES; i++) {
                        const int at = i * 128 + lane * 4;
                        if (at >= cols) continue;
                        const float4 w = *(const float4 *)(p.norm + at);
                        x.v[i].x *= scale * w.x, x.v[i].y *= scale * w.y, x.v[i].z *= scale * w.z, x.v[i].w *= scale * w.w;
                    }
                }
                for (int row = worker; row < rows; row += workers) {
                    const float *const weight = p.weight + (i64)row * cols;
                    if (p.kind == LINEAR) {
                        float v = sum_of_warp(part(x, weight, cols));
                        if (p.bias) v += p.bias[row];
                        if (lane == 0) p.out[row] = v;
                    } else if (p.kind == OUT) {
                        float v = part(x, weight, cols), gate = 0.f, given = 0.f;
                        if (p.flags & GLU) gate = part(x, weight + (i64)rows * cols, cols);
                        const int slot = p.pool < 0 ? 0 : p.pool == 0 ? count[0] : p.pool == 1 ? count[1] : p.pool == 2 ? count[2] : count[3];
                        if (p.held) {
                            Vec held;
                            load(held, p.held, (int)p.held_cols);
                            given = part(held, p.up + ((i64)slot * rows + row) * p.held_cols, (int)p.held_cols);
                            given = sum_of_warp(given);
                        }
                        v = sum_of_warp(v);
                        if (p.bias) v += p.bias[row];
                        if (p.flags & GLU) {
                            gate = sum_of_warp(gate);
                            if (p.bias) gate += p.bias[rows + row];
                            v *= 1.f / (1.f + __expf(-gate));
                        }
                        if (lane == 0) {
                            v += __ldcg(p.residual + row);
                            if (p.window) p.window[(i64)slot * rows + row] = v;
                            if (p.held) v += given;
                            p.out[row] = v;
                            if (p.copy) p.copy[row] = v;
                        }
                    } else if (p.kind == MAMBA) {
                        States s;
                        look(s, p, row);
                        const int width = (int)p.width;
                        float *const past = p.conv_state + (i64)row * (width - 1);
                        const float *const taps = p.conv + (i64)row * width;
                        float was = lane < width - 1 ? past[lane] : 0.f;
                        const float tap = lane < width ? taps[lane] : 0.f, D = p.D[row], extra = p.conv_bias ? p.conv_bias[row] : 0.f;
                        float u = part(x, weight, cols), z = part(x, weight + (i64)rows * cols, cols);
                        u = sum_of_warp(u), z = sum_of_warp(z);
                        if (p.bias) u += p.bias[row], z += p.bias[rows + row];
                        if (lane == width - 1) was = u;
                        const float later = __shfl_down_sync(FULL, was, 1);
                        if (lane < width - 1) past[lane] = later;
                        u = silu(sum_of_warp(was * tap) + extra);
                        const float y = advance(s, p, row, u);
                        if (lane == 0) p.out[row] = fmaf(D, u, y) * silu(z);
                    } else if (p.kind == LTI) {
                        States s;
                        look(s, p, row);
                        float u = 0.f;
#pragma unroll
                        for (int i = 0; i < PIECES; i++) {
                            const int at = row - i * 128 - lane * 4;
                            if (at >= 0 && at < 4) u = at == 0 ? x.v[i].x : at == 1 ? x.v[i].y : at == 2 ? x.v[i].z : x.v[i].w;
                        }
                        u = __shfl_sync(FULL, u, row % 128 / 4);
                        const float y = advance(s, p, row, u);
                        if (lane == 0) p.out[row] = gelu(fmaf(p.D[row], u, y));
                    } else {
                        float v = part(x, weight, cols), up = 0.f;
                        if (p.flags & SWIGLU) up = part(x, weight + (i64)rows * cols, cols);
                        v = sum_of_warp(v);
                        if (p.bias) v += p.bias[row];
                        if (p.flags & SWIGLU) {
                            up = sum_of_warp(up);
                            if (p.bias) up += p.bias[rows + row];
                            v = silu(v) * up;
                        } else {
                            v = gelu(v);
                        }
                        if (lane == 0) p.out[row] = v;
                    }
                }
            }
            meet(counter, goal);
        }
        bool finite;
        token = draw(logits, vocabulary, *temperature, uniforms ? uniforms + step : nullptr, finite);
        all_finite &= finite;
        if (worker == 0 && lane == 0) tokens[step] = token;
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i <= whole && i < n_pools) count[i] = count[i] + 1 == (int)pools[i] ? 0 : count[i] + 1;
    }
    if (worker == 0 && lane == 0) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < n_pools) counts[i] = count[i];
        if (!all_finite) *failed = 1;
    }
}
