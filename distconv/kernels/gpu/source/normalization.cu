// Batch normalisation of x (M, C), M pixels, each channel on its own. See normalization.py, which cuts x for it.
//
// A block of threads takes a strip of `pixels` pixels for a group of channels: `across` threads side by side, and as
// many rows of them as a block has room for. Each has `vector` neighbouring channels, 4 or 1, and every so many rows a
// pixel. So neighbouring threads read neighbouring numbers, and none of them divides to find its channel.
// Sums of a strip are made in a fixed order, and then those of all strips.

constexpr int THREADS = 256, AT_ONCE = 4;  // pixels that a thread has on their way from memory together

// Rows of `across` threads: the lower ones are joined to the upper ones, then half of those that are left, and so on.
// join(other): with that thread; what all threads have written to shared memory before can be read.
template <typename Join>
__device__ __forceinline__ void fold(int row, int rows, int across, Join join) {
    for (int left = rows; left > 1;) {
        __syncthreads();
        int half = (left + 1) / 2;
        if (row < left - half) join(threadIdx.x + half * across);
        left = half;
    }
}

// What this thread does of a strip.
struct Part {
    unsigned first, end;  // pixels, `rows` apart; unsigned, as a step beyond the end may pass 2^31
    int strip, row, rows, across, channel;
    bool is_first_row;  // which writes what its strip has found

    __device__ __forceinline__ Part(int M, int C, int vector, int across, int pixels) : across(across) {
        int groups = ((C + vector - 1) / vector + across - 1) / across, lane = threadIdx.x % across;
        strip = blockIdx.x / groups, rows = THREADS / across, row = threadIdx.x / across;
        channel = (blockIdx.x % groups * across + lane) * vector;
        unsigned start = (unsigned)strip * pixels;
        end = min((unsigned)M, start + pixels), first = row < rows && channel < C ? start + row : end;
        is_first_row = row == 0 && channel < C;
    }

    __device__ __forceinline__ unsigned step() const { return AT_ONCE * rows; }
    __device__ __forceinline__ bool has(unsigned at, int k) const { return at + k * rows < end; }

    // VECTOR numbers of the pixel that is the k-th from `at` on, if there is one.
    template <int VECTOR>
    __device__ __forceinline__ void load_pixel(const float *from, int C, unsigned at, int k, float *to) const {
        if (has(at, k)) load<VECTOR>(from + (at + k * rows) * C + channel, to);
    }
};

// Joins mean and sum of squares around it, of `count` numbers, to those of n others (Chan, Golub and LeVeque 1983).
template <typename Number>
struct Joining {
    Number share, weight;

    __device__ __forceinline__ Joining(Number count, Number n) {
        share = n > 0 ? n / (count + n) : 0, weight = count * share;
    }

    __device__ __forceinline__ void join(Number &mean, Number &squares, Number other_mean, Number others) const {
        Number gap = other_mean - mean;
        mean += gap * share;
        squares += others + gap * gap * weight;
    }
};

template <int VECTOR>
__device__ __forceinline__ void statistics(const float *x, float *partial, int C, const Part &part) {
    __shared__ float counts[THREADS], means[VECTOR][THREADS], all_squares[VECTOR][THREADS];
    float count = 0, mean[VECTOR] = {}, squares[VECTOR] = {};
    for (unsigned at = part.first; at < part.end; at += part.step()) {
        float numbers[AT_ONCE][VECTOR] = {}, n = 0;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            part.load_pixel<VECTOR>(x, C, at, k, numbers[k]);
            n += part.has(at, k);
        }
        Joining<float> joining(count, n);
        count += n;
#pragma unroll
        for (int v = 0; v < VECTOR; v++) {
            float sum = 0, around = 0;
            for (int k = 0; k < AT_ONCE; k++) sum += numbers[k][v];  // those that are not there are 0
            float middle = sum / n;
            for (int k = 0; k < AT_ONCE; k++) {
                float gap = numbers[k][v] - middle;
                around += k < n ? gap * gap : 0;
            }
            joining.join(mean[v], squares[v], middle, around);
        }
    }
    auto show = [&] {
        counts[threadIdx.x] = count;
        for (int v = 0; v < VECTOR; v++) means[v][threadIdx.x] = mean[v], all_squares[v][threadIdx.x] = squares[v];
    };
    show();
    fold(part.row, part.rows, part.across, [&](int other) {
        Joining<float> joining(count, counts[other]);
        count += counts[other];
        for (int v = 0; v < VECTOR; v++) joining.join(mean[v], squares[v], means[v][other], all_squares[v][other]);
        show();
    });
    if (!part.is_first_row) return;
    for (int v = 0; v < VECTOR; v++) {
        partial[2 * part.strip * C + part.channel + v] = mean[v];
        partial[(2 * part.strip + 1) * C + part.channel + v] = squares[v];
    }
}

