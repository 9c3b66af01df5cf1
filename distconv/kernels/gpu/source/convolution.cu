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

enum { FORWARD, INPUT, FILTERS, FLOAT32, TF32, FLOAT16, BFLOAT16 };

constexpr int BK = 16, WARPS = BM / 32 * (BN / 16);  // of a group
constexpr int THREADS = 32 * WARPS * GROUPS, DEPTH = BK * GROUPS;
// Blocks that a multiprocessor must have room for, as to 640 threads; with single loads a thread needs more registers.
constexpr int MIN_BLOCKS = VX == 4 && THREADS < 640 ? 640 / THREADS : 1;
constexpr int GAP = 2;  // with it, no two lanes of a warp that read a tile of rows by the depth meet in one bank
constexpr int TAPS = K * K * C, COLUMNS = PASS == INPUT ? C : F;
constexpr unsigned char NOBODY = 4;
constexpr int LEFT_STEP = PASS == INPUT ? VY : VX;                      // numbers that one load brings
constexpr int RIGHT_STEP = PASS == FILTERS ? VY : VW;
constexpr bool LEFT_ALONG_DEPTH = PASS != FILTERS, RIGHT_ALONG_DEPTH = PASS == INPUT;  // they follow each other there

struct Pixel {
    int n, h, w;
};

__device__ __forceinline__ Pixel pixel(int index, int height, int width) {
    int row = index / width;
    return {row / height, row % height, index % width};
}

// Where row `index` of y is computed: four in a row make a window where these are pooled.
__device__ __forceinline__ Pixel output_pixel(int index) {
    if (!POOL) return pixel(index, OH, OW);
    Pixel window = pixel(index / 4, OH / 2, OW / 2);
    return {window.n, 2 * window.h + index / 2 % 2, 2 * window.w + index % 2};
}

template <int STEP>
__device__ __forceinline__ void load(const float *from, float *to) {
    if constexpr (STEP == 4) {
        float4 four = *reinterpret_cast<const float4 *>(from);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
        to[0] = from[0];
    }
}

template <int STEP>
__device__ __forceinline__ void load_bytes(const unsigned char *from, unsigned char *to) {
    if constexpr (STEP == 4) {
        uchar4 four = *reinterpret_cast<const uchar4 *>(from);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
        to[0] = from[0];
    }
}

// STEP numbers of the patch of x that belongs to a pixel of y, from tap (kh, kw, c) on; zero outside the image.
template <int STEP>
__device__ __forceinline__ void load_patch(const float *x, Pixel at, int tap, float *to) {
    int c = tap % C, h = at.h * STRIDE - PAD + tap / C / K, w = at.w * STRIDE - PAD + tap / C % K;
    if (h >= 0 && h < H && w >= 0 && w < W) load<STEP>(x + ((at.n * H + h) * W + w) * C + c, to);
}

struct Factors {
    const float *x, *w, *dy, *y;
    const unsigned char *won;
    int rows, depth;  // of the whole product
};

// STEP numbers of dy, from filter f on, as they were before pooling and ReLU. `to` holds zeros.
template <int STEP>
__device__ __forceinline__ void load_gradient(const Factors &from, Pixel at, int f, float *to) {
    if (POOL) {
        if (at.h / 2 >= OH / 2 || at.w / 2 >= OW / 2) return;  // a last odd row or column fills no window
        int place = ((at.n * (OH / 2) + at.h / 2) * (OW / 2) + at.w / 2) * F + f;
        load<STEP>(from.dy + place, to);
        unsigned char won[STEP];
        load_bytes<STEP>(from.won + place, won);
        for (int i = 0; i < STEP; i++) to[i] = won[i] == at.h % 2 * 2 + at.w % 2 ? to[i] : 0;
        return;
    }
    int place = ((at.n * OH + at.h) * OW + at.w) * F + f;
    load<STEP>(from.dy + place, to);
    if (RELU) {
        float y[STEP];
        load<STEP>(from.y + place, y);
        for (int i = 0; i < STEP; i++) to[i] = y[i] <= 0 ? 0 : to[i];
    }
}

