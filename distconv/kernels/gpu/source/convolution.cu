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
// BIAS: b is added, and db wanted. RELU: y is max(y, 0). POOL: y is then pooled, the largest of each window of 2 x 2
// pixels: y and dy are (N, OH/2, OW/2, F), and `won` (bytes) says which of the four it was, or NOBODY where ReLU lets
// none through.
//
// A block of threads computes BM x BN numbers of the product, 32 x 16 a warp, on tensor cores, from tiles in shared
// memory; the next tiles are on their way while these are multiplied. A tile is BK steps deep for each of the GROUPS of
// warps, which share the depth and whose sums are added up at the end. A long depth is cut into slices too, one for each
// blockIdx.z, whose sums `finish` adds up. All that in order: the same bits in every run.
//
// FLOAT32: each factor is the sum of two numbers that tensor cores take, a large and a small one, and the product that
// of three: large large + large small + small large. What is left out is some 2^-22 of it. An infinite factor gives NaN.

constexpr int WARPS = BM / 32 * (BN / 16);  // of a group
constexpr int THREADS = 32 * WARPS * GROUPS, DEPTH = BK * GROUPS;
// Blocks that a multiprocessor must have room for, as to so many threads; with single loads these need more registers.
constexpr int RESIDENT = PRECISION == FLOAT32 ? 512 : 640;
constexpr int MIN_BLOCKS = VX == 4 && THREADS < RESIDENT ? RESIDENT / THREADS : 1;
constexpr int GAP = 2;  // with it, no two lanes of a warp that read a tile of rows by the depth meet in one bank
// Whether numbers that follow each other in memory do so along the depth.
constexpr bool LEFT_ALONG_DEPTH = PASS != FILTERS, RIGHT_ALONG_DEPTH = PASS == INPUT;

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
            for (int s = 0; s < STEP; s++) to[s] = stored(numbers[i][s]);
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

// 32 x 16 sums of a warp, as 2 x 2 tiles of 16 x 8.
struct Sums {
    float total[4][4] = {};

    // left(i, to) gives a lane's four numbers of row g + 8 i, right(j, to) those of column g + 8 j.
    template <typename Left, typename Right>
    __device__ __forceinline__ void add(Left left, Right right) {
        Parts<4> b[2] = {Parts<4>([&](float *to) { right(0, to); }), Parts<4>([&](float *to) { right(1, to); })};
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            Parts<8> a([&](float *to) {
                float upper[4], lower[4];
                left(i, upper), left(i + 1, lower);
                for (int s = 0; s < 4; s++) to[2 * s] = upper[s], to[2 * s + 1] = lower[s];
            });
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (PRECISION != FLOAT32) {
                    multiply(total[i + j], a, b[j]);
                } else {
                    float sum[4] = {};
                    multiply(sum, a, b[j]);
                    for (int s = 0; s < 4; s++) total[i + j][s] += sum[s];
                }
            }
        }
    }

    // sums: of the warp's first row and column, in a matrix of BN + 1 numbers a row.
    __device__ __forceinline__ void write(float *sums) const {
        int t = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 4; i++)
            for (int s = 0; s < 4; s++)
                sums[(i / 2 * 16 + s / 2 * 8 + g) * (BN + 1) + i % 2 * 8 + 2 * t + s % 2] = total[i][s];
    }
};

constexpr int TILES = Left::SIZE + Right::SIZE, SUMS = GROUPS * BM * (BN + 1);
constexpr int ACROSS = FLAT ? (COLUMNS + BN - 1) / BN : 1;  // blocks of columns that lie side by side in blockIdx.x

// Grid: rows / BM, columns / BN, slices, all rounded up; FLAT: rows times columns, 1, slices, as a grid is narrow in y.
// With one slice it writes the result; with more, partial sums (slices, rows, COLUMNS). `slice` is the depth of one, a
// multiple of DEPTH.
extern "C" __global__ void __launch_bounds__(BM * BN / 16 * GROUPS, MIN_BLOCKS) product(
    const float *x, const float *w, const float *dy, const float *y, const unsigned char *won, const float *bias,
    float *out, float *db, unsigned char *winner, float *partial, int rows, int depth, int slice) {
    alignas(16) __shared__ float shared[2 * TILES > SUMS ? 2 * TILES : SUMS];  // tiles, the next ones; then the sums
    Factors from{x, w, dy, y, won, rows, min(depth, (int)(blockIdx.z + 1) * slice)};
    int first_row = blockIdx.x / ACROSS * BM, first_column = (FLAT ? blockIdx.x % ACROSS : blockIdx.y) * BN;
    Left next_left;
    Right next_right;
    auto fetch = [&](int start) {
        next_left.fetch([&](int k, int j, float *to) { load_left(from, first_row + j, start + k, to); });
        next_right.fetch([&](int k, int j, float *to) { load_right(from, start + k, first_column + j, to); });
    };

    int warp = threadIdx.x / 32 % WARPS, group = threadIdx.x / 32 / WARPS, t = threadIdx.x % 4;
    int warp_row = warp / (BN / 16) * 32, warp_column = warp % (BN / 16) * 16;
    int row = warp_row + threadIdx.x % 32 / 4, column = warp_column + threadIdx.x % 32 / 4;
    Sums mine;
    int start = blockIdx.z * slice;
    float *now = shared, *then = shared + TILES;
    fetch(start);
    for (; start < from.depth; start += DEPTH) {
        next_left.store(now);
        next_right.store(now + Left::SIZE);
        __syncthreads();  // and nobody reads any more what is written next, as all have passed the last one
        if (start + DEPTH < from.depth) fetch(start + DEPTH);
        mine.add([&](int i, float *to) { Left::read(now, group, row + 8 * i, t, to); },
                 [&](int j, float *to) { Right::read(now + Left::SIZE, group, column + 8 * j, t, to); });
        float *other = now;
        now = then, then = other;
    }
    __syncthreads();
    mine.write(shared + (group * BM + warp_row) * (BN + 1) + warp_column);
    __syncthreads();

    int step = gridDim.z > 1 ? 1 : ROWS_AT_ONCE;
    for (int i = threadIdx.x; i < BM / step * BN; i += THREADS) {
        int row = first_row + i / BN * step, column = first_column + i % BN;
        if (row >= rows || column >= COLUMNS) continue;
        auto sum = [&](int r, int) { return sum_of_groups(shared, BM, i / BN * step + r, i % BN); };
        if (gridDim.z > 1)
            partial[(blockIdx.z * rows + row) * COLUMNS + column] = sum(0, 0);
        else
            write<1>(Results{bias, out, db, winner}, row, column, sum);
    }
}