// partial (strips, 2, C): mean, and sum of squares around it.
extern "C" __global__ void __launch_bounds__(THREADS) norm_statistics(const float *x, float *partial, int M, int C,
                                                                      int vector, int across, int pixels) {
    Part part(M, C, vector, across, pixels);
    vector == 4 ? statistics<4>(x, partial, C, part) : statistics<1>(x, partial, C, part);
}

__device__ __forceinline__ float factor_of(float gamma, float variance, float epsilon) {
    return gamma / sqrtf(variance + epsilon);
}

// Both passes find it to the same bits, so that ReLU is open in one where it is in the other.
__device__ __forceinline__ float normalized(float gap, float factor, float offset) { return fmaf(gap, factor, offset); }

constexpr int CHANNELS = 8, PARTS = THREADS / CHANNELS;  // of a block that joins strips: threads for parts of them

// The channel of such a thread, and its strips.
struct Column {
    int channel, part, first, end;

    __device__ __forceinline__ Column(int C, int strips) {
        channel = blockIdx.x * CHANNELS + threadIdx.x % CHANNELS, part = threadIdx.x / CHANNELS;
        int many = (strips + PARTS - 1) / PARTS;
        first = part * many, end = channel < C ? min(strips, first + many) : first;
    }
};

// Of all strips: mean, variance (biased) and factor = gamma / sqrt(variance + epsilon), each (C,); 0 of no pixels.
extern "C" __global__ void __launch_bounds__(THREADS) norm_combine(const float *partial, const float *gamma,
                                                                   float *mean, float *variance, float *factor, int M,
                                                                   int C, int strips, int pixels, float epsilon) {
    __shared__ double counts[THREADS], means[THREADS], all_squares[THREADS];
    Column column(C, strips);
    double count = 0, middle = 0, squares = 0;
    int c = column.channel;
    auto join = [&](double n, double other_mean, double others) {
        Joining<double>(count, n).join(middle, squares, other_mean, others);
        count += n;
    };
    auto show = [&] { counts[threadIdx.x] = count, means[threadIdx.x] = middle, all_squares[threadIdx.x] = squares; };
#pragma unroll 4
    for (int strip = column.first; strip < column.end; strip++)
        join(min(pixels, M - strip * pixels), partial[2 * strip * C + c], partial[(2 * strip + 1) * C + c]);
    show();
    fold(column.part, PARTS, CHANNELS, [&](int other) {
        join(counts[other], means[other], all_squares[other]);
        show();
    });
    if (column.part > 0 || c >= C) return;
    float found = M > 0 ? squares / M : 0;
    mean[c] = middle, variance[c] = found, factor[c] = factor_of(gamma[c], found, epsilon);
}

template <int VECTOR>
__device__ __forceinline__ void scaled(const float *x, const float *mean, const float *factor, const float *offset,
                                       float *y, int C, bool relu, const Part &part) {
    float middle[VECTOR], a[VECTOR], b[VECTOR];
    if (part.first >= part.end) return;
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        int c = part.channel + v;
        middle[v] = mean ? mean[c] : 0, a[v] = factor[c], b[v] = offset[c];
    }
    for (unsigned at = part.first; at < part.end; at += part.step()) {
        float numbers[AT_ONCE][VECTOR];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) part.load_pixel<VECTOR>(x, C, at, k, numbers[k]);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (!part.has(at, k)) break;
            for (int v = 0; v < VECTOR; v++) {
                float z = normalized(numbers[k][v] - middle[v], a[v], b[v]);
                numbers[k][v] = relu && z <= 0 ? 0 : z;  // what is not a number stays
            }
            put<VECTOR>(y + (at + k * part.rows) * C + part.channel, numbers[k]);
        }
    }
}

