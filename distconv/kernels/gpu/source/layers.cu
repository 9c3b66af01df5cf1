// The layers without filters, the loss, and what a step begins and ends with. One thread for each number unless said.

__device__ __forceinline__ int thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

constexpr int AT_ONCE = 16;  // words that a thread asks the host's memory for before it waits

// What a step begins with: a gradient (n,) of zeros, as layers add to it, and no number known that is not finite. The
// first block brings the message, there (words,), which lies in the host's memory in the slot `turn` of sent (slots,
// words). The next message will lie in the next slot.
extern "C" __global__ void begin_step(float *gradient, int *bad, int n, const unsigned *sent, unsigned *there,
                                      int words, int *turn, int slots) {
    int i = thread();
    if (i < 2) bad[i] = FINITE;
    if (i < n) gradient[i] = 0;
    if (blockIdx.x > 0) return;
    const volatile unsigned *message = sent + *turn * words;  // volatile: no cache may answer with an older message
    for (int first = threadIdx.x; first < words; first += AT_ONCE * blockDim.x) {
        unsigned some[AT_ONCE];
        for (int k = 0; k < AT_ONCE; k++)
            if (first + k * blockDim.x < words) some[k] = message[first + k * blockDim.x];
        for (int k = 0; k < AT_ONCE; k++)
            if (first + k * blockDim.x < words) there[first + k * blockDim.x] = some[k];
    }
    __syncthreads();
    if (threadIdx.x == 0) *turn = (*turn + 1) % slots;
}

// Tell the host, in the slot of the step's number of told (slots, 3): bad (2,) and the lower word of the step; in that
// of sums (slots, most), at `place`, a sum, unless the place is negative.
extern "C" __global__ void report(const int *bad, const unsigned *step, const double *sum, int *told, double *sums,
                                  int place, int most, int slots) {
    int i = thread(), slot = step[0] % slots;
    if (i < 3) told[slot * 3 + i] = i < 2 ? bad[i] : (int)step[0];
    if (i == 3 && place >= 0) sums[slot * most + place] = *sum;
}

__device__ __forceinline__ float number(unsigned char byte) { return byte / 255.0f; }
__device__ __forceinline__ float number(float pixel) { return pixel; }

// x (n, size) = the images of the samples (n,), bytes as numbers from 0 to 1; chosen (n, label_size) = their labels.
template <typename Pixel>
__device__ __forceinline__ void gather(const Pixel *images, const int *labels, const int *samples, float *x,
                                       int *chosen, int n, int size, int label_size) {
    int i = thread();
    if (i < n * size) x[i] = number(images[(long long)samples[i / size] * size + i % size]);
    if (i < n * label_size) chosen[i] = labels[(long long)samples[i / label_size] * label_size + i % label_size];
}

extern "C" __global__ void gather_bytes(const unsigned char *images, const int *labels, const int *samples, float *x,
                                        int *chosen, int n, int size, int label_size) {
    gather(images, labels, samples, x, chosen, n, size, label_size);
}

extern "C" __global__ void gather_floats(const float *images, const int *labels, const int *samples, float *x,
                                         int *chosen, int n, int size, int label_size) {
    gather(images, labels, samples, x, chosen, n, size, label_size);
}

extern "C" __global__ void scale(const float *x, float factor, float *y, int n) {
    int i = thread();
    if (i < n) y[i] = x[i] * factor;
}

extern "C" __global__ void relu(const float *x, float *y, int n) {
    int i = thread();
    if (i < n) y[i] = x[i] <= 0 ? 0 : x[i];
}

extern "C" __global__ void relu_backward(const float *dy, const float *y, float *dx, int n) {
    int i = thread();
    if (i < n) dx[i] = y[i] <= 0 ? 0 : dy[i];
}

struct Words {
    unsigned word[4];
};

