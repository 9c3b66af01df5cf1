// Convolution as a matrix product whose left factor, the patches of the images, is read from the images as it is needed
// (implicit GEMM). One kernel serves three passes; which, and all sizes but the number of images, are fixed when it is
// compiled:
//
//   PASS      out = left . right                        rows            columns   depth
//   FORWARD   y  = patches of x . w                     pixels of y     F         (kh, kw, c)
//   INPUT     dx = patches of dy . w                    pixels of x     C         (kh, kw, f)
//   FILTERS   dw, db = patches of x, transposed . dy    (kh, kw, c), 1  F         pixels of y
//
// An affine layer is the convolution of images of one pixel. x is (N, H, W, C), w (K, K, C, F), y (N, OH, OW, F).
// RELU: y is max(y, 0). POOL: y is then pooled, the largest of each window of 2 x 2 pixels: y and dy are
// (N, OH/2, OW/2, F), and `won` (bytes) says which of the four it was, or NOBODY where ReLU lets none through.
//
// A block of threads computes BM x BN numbers of the product, 32 x 16 a warp, on tensor cores, from tiles in shared
// memory; the next tiles are on their way while these are multiplied. A tile is BK steps deep for each of the GROUPS of
// warps, which share the depth and whose sums are added up at the end. A long depth is cut into slices too, one for each
// blockIdx.z, whose sums `finish` adds up. All that in order: the same bits in every run.
//
// FLOAT32: each factor is the sum of two numbers that tensor cores take, a large and a small one, and the product that
// of three: large large + large small + small large. What is left out is some 2^-22 of it. An infinite factor gives NaN.

// C (16 x 8) += A (16 x BK) B (BK x 8) by a warp. Lane 4 g + t holds numbers 4 t to 4 t + 3 along the depth of rows g and
// g + 8 of A, and of column g of B. In which order the depth is added up is free, if it is the same for A and B.
__device__ __forceinline__ void multiply(float c[4], const float upper[4], const float lower[4], const float b[4]) {
    if constexpr (PRECISION == FLOAT16) return multiply_tile_float16(c, upper, lower, b);
    if constexpr (PRECISION == BFLOAT16) return multiply_tile_bfloat16(c, upper, lower, b);
    if constexpr (PRECISION == TF32 || PRECISION == FLOAT32) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            float a[4] = {upper[i], lower[i], upper[i + 1], lower[i + 1]};
            multiply_tile_tf32(c, a, b + i);
        }
    }
}

// The sums of a thread: those of a warp are 32 x 16 numbers of the block, as 2 x 2 tiles of 16 x 8.
struct Sums {
    float total[4][4] = {};

    __device__ __forceinline__ static int warp() { return threadIdx.x / 32 % WARPS; }
    __device__ __forceinline__ static int group() { return threadIdx.x / 32 / WARPS; }
    __device__ __forceinline__ static int first_row() { return warp() / (BN / 16) * 32 + threadIdx.x % 32 / 4; }
    __device__ __forceinline__ static int first_column() { return warp() % (BN / 16) * 16; }

    __device__ __forceinline__ void add(const float *left, const float *right) {
        int t = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
        float b[2][4], small_b[2][4];  // columns g and g + 8
#pragma unroll
        for (int i = 0; i < 2; i++) {
            Right::read(right, group(), first_column() + 8 * i + g, t, b[i]);
            if (PRECISION == FLOAT32) split(b[i], small_b[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            float upper[4], lower[4], small_upper[4], small_lower[4];  // rows g and g + 8, then g + 16 and g + 24
            Left::read(left, group(), first_row() + 8 * i, t, upper);
            Left::read(left, group(), first_row() + 8 * i + 8, t, lower);
            if (PRECISION == FLOAT32) split(upper, small_upper), split(lower, small_lower);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if constexpr (PRECISION == FLOAT32) {
                    float sum[4] = {};  // tensor cores cut off what they add; over BK steps that does not matter
                    multiply(sum, small_upper, small_lower, b[j]);
                    multiply(sum, upper, lower, small_b[j]);
                    multiply(sum, upper, lower, b[j]);
#pragma unroll
                    for (int s = 0; s < 4; s++) total[i + j][s] += sum[s];
                } else {
                    multiply(total[i + j], upper, lower, b[j]);
                }
            }
        }
    }

    // large becomes what a tensor core takes of it, small the rest.
    __device__ __forceinline__ static void split(float large[4], float small[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float rest = __uint_as_float(__float_as_uint(large[i]) & 0xFFFFE000);
            small[i] = large[i] - rest;
            large[i] = rest;
        }
    }

    // sums: BM x (BN + 1) numbers of each group.
    __device__ __forceinline__ void write(float *sums) const {
        int t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; i++)
            for (int s = 0; s < 4; s++) {
                int row = first_row() + i / 2 * 16 + s / 2 * 8, column = first_column() + i % 2 * 8 + 2 * t + s % 2;
                sums[(group() * BM + row) * (BN + 1) + column] = total[i][s];
            }
    }
};

struct Results {
    const float *bias;      // FORWARD
    float *out, *db;        // db: FILTERS
    unsigned char *winner;  // POOL: what the other passes know as `won`
};

