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