// y (M, C) = factor (x - mean) + offset and, if asked, ReLU.
extern "C" __global__ void __launch_bounds__(THREADS) norm_apply(const float *x, const float *mean,
                                                                 const float *factor, const float *offset, float *y,
                                                                 int relu, int M, int C, int vector, int across,
                                                                 int pixels) {
    Part part(M, C, vector, across, pixels);
    vector == 4 ? scaled<4>(x, mean, factor, offset, y, C, relu, part)
                : scaled<1>(x, mean, factor, offset, y, C, relu, part);
}

// y (M, C) = factor x + offset and, if asked, ReLU.
extern "C" __global__ void __launch_bounds__(THREADS) scale_channels(const float *x, const float *factor,
                                                                     const float *offset, float *y, int relu, int M,
                                                                     int C, int vector, int across, int pixels) {
    Part part(M, C, vector, across, pixels);
    vector == 4 ? scaled<4>(x, nullptr, factor, offset, y, C, relu, part)
                : scaled<1>(x, nullptr, factor, offset, y, C, relu, part);
}

// The gradient behind ReLU, which lets dy through where y is positive.
__device__ __forceinline__ float behind_relu(float dy, bool relu, float gap, float factor, float offset) {
    return !relu || normalized(gap, factor, offset) > 0 ? dy : 0;
}

template <int VECTOR>
__device__ __forceinline__ void gradient_sums(const float *x, const float *dy, const float *mean, const float *gamma,
                                              const float *variance, const float *beta, float *partial, int C,
                                              float epsilon, bool relu, const Part &part) {
    __shared__ float sums[2 * VECTOR][THREADS];
    float middle[VECTOR], factor[VECTOR], offset[VECTOR], mine[2 * VECTOR] = {};
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        int c = min(part.channel + v, C - 1);
        middle[v] = mean[c], factor[v] = factor_of(gamma[c], variance[c], epsilon), offset[v] = beta[c];
    }
    for (unsigned at = part.first; at < part.end; at += part.step()) {
        float numbers[AT_ONCE][VECTOR] = {}, g[AT_ONCE][VECTOR] = {};
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            part.load_pixel<VECTOR>(x, C, at, k, numbers[k]);
            part.load_pixel<VECTOR>(dy, C, at, k, g[k]);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            for (int v = 0; v < VECTOR; v++) {
                float gap = numbers[k][v] - middle[v], of = behind_relu(g[k][v], relu, gap, factor[v], offset[v]);
                mine[v] += of;
                mine[VECTOR + v] += of * gap;
            }
    }
    for (int i = 0; i < 2 * VECTOR; i++) sums[i][threadIdx.x] = mine[i];
    fold(part.row, part.rows, part.across, [&](int other) {
        for (int i = 0; i < 2 * VECTOR; i++) sums[i][threadIdx.x] += sums[i][other];
    });
    if (!part.is_first_row) return;
    for (int i = 0; i < 2 * VECTOR; i++)
        partial[(2 * part.strip + i / VECTOR) * C + part.channel + i % VECTOR] = sums[i][threadIdx.x];
}

// partial (strips, 2, C): sums of g, the gradient behind ReLU, and of g (x - mean).
extern "C" __global__ void __launch_bounds__(THREADS) norm_gradient_sums(
    const float *x, const float *dy, const float *mean, const float *gamma, const float *variance, const float *beta,
    float *partial, float epsilon, int relu, int M, int C, int vector, int across, int pixels) {
    Part part(M, C, vector, across, pixels);
    vector == 4 ? gradient_sums<4>(x, dy, mean, gamma, variance, beta, partial, C, epsilon, relu, part)
                : gradient_sums<1>(x, dy, mean, gamma, variance, beta, partial, C, epsilon, relu, part);
}