__device__ __forceinline__ float with_bias_and_relu(float sum, float bias) {
    float y = sum + bias;
    return RELU && y <= 0 ? 0 : y;  // what is not a number stays
}

constexpr int ROWS_AT_ONCE = PASS == FORWARD && POOL ? 4 : 1;

// Write the result of a row and column of the product, or of the four rows from `row` on that are pooled.
template <typename Sum>
__device__ __forceinline__ void write(const Results &to, int row, int column, Sum sum) {
    if (PASS == FORWARD) {
        float y = with_bias_and_relu(sum(row, column), to.bias[column]);
        if (POOL) {
            int best = 0;
            for (int i = 1; i < 4; i++) {
                float other = with_bias_and_relu(sum(row + i, column), to.bias[column]);
                if (other > y) y = other, best = i;
            }
            to.winner[row / 4 * F + column] = RELU && y <= 0 ? NOBODY : best;
        }
        to.out[row / ROWS_AT_ONCE * F + column] = y;
    } else if (PASS == FILTERS && row == TAPS) {
        to.db[column] += sum(row, column);
    } else if (PASS == FILTERS) {
        to.out[row * COLUMNS + column] += sum(row, column);
    } else {
        to.out[row * COLUMNS + column] = sum(row, column);
    }
}

constexpr int TILES = Left::SIZE + Right::SIZE, SUMS = GROUPS * BM * (BN + 1);

// Grid: rows / BM, columns / BN, slices, all rounded up. With one slice it writes the result; with more, partial sums
// (slices, rows, COLUMNS). `slice` is the depth of one, a multiple of DEPTH.
extern "C" __global__ void __launch_bounds__(BM * BN / 16 * GROUPS, MIN_BLOCKS) product(
    const float *x, const float *w, const float *dy, const float *y, const unsigned char *won, const float *bias,
    float *out, float *db, unsigned char *winner, float *partial, int rows, int depth, int slice) {
    alignas(16) __shared__ float shared[2 * TILES > SUMS ? 2 * TILES : SUMS];  // tiles, the next ones; then the sums
    Factors from{x, w, dy, y, won, rows, min(depth, (int)(blockIdx.z + 1) * slice)};
    int first_row = blockIdx.x * BM, first_column = blockIdx.y * BN;
    Left next_left;
    Right next_right;
    auto fetch = [&](int start) {
        next_left.fetch([&](int k, int j, float *to) { load_left(from, first_row + j, start + k, to); });
        next_right.fetch([&](int k, int j, float *to) { load_right(from, start + k, first_column + j, to); });
    };

    Sums mine;
    int start = blockIdx.z * slice;
    float *now = shared, *then = shared + TILES;
    fetch(start);
    for (; start < from.depth; start += DEPTH) {
        next_left.store(now);
        next_right.store(now + Left::SIZE);
        __syncthreads();  // and nobody reads any more what is written next, as all have passed the last one
        if (start + DEPTH < from.depth) fetch(start + DEPTH);
        mine.add(now, now + Left::SIZE);
        float *other = now;
        now = then, then = other;
    }
    __syncthreads();
    mine.write(shared);
    __syncthreads();

    auto sum = [&](int row, int column) {
        float total = 0;
        for (int group = 0; group < GROUPS; group++)
            total += shared[(group * BM + row - first_row) * (BN + 1) + column - first_column];
        return total;
    };
    int step = gridDim.z > 1 ? 1 : ROWS_AT_ONCE;
    for (int i = threadIdx.x; i < BM / step * BN; i += THREADS) {
        int row = first_row + i / BN * step, column = first_column + i % BN;
        if (row >= rows || column >= COLUMNS) continue;
        if (gridDim.z > 1)
            partial[(blockIdx.z * rows + row) * COLUMNS + column] = sum(row, column);
        else
            write(Results{bias, out, db, winner}, row, column, sum);
    }
}

constexpr int OUTPUTS = 32, PARTS = 8;  // of a block of `finish`: the threads of a warp have an output each

// Add up the slices and write the result: a warp its part of the slices, in order, then the first warp the parts. A
// block for every OUTPUTS columns of the rows, or windows, of the product.
extern "C" __global__ void __launch_bounds__(OUTPUTS *PARTS) finish(const float *partial, const float *bias, float *out,
                                                                    float *db, unsigned char *winner, int rows,
                                                                    int slices) {
    __shared__ float sums[ROWS_AT_ONCE][PARTS][OUTPUTS];
    int lane = threadIdx.x % OUTPUTS, part = threadIdx.x / OUTPUTS, i = blockIdx.x * OUTPUTS + lane;
    int row = i / COLUMNS * ROWS_AT_ONCE, column = i % COLUMNS, many = (slices + PARTS - 1) / PARTS;
    for (int r = 0; r < ROWS_AT_ONCE; r++) {
        float sum = 0;
        if (row < rows)
            for (int s = part * many; s < min(slices, (part + 1) * many); s++)
                sum += partial[(s * rows + row + r) * COLUMNS + column];
        sums[r][part][lane] = sum;
    }
    __syncthreads();
    if (part > 0 || row >= rows) return;
    write(Results{bias, out, db, winner}, row, column, [&](int r, int c) {
        float sum = 0;
        for (int p = 0; p < PARTS; p++) sum += sums[r - row][p][lane];
        return sum;
    });
}
