// What a step of a diagonal system multiplies states and inputs by, from its parameters, and back: a = exp(z) and
// b = dt (exp(z) - 1) / z B with z = dt A (zero-order hold), dt = exp(log_dt), A = -exp(A_log) + i A_imag, B real. A warp has a
// channel. COMPLEX: a, b are pairs of real and imaginary parts; otherwise A is real.
typedef long long i64;

struct Complex { float r, i; };
__device__ __forceinline__ Complex times(Complex p, Complex q) { return Complex{p.r * q.r - p.i * q.i, p.r * q.i + p.i * q.r}; }
// conj(p) q
__device__ __forceinline__ Complex against(Complex p, Complex q) { return Complex{p.r * q.r + p.i * q.i, p.r * q.i - p.i * q.r}; }
__device__ __forceinline__ Complex over(Complex p, Complex q) {
    const float size = 1.f / (q.r * q.r + q.i * q.i);
    const Complex v = against(q, p);
    return Complex{v.r * size, v.i * size};
}

struct Rule {
    float dt;
    Complex A, a, ratio, slope;  // (exp(z) - 1) / z, and how it changes with z
};
__device__ __forceinline__ Rule rule(const float *log_dt, const float *A_log, const float *A_imag, i64 channel, i64 place) {
    Rule s;
    s.dt = expf(log_dt[channel]);
    s.A = Complex{-expf(A_log[place]), COMPLEX ? A_imag[place] : 0.f};
    const Complex z{s.dt * s.A.r, s.dt * s.A.i};
    float sine = 0.f, cosine = 1.f, half = 0.f;
    if (COMPLEX) sincosf(z.i, &sine, &cosine), half = sinf(.5f * z.i);
    const float size = expf(z.r);
    s.a = Complex{size * cosine, size * sine};
    if (z.r * z.r + z.i * z.i < .25f) {
        // their series: the sums of z^k / (k + 1)! and of k z^(k - 1) / (k + 1)!
        Complex ratio{1.f, 0.f}, slope{0.f, 0.f};
        float term = 3628800.f;  // 10!
        ratio = Complex{1.f / term, 0.f}, slope = Complex{9.f / term, 0.f};
#pragma unroll
        for (int k = 8; k >= 0; k--) {
            term /= k + 2;  // (k + 1)!
            ratio = times(ratio, z), ratio.r += 1.f / term;
            if (k > 0) slope = times(slope, z), slope.r += k / term;
        }
        s.ratio = ratio, s.slope = slope;
    } else {
        const float more = expm1f(z.r);
        s.ratio = over(Complex{more * cosine - 2.f * half * half, s.a.i}, z);
        s.slope = over(Complex{s.a.r - s.ratio.r, s.a.i - s.ratio.i}, z);
    }
    return s;
}
__device__ __forceinline__ Complex read(const float *from, i64 place) {
    return COMPLEX ? Complex{from[2 * place], from[2 * place + 1]} : Complex{from[place], 0.f};
}

extern "C" __global__ void discretise(const float *log_dt, const float *A_log, const float *A_imag, const float *B,
                                      int channels, int d_state, float *a, float *b) {
    const i64 channel = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (channel >= channels) return;
    for (int n = threadIdx.x % 32; n < d_state; n += 32) {
        const i64 place = channel * d_state + n;
        const Rule s = rule(log_dt, A_log, A_imag, channel, place);
        const float scale = s.dt * B[place];
        if (COMPLEX) {
            ((float2 *)a)[place] = make_float2(s.a.r, s.a.i);
            ((float2 *)b)[place] = make_float2(scale * s.ratio.r, scale * s.ratio.i);
        } else {
            a[place] = s.a.r, b[place] = scale * s.ratio.r;
        }
    }
}

extern "C" __global__ void discretise_backward(const float *log_dt, const float *A_log, const float *A_imag, const float *B,
                                               const float *da, const float *db, int channels, int d_state,
                                               float *dlog_dt, float *dA_log, float *dA_imag, float *dB) {
    const i64 channel = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (channel >= channels) return;
    float of_dt = 0.f, dt = 0.f;
    for (int n = threadIdx.x % 32; n < d_state; n += 32) {
        const i64 place = channel * d_state + n;
        const Rule s = rule(log_dt, A_log, A_imag, channel, place);
        const Complex up = read(db, place), of_ratio{B[place] * up.r, B[place] * up.i};
        dB[place] = s.dt * against(s.ratio, up).r;
        Complex of_z = against(s.a, read(da, place));
        const Complex more = against(s.slope, of_ratio);
        of_z.r = fmaf(s.dt, more.r, of_z.r), of_z.i = fmaf(s.dt, more.i, of_z.i);
        dA_log[place] = s.dt * of_z.r * s.A.r;
        if (COMPLEX) dA_imag[place] = s.dt * of_z.i;
        of_dt += against(s.ratio, of_ratio).r + against(s.A, of_z).r, dt = s.dt;
    }
#pragma unroll
    for (int far = 16; far; far /= 2) of_dt += __shfl_xor_sync(~0u, of_dt, far);
    if (threadIdx.x % 32 == 0) dlog_dt[channel] = of_dt * dt;
}
