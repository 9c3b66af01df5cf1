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
// A block of threads computes BM x BN numbers of the product, 16 a thread, from tiles of BK steps of the depth in
// shared memory; the next tiles are on their way while these are multiplied. A long depth is cut into slices, one for
// each blockIdx.z, whose sums `finish` adds up in order: the same bits in every run.

enum { FORWARD, INPUT, FILTERS, FLOAT32, TF32, FLOAT16, BFLOAT16 };

constexpr int BK = 16, GAP = 8;  // rows of a tile begin 8 banks apart, so that no two lanes of a warp meet in one
constexpr int THREADS = BM * BN / 16;
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
        for (int i = 0; i < STEP; i++) to[i] = from.won[place + i] == at.h % 2 * 2 + at.w % 2 ? to[i] : 0;
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

// A tile of BK x WIDTH numbers on its way: read into registers, then written to shared memory.
template <int WIDTH, int STEP, bool ALONG_DEPTH>
struct Tile {
    static constexpr int LOADS = (BK * WIDTH / STEP + THREADS - 1) / THREADS;
    static constexpr bool EVEN = BK * WIDTH / STEP % THREADS == 0;
    float numbers[LOADS][STEP];

    static __device__ __forceinline__ int number(int i) { return threadIdx.x + i * THREADS; }
    static __device__ __forceinline__ bool mine(int i) { return EVEN || number(i) < BK * WIDTH / STEP; }
    static __device__ __forceinline__ int k(int i) {
        return ALONG_DEPTH ? number(i) / WIDTH * STEP : number(i) / (WIDTH / STEP);
    }
    static __device__ __forceinline__ int j(int i) {
        return ALONG_DEPTH ? number(i) % WIDTH : number(i) % (WIDTH / STEP) * STEP;
    }

    template <typename Load>
    __device__ __forceinline__ void fetch(Load load_at) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            for (int s = 0; s < STEP; s++) numbers[i][s] = 0;
            if (mine(i)) load_at(k(i), j(i), numbers[i]);
        }
    }

    __device__ __forceinline__ void store(float (*shared)[WIDTH + GAP]) const {
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            for (int s = 0; s < STEP; s++)
                if (mine(i)) shared[k(i) + (ALONG_DEPTH ? s : 0)][j(i) + (ALONG_DEPTH ? 0 : s)] = numbers[i][s];
    }
};

// Which of the block's numbers a thread adds up, and how: 4 x 4 of them one product at a time, or, in a warp on tensor
// cores, 32 x 16 of them as 2 x 2 tiles of 16 x 8.
struct Sums {
    float total[16] = {};

    __device__ __forceinline__ static void place(int i, int &row, int &column) {
        if (PRECISION == FLOAT32) {
            row = threadIdx.x / (BN / 4) * 4 + i / 4, column = threadIdx.x % (BN / 4) * 4 + i % 4;
        } else {
            int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
            row = warp / (BN / 16) * 32 + i / 8 * 16 + i / 2 % 2 * 8 + lane / 4;
            column = warp % (BN / 16) * 16 + i / 4 % 2 * 8 + lane % 4 * 2 + i % 2;
        }
    }

    __device__ __forceinline__ void add(const float (*left)[BM + GAP], const float (*right)[BN + GAP]) {
        int row, column;
        if constexpr (PRECISION == FLOAT32) {
            place(0, row, column);
#pragma unroll
            for (int k = 0; k < BK; k++) {
                float a[4], b[4];
                load<4>(&left[k][row], a);
                load<4>(&right[k][column], b);
#pragma unroll
                for (int i = 0; i < 16; i++) total[i] = fmaf(a[i / 4], b[i % 4], total[i]);
            }
        } else {
            int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
            row = warp / (BN / 16) * 32 + g, column = warp % (BN / 16) * 16 + g;
#pragma unroll
            for (int k = 0; k < BK; k += 8) {
                float a[2][4], b[2][2];
#pragma unroll
                for (int tile = 0; tile < 2; tile++) {
                    for (int i = 0; i < 4; i++) {
                        int step = PRECISION == TF32 ? t + i / 2 * 4 : 2 * t + i % 2;
                        a[tile][i] = left[k + step][row + 16 * tile + 8 * (PRECISION == TF32 ? i % 2 : i / 2)];
                    }
                    for (int i = 0; i < 2; i++)
                        b[tile][i] = right[k + (PRECISION == TF32 ? t + 4 * i : 2 * t + i)][column + 8 * tile];
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if constexpr (PRECISION == TF32) multiply_tile_tf32(total + 4 * i, a[i / 2], b[i % 2]);
                    if constexpr (PRECISION == FLOAT16) multiply_tile_float16(total + 4 * i, a[i / 2], b[i % 2]);
                    if constexpr (PRECISION == BFLOAT16) multiply_tile_bfloat16(total + 4 * i, a[i / 2], b[i % 2]);
                }
            }
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
        to.db[column] = sum(row, column);
    } else {
        to.out[row * COLUMNS + column] = sum(row, column);
    }
}

// Grid: rows / BM, columns / BN, slices, all rounded up. With one slice it writes the result; with more, partial sums
// (slices, rows, COLUMNS). `slice` is the depth of one, a multiple of BK.
extern "C" __global__ void __launch_bounds__(BM * BN / 16) product(
    const float *x, const float *w, const float *dy, const float *y, const unsigned char *won, const float *bias,
    float *out, float *db, unsigned char *winner, float *partial, int rows, int depth, int slice) {
    alignas(16) __shared__ float left[BK][BM + GAP], right[BK][BN + GAP], sums[BM][BN + 1];
    Factors from{x, w, dy, y, won, rows, min(depth, (int)(blockIdx.z + 1) * slice)};
    int first_row = blockIdx.x * BM, first_column = blockIdx.y * BN;
    Tile<BM, LEFT_STEP, LEFT_ALONG_DEPTH> next_left;
    Tile<BN, RIGHT_STEP, RIGHT_ALONG_DEPTH> next_right;
    auto fetch = [&](int start) {
        next_left.fetch([&](int k, int j, float *to) { load_left(from, first_row + j, start + k, to); });
        next_right.fetch([&](int k, int j, float *to) { load_right(from, start + k, first_column + j, to); });
    };

    Sums mine;
    int start = blockIdx.z * slice;
    fetch(start);
    for (; start < from.depth; start += BK) {
        next_left.store(left);
        next_right.store(right);
        __syncthreads();
        if (start + BK < from.depth) fetch(start + BK);
        mine.add(left, right);
        __syncthreads();
    }

    for (int i = 0; i < 16; i++) {
        int row, column;
        Sums::place(i, row, column);
        sums[row][column] = mine.total[i];
    }
    __syncthreads();
    int step = gridDim.z > 1 ? 1 : ROWS_AT_ONCE;
    for (int i = threadIdx.x; i < BM / step * BN; i += THREADS) {
        int row = first_row + i / BN * step, column = first_column + i % BN;
        if (row >= rows || column >= COLUMNS) continue;
        if (gridDim.z > 1)
            partial[(blockIdx.z * rows + row) * COLUMNS + column] = sums[row - first_row][column - first_column];
        else
            write(Results{bias, out, db, winner}, row, column,
                  [&](int r, int c) { return sums[r - first_row][c - first_column]; });
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