// Philox4x32-10 (Salmon et al., SC11).
__device__ __forceinline__ Words philox(Words c, unsigned k0, unsigned k1) {
    for (int round = 0; round < 10; round++) {
        unsigned long long p0 = 0xD2511F53ull * c.word[0], p1 = 0xCD9E8D57ull * c.word[2];
        unsigned high0 = p0 >> 32, high1 = p1 >> 32;
        c = {{high1 ^ c.word[1] ^ k0, (unsigned)p1, high0 ^ c.word[3] ^ k1, (unsigned)p0}};
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c;
}

// y (n, size) = x where the random word of the number is at least `threshold`, else x 0. Words belong to key, step (two
// words, the lower first), global sample and place in the sample, as in kernels/philox.py.
extern "C" __global__ void dropout(const float *x, float *y, unsigned long long threshold, unsigned k0, unsigned k1,
                                   const unsigned *step, const int *samples, int n, int size) {
    int i = thread();
    if (i >= n * size) return;
    unsigned place = i % size;
    Words words = philox({{place / 4, (unsigned)samples[i / size], step[0], step[1]}}, k0, k1);
    y[i] = x[i] * (words.word[place % 4] >= threshold ? 1.0f : 0.0f);
}

// y (n, size): numbers from 0 to 1 out of the words that `dropout` would use.
extern "C" __global__ void uniform(float *y, unsigned k0, unsigned k1, const unsigned *step, const int *samples, int n,
                                   int size) {
    int i = thread();
    if (i >= n * size) return;
    unsigned place = i % size;
    Words words = philox({{place / 4, (unsigned)samples[i / size], step[0], step[1]}}, k0, k1);
    y[i] = (words.word[place % 4] >> 8) * 0x1p-24f;
}

// y (n, OH, OW, C) = the largest of each K x K window of x (n, H, W, C); winner: which of the K K, the first of equals,
// and the last that is not a number, if any.
extern "C" __global__ void max_pool_forward(const float *x, float *y, int *winner, int count, int H, int W, int C,
                                            int OH, int OW, int K, int stride, int pad) {
    int i = thread();
    if (i >= count) return;
    int c = i % C, ow = i / C % OW, oh = i / C / OW % OH, n = i / C / OW / OH, best = -1;
    float largest = 0;
    for (int tap = 0; tap < K * K; tap++) {
        int h = oh * stride - pad + tap / K, w = ow * stride - pad + tap % K;
        if (h < 0 || h >= H || w < 0 || w >= W) continue;
        float value = x[((n * H + h) * W + w) * C + c];
        if (best < 0 || value > largest || value != value) largest = value, best = tap;
    }
    y[i] = largest;
    winner[i] = best;
}

// dx (n, H, W, C): each dy goes to the number that won its window; a thread for each number of dx.
extern "C" __global__ void max_pool_backward(const float *dy, const int *winner, float *dx, int count, int H, int W,
                                             int C, int OH, int OW, int K, int stride, int pad) {
    int i = thread();
    if (i >= count) return;
    int c = i % C, w = i / C % W, h = i / C / W % H, n = i / C / W / H;
    float sum = 0;
    for (int tap = 0; tap < K * K; tap++) {
        int oh = h + pad - tap / K, ow = w + pad - tap % K;
        if (oh < 0 || oh % stride || oh / stride >= OH || ow < 0 || ow % stride || ow / stride >= OW) continue;
        int place = ((n * OH + oh / stride) * OW + ow / stride) * C + c;
        if (winner[place] == tap) sum += dy[place];
    }
    dx[i] = sum;
}

// y (n, OH, OW, C) = the mean of each K x K window of x (n, H, W, C), zeros of the padding counted.
extern "C" __global__ void average_pool_forward(const float *x, float *y, int count, int H, int W, int C, int OH,
                                                int OW, int K, int stride, int pad) {
    int i = thread();
    if (i >= count) return;
    int c = i % C, ow = i / C % OW, oh = i / C / OW % OH, n = i / C / OW / OH;
    float sum = 0;
    for (int tap = 0; tap < K * K; tap++) {
        int h = oh * stride - pad + tap / K, w = ow * stride - pad + tap % K;
        if (h >= 0 && h < H && w >= 0 && w < W) sum += x[((n * H + h) * W + w) * C + c];
    }
    y[i] = sum / (K * K);
}

// dx (n, H, W, C): of each dy, its windows' numbers get equal shares; a thread for each number of dx.
extern "C" __global__ void average_pool_backward(const float *dy, float *dx, int count, int H, int W, int C, int OH,
                                                 int OW, int K, int stride, int pad) {
    int i = thread();
    if (i >= count) return;
    int c = i % C, w = i / C % W, h = i / C / W % H, n = i / C / W / H;
    float sum = 0;
    for (int tap = 0; tap < K * K; tap++) {
        int oh = h + pad - tap / K, ow = w + pad - tap % K;
        if (oh < 0 || oh % stride || oh / stride >= OH || ow < 0 || ow % stride || ow / stride >= OW) continue;
        sum += dy[((n * OH + oh / stride) * OW + ow / stride) * C + c];
    }
    dx[i] = sum / (K * K);
}

constexpr int MEANS = 32, PARTS_OF_PIXELS = 8;  // of a block: the threads of a warp have a mean each

// y (n, C) = the means over the pixels of x (n, pixels, C): a warp adds up a part, then the first one all parts.
extern "C" __global__ void __launch_bounds__(MEANS *PARTS_OF_PIXELS) pixel_mean(const float *x, float *y, int count,
                                                                                int pixels, int C) {
    __shared__ float sums[PARTS_OF_PIXELS][MEANS];
    int lane = threadIdx.x % MEANS, part = threadIdx.x / MEANS, i = blockIdx.x * MEANS + lane;
    int many = (pixels + PARTS_OF_PIXELS - 1) / PARTS_OF_PIXELS;
    float sum = 0;
    if (i < count)
        for (int p = part * many; p < min(pixels, (part + 1) * many); p++) sum += x[(i / C * pixels + p) * C + i % C];
    sums[part][lane] = sum;
    __syncthreads();
    if (part > 0 || i >= count) return;
    for (int p = 1; p < PARTS_OF_PIXELS; p++) sum += sums[p][lane];
    y[i] = sum / pixels;
}

extern "C" __global__ void pixel_mean_backward(const float *dy, float *dx, int count, int pixels, int C) {
    int i = thread();
    if (i < count) dx[i] = dy[i / C / pixels * C + i % C] / pixels;
}

// y (n,) = x + other and, if asked, ReLU.
extern "C" __global__ void sum_of_two(const float *x, const float *other, float *y, int relu, int n) {
    int i = thread();
    if (i >= n) return;
    float sum = x[i] + other[i];
    y[i] = relu && sum <= 0 ? 0 : sum;
}

// Where a number lies, `channel` of `pixel`, among up to four arrays whose channels lie side by side, to these ends.
template <typename Pointer>
__device__ __forceinline__ Pointer among(int pixel, int channel, Pointer a, Pointer b, Pointer c, Pointer d, int end_a,
                                         int end_b, int end_c, int end_d) {
    if (channel < end_a) return a + pixel * end_a + channel;
    if (channel < end_b) return b + pixel * (end_b - end_a) + channel - end_a;
    if (channel < end_c) return c + pixel * (end_c - end_b) + channel - end_b;
    return d + pixel * (end_d - end_c) + channel - end_c;
}

// y (pixels, C): from channel `first` on, up to four arrays side by side.
extern "C" __global__ void join_channels(float *y, int count, int C, int first, const float *a, const float *b,
                                         const float *c, const float *d, int end_a, int end_b, int end_c, int end_d) {
    int i = thread();
    if (i >= count) return;
    int pixel = i / end_d, channel = i % end_d;
    y[pixel * C + first + channel] = *among(pixel, channel, a, b, c, d, end_a, end_b, end_c, end_d);
}

// The other way.
extern "C" __global__ void split_channels(const float *x, int count, int C, int first, float *a, float *b, float *c,
                                          float *d, int end_a, int end_b, int end_c, int end_d) {
    int i = thread();
    if (i >= count) return;
    int pixel = i / end_d, channel = i % end_d;
    *among(pixel, channel, a, b, c, d, end_a, end_b, end_c, end_d) = x[pixel * C + first + channel];
}

constexpr int LOSS_THREADS = 256;

// loss = the sum over n rows of -log softmax(scores)[label]; dscores (n, classes) = its gradient / batch. One block.
// smoothing: so much of each label is spread over all classes.
extern "C" __global__ void __launch_bounds__(LOSS_THREADS) softmax_cross_entropy(
    const float *scores, const int *labels, float *dscores, double *loss, float batch, float smoothing, int n,
    int classes) {
    __shared__ double sums[LOSS_THREADS];
    double mine = 0;
    for (int row = threadIdx.x; row < n; row += LOSS_THREADS) {
        const float *score = scores + row * classes;
        float *gradient = dscores + row * classes, largest = score[0], total = 0;
        for (int f = 1; f < classes; f++) largest = score[f] <= largest ? largest : score[f];
        for (int f = 0; f < classes; f++) total += expf(score[f] - largest);  // and again below, to read nothing back
        for (int f = 0; f < classes; f++)
            gradient[f] = (expf(score[f] - largest) / total - (f == labels[row] ? 1 : 0)) / batch;
        mine += logf(total) - (score[labels[row]] - largest);
        if (smoothing > 0) {
            float share = smoothing / classes, rest = 0;
            for (int f = 0; f < classes; f++) {
                gradient[f] += ((f == labels[row] ? smoothing : 0) - share) / batch;
                rest += score[labels[row]] - score[f];
            }
            mine += share * rest;
        }
    }
    sums[threadIdx.x] = mine;
    for (int half = LOSS_THREADS / 2; half > 0; half /= 2) {  // the same order in every run
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *loss = sums[0];
}

// best (n,) = the class of the largest score of each row, the first of equals; what is not a number counts as largest.
extern "C" __global__ void argmax(const float *scores, int *best, int n, int classes) {
    int row = thread();
    if (row >= n) return;
    const float *score = scores + row * classes;
    int found = 0;
    for (int f = 1; f < classes; f++)
        if (score[found] == score[found] && !(score[f] <= score[found])) found = f;
    best[row] = found;
}
