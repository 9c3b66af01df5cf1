// The optimizers (nn/optimizers.py says what they compute), one thread for each parameter p with gradient g. `s` are
// the scalars of the step, in the order in which the optimizer lists them. Nothing changes where bad_sum says that the
// gradient is not finite.

#define FOR_EACH_PARAMETER                         \
    int i = blockIdx.x * blockDim.x + threadIdx.x; \
    if (i >= n || *bad_sum != FINITE) return;

extern "C" __global__ void sgd(float *p, const float *g, const float *s, const int *bad_sum, int n) {
    FOR_EACH_PARAMETER
    p[i] -= s[0] * g[i];
}

extern "C" __global__ void momentum(float *p, const float *g, float *v, const float *s, const int *bad_sum, int n) {
    FOR_EACH_PARAMETER
    v[i] = s[0] * v[i] - s[1] * g[i];
    p[i] += v[i];
}

extern "C" __global__ void nesterov(float *p, const float *g, float *v, const float *s, const int *bad_sum, int n) {
    FOR_EACH_PARAMETER
    p[i] += s[0] * s[0] * v[i] - (1 + s[0]) * s[1] * g[i];
    v[i] = s[0] * v[i] - s[1] * g[i];
}

extern "C" __global__ void adagrad(float *p, const float *g, float *h, const float *s, const int *bad_sum, int n) {
    FOR_EACH_PARAMETER
    h[i] += g[i] * g[i];
    p[i] -= s[0] * g[i] / (sqrtf(h[i]) + s[1]);
}

extern "C" __global__ void rmsprop(float *p, const float *g, float *h, const float *s, const int *bad_sum, int n) {
    FOR_EACH_PARAMETER
    h[i] = s[0] * h[i] + s[1] * g[i] * g[i];
    p[i] -= s[2] * g[i] / (sqrtf(h[i]) + s[3]);
}

extern "C" __global__ void adam(float *p, const float *g, float *m, float *v, const float *s, const int *bad_sum,
                                int n) {
    FOR_EACH_PARAMETER
    m[i] += s[0] * (g[i] - m[i]);
    v[i] += s[1] * (g[i] * g[i] - v[i]);
    p[i] -= s[2] * m[i] / (sqrtf(v[i]) + s[3]);
}

// What no rule trains moves by what its layer has put in place of a gradient.
extern "C" __global__ void add(float *p, const float *g, const int *bad_sum, int n) {
    FOR_EACH_PARAMETER
    p[i] += g[i];
}

// totals: of each block of 256 numbers of g (n,), the sum of their squares.
extern "C" __global__ void __launch_bounds__(256) squares(const float *g, double *totals, int n) {
    __shared__ double sums[256];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    sums[threadIdx.x] = i < n ? (double)g[i] * g[i] : 0;
    for (int half = 128; half > 0; half /= 2) {  // the same order in every run
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) totals[blockIdx.x] = sums[0];
}

// g times most / length, where the length, the root of the sum of all squares, is more than that.
extern "C" __global__ void __launch_bounds__(256) clip(float *g, const double *totals, int count, float most,
                                                       const int *bad_sum, int n) {
    __shared__ double sums[256];
    sums[threadIdx.x] = 0;
    for (int block = threadIdx.x; block < count; block += 256) sums[threadIdx.x] += totals[block];
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    double length = sqrt(sums[0]);
    FOR_EACH_PARAMETER
    if (length > most) g[i] *= (float)(most / length);
}

// The average of the weights.
extern "C" __global__ void average(float *ema, const float *p, const float *share, const int *bad_sum, int n) {
    FOR_EACH_PARAMETER
    ema[i] += *share * (p[i] - ema[i]);
}

// Weight decay: keep is 1 - rate decay.
extern "C" __global__ void decay(float *p, const float *keep, const int *bad_sum, int n) {
    FOR_EACH_PARAMETER
    p[i] *= *keep;
}