// STEP numbers of the left factor at (row, k): along the depth, or for FILTERS along the rows. `to` holds zeros.
__device__ __forceinline__ void load_left(const Factors &from, int row, int k, float *to) {
    if (row >= from.rows || k >= from.depth) return;
    if (PASS == FORWARD) {
        load_patch<LEFT_STEP>(from.x, output_pixel(row), k, to);
    } else if (PASS == INPUT) {
        Pixel at = pixel(row, H, W);
        int f = k % F, h = at.h + PAD - k / F / K, w = at.w + PAD - k / F % K;
        if (h >= 0 && h % STRIDE == 0 && h / STRIDE < OH && w >= 0 && w % STRIDE == 0 && w / STRIDE < OW)
            load_gradient<LEFT_STEP>(from, {at.n, h / STRIDE, w / STRIDE}, f, to);
    } else if (row < TAPS) {
        load_patch<LEFT_STEP>(from.x, pixel(k, OH, OW), row, to);
    } else {
        to[0] = 1;  // the last row adds up dy itself: db
    }
}

// STEP numbers of the right factor at (k, column): along the columns, or for INPUT along the depth.
__device__ __forceinline__ void load_right(const Factors &from, int k, int column, float *to) {
    if (k >= from.depth || column >= COLUMNS) return;
    if (PASS == FORWARD) {
        load<RIGHT_STEP>(from.w + k * F + column, to);
    } else if (PASS == INPUT) {
        load<RIGHT_STEP>(from.w + (k / F * C + column) * F + k % F, to);
    } else {
        load_gradient<RIGHT_STEP>(from, pixel(k, OH, OW), column, to);
    }
}

// A tile of DEPTH x WIDTH numbers on its way: read into registers, then written to shared memory. There it lies as it
// was read, by the depth, BK numbers of each row one behind the other, or by the rows.
template <int WIDTH, int STEP, bool ALONG_DEPTH>
struct Tile {
    static constexpr int ROW = WIDTH + GAP, SIZE = ALONG_DEPTH ? DEPTH * WIDTH : DEPTH * ROW;
    static constexpr int SIDE = (ALONG_DEPTH ? DEPTH : WIDTH) / STEP;  // loads that follow each other in memory
    static constexpr int LINES = ALONG_DEPTH ? WIDTH : DEPTH, AT_ONCE = THREADS / SIDE;
    static constexpr int LOADS = (LINES + AT_ONCE - 1) / AT_ONCE;
    static_assert(THREADS % SIDE == 0, "each thread has one place along a line");
    float numbers[LOADS][STEP];

    static __device__ __forceinline__ int place() { return threadIdx.x % SIDE * STEP; }
    static __device__ __forceinline__ int line(int i) { return threadIdx.x / SIDE + i * AT_ONCE; }
    static __device__ __forceinline__ bool mine(int i) { return LINES % AT_ONCE == 0 || line(i) < LINES; }

    // load_at(k, j, to)
    template <typename Load>
    __device__ __forceinline__ void fetch(Load load_at) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            for (int s = 0; s < STEP; s++) numbers[i][s] = 0;
            if (mine(i)) ALONG_DEPTH ? load_at(place(), line(i), numbers[i]) : load_at(line(i), place(), numbers[i]);
        }
    }

    __device__ __forceinline__ void store(float *shared) const {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            if (!mine(i)) continue;
            float *to = ALONG_DEPTH ? shared + (place() / BK * WIDTH + line(i)) * BK + place() % BK
                                    : shared + line(i) * ROW + place();
#pragma unroll
            for (int s = 0; s < STEP; s++) to[s] = PRECISION == TF32 ? to_tf32(numbers[i][s]) : numbers[i][s];
        }
    }

    // Numbers 4 t to 4 t + 3 along a group's depth, of row j.
    static __device__ __forceinline__ void read(const float *shared, int group, int j, int t, float to[4]) {
        if constexpr (ALONG_DEPTH) {
            load<4>(shared + (group * WIDTH + j) * BK + 4 * t, to);
        } else {
#pragma unroll
            for (int s = 0; s < 4; s++) to[s] = shared[(group * BK + 4 * t + s) * ROW + j];
        }
    }
};

typedef Tile<BM, LEFT_STEP, LEFT_ALONG_DEPTH> Left;
typedef Tile<BN, RIGHT_STEP, RIGHT_ALONG_DEPTH> Right;

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