// Of all strips: add to dgamma and dbeta (C,); coefficients (3, C) with which dx = first g + second (x - mean) + third.
extern "C" __global__ void __launch_bounds__(THREADS) norm_gradient_combine(const float *partial, const float *gamma,
                                                                            const float *variance, float *coefficients,
                                                                            float *dgamma, float *dbeta, int M, int C,
                                                                            int strips, float epsilon) {
    __shared__ double sums[THREADS], products[THREADS];
    Column column(C, strips);
    double sum = 0, product = 0;
    int c = column.channel;
#pragma unroll 4
    for (int strip = column.first; strip < column.end; strip++) {
        sum += partial[2 * strip * C + c];
        product += partial[(2 * strip + 1) * C + c];
    }
    sums[threadIdx.x] = sum, products[threadIdx.x] = product;
    fold(column.part, PARTS, CHANNELS, [&](int other) {
        sums[threadIdx.x] += sums[other], products[threadIdx.x] += products[other];
    });
    if (column.part > 0 || c >= C) return;
    float inverse = factor_of(1, variance[c], epsilon), factor = factor_of(gamma[c], variance[c], epsilon);
    float many = max(M, 1);
    float of_g = sums[threadIdx.x], of_s = products[threadIdx.x] * inverse;
    dgamma[c] += of_s;
    dbeta[c] += of_g;
    coefficients[c] = factor;
    coefficients[C + c] = -factor * inverse * of_s / many;
    coefficients[2 * C + c] = -factor * of_g / many;
}

template <int VECTOR>
__device__ __forceinline__ void gradient(const float *x, const float *dy, const float *mean, const float *beta,
                                         const float *coefficients, float *dx, int C, bool relu, const Part &part) {
    float middle[VECTOR], offset[VECTOR], first[VECTOR], second[VECTOR], third[VECTOR];
    if (part.first >= part.end) return;
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        int c = part.channel + v;
        middle[v] = mean[c], offset[v] = beta[c];
        first[v] = coefficients[c], second[v] = coefficients[C + c], third[v] = coefficients[2 * C + c];
    }
    for (unsigned at = part.first; at < part.end; at += part.step()) {
        float numbers[AT_ONCE][VECTOR], g[AT_ONCE][VECTOR];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            part.load_pixel<VECTOR>(x, C, at, k, numbers[k]);
            part.load_pixel<VECTOR>(dy, C, at, k, g[k]);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (!part.has(at, k)) break;
            for (int v = 0; v < VECTOR; v++) {
                float gap = numbers[k][v] - middle[v], of = behind_relu(g[k][v], relu, gap, first[v], offset[v]);
                numbers[k][v] = first[v] * of + (second[v] * gap + third[v]);
            }
            put<VECTOR>(dx + (at + k * part.rows) * C + part.channel, numbers[k]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) norm_gradient(const float *x, const float *dy, const float *mean,
                                                                    const float *beta, const float *coefficients,
                                                                    float *dx, int relu, int M, int C, int vector,
                                                                    int across, int pixels) {
    Part part(M, C, vector, across, pixels);
    vector == 4 ? gradient<4>(x, dy, mean, beta, coefficients, dx, C, relu, part)
                : gradient<1>(x, dy, mean, beta, coefficients, dx, C, relu, part);
}

// To the gradients of running statistics (C,), what brings these a share of the way to those of a batch.
extern "C" __global__ void norm_follow(float *dmean, float *dvariance, const float *running_mean,
                                       const float *running_variance, const float *mean, const float *variance,
                                       float share, float unbiased, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    dmean[c] += share * (mean[c] - running_mean[c]);
    dvariance[c] += share * (unbiased * variance[c] - running_variance[c]);
}

// factor and offset (C,) with gamma (x - mean) / sqrt(variance + epsilon) + beta = factor x + offset.
extern "C" __global__ void norm_factors(const float *gamma, const float *beta, const float *mean,
                                        const float *variance, float *factor, float *offset, float epsilon, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float found = factor_of(gamma[c], variance[c], epsilon);
    factor[c] = found, offset[c] = beta[c] - mean[c] * found;
}
