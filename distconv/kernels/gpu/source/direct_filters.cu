// FILTERS of convolution.cu with stride 1, from images that lie in shared memory, as in direct.cu.
//
// A block computes dw of BK channels of x and BN of y, from tile after tile: ROWS rows, a band, of IMAGES images. The
// depth, the pixels of y, is taken by four quads at a step, of pixels side by side; lane 4 g + t has pixel t of each,
// and channels 2 g and 2 g + 1 of x as rows g and g + 8 of the product. Rows of pixels are filled up with zeros to whole
// quads. A warp computes the K taps of a row of the filters; GROUPS of K warps share the depth. FEW: where x has no
// multiple of BK channels, a warp computes all taps and channels, 16 at once.

constexpr bool FEW = C % BK != 0;
constexpr int WIDTH = FEW ? C : BK;                      // channels of x in the tile
constexpr int X_PIXEL = FEW ? C : 24, Y_PIXEL = BN + 8;  // from pixel to pixel; so no two lanes meet in a bank
constexpr int QUADS = (OW + 3) / 4, TILE_H = ROWS + K - 1, TILE_W = 4 * QUADS + K - 1;
constexpr int ALL_QUADS = IMAGES * ROWS * QUADS, STEPS = (ALL_QUADS + 3) / 4, BANDS = (OH + ROWS - 1) / ROWS;
constexpr int SIXTEENS = FEW ? (TAPS + 16) / 16 : K * K;  // of taps and channels, and FEW: db
constexpr int WARPS = FEW ? 1 : K, MANY = SIXTEENS / WARPS, THREADS = 32 * WARPS * GROUPS;
constexpr int MIN_BLOCKS = THREADS < 512 ? 512 / THREADS : 1;
constexpr int X_STEP = FEW ? 1 : 4, Y_STEP = VY;  // numbers that one load brings
constexpr int X_NUMBERS = IMAGES * TILE_H * TILE_W * WIDTH, Y_NUMBERS = STEPS * 16 * BN;
constexpr int X_TILE = (IMAGES * TILE_H * TILE_W * X_PIXEL + 3) / 4 * 4, Y_TILE = STEPS * 16 * Y_PIXEL;
constexpr int BM = 16 * SIXTEENS + (FEW ? 0 : 1), SUMS = GROUPS * BM * (BN + 1);  // the last row is db
constexpr int SHARED = X_TILE + Y_TILE > SUMS ? X_TILE + Y_TILE : SUMS;
constexpr int SIDE = POOL ? 2 : 1, Y_H = OH / SIDE * SIDE, Y_W = OW / SIDE * SIDE;  // of a window; what is in windows
static_assert(BN == 16, "two tiles of a warp");
static_assert(IMAGES == 1 || BANDS == 1, "several images, or bands of one");
static_assert(BANDS == 1 || ROWS % SIDE == 0, "whole windows");
static_assert(ROWS + K <= 64 && IMAGES <= 64, "the row or image of a tile in 6 bits");

// The tiles of x and dy on their way, as in direct.cu.
struct Tiles {
    static constexpr int X_LOADS = (X_NUMBERS / X_STEP + THREADS - 1) / THREADS;
    static constexpr int Y_LOADS = (Y_NUMBERS / Y_STEP + THREADS - 1) / THREADS;
    static constexpr int NOWHERE = -1;
    float x[X_LOADS][X_STEP], dy[Y_LOADS][Y_STEP];
    // Where this thread's numbers lie from the beginning of a tile on: the place, then 6 bits for the row or image of
    // the tile, then 2 for the corner of the window; or NOWHERE.
    int x_at[X_LOADS], y_at[Y_LOADS];

    // The channels of dy begin with f.
    __device__ __forceinline__ explicit Tiles(int f) {
        Walk<TILE_H, TILE_W, WIDTH / X_STEP, THREADS> in_x;
#pragma unroll
        for (int i = 0; i < X_LOADS; i++, in_x.next()) {
            int h = in_x.row - PAD, w = in_x.column - PAD;
            bool inside = in_x.image < IMAGES && unsigned(w) < W && (BANDS > 1 || unsigned(h) < H);
            int place = ((in_x.image * H + in_x.row) * W + w) * C + in_x.place * X_STEP;  // of row h = -PAD on
            x_at[i] = inside ? place * 256 + (IMAGES > 1 ? in_x.image : in_x.row) * 4 : NOWHERE;
        }
        Walk<ROWS, 4 * QUADS, BN / Y_STEP, THREADS> in_y;
#pragma unroll
        for (int i = 0; i < Y_LOADS; i++, in_y.next()) {
            int channel = in_y.place * Y_STEP;
            // Of several images, a last odd row must not be taken for a window of the next one.
            bool counts = in_y.column < Y_W && (IMAGES == 1 || in_y.row < Y_H);
            bool inside = in_y.image < IMAGES && counts && f + channel < F;
            int place = ((in_y.image * (OH / SIDE) + in_y.row / SIDE) * (OW / SIDE) + in_y.column / SIDE) * F + channel;
            int corner = in_y.row % 2 * 2 + in_y.column % 2;
            y_at[i] = inside ? place * 256 + (IMAGES > 1 ? in_y.image : in_y.row) * 4 + corner : NOWHERE;
        }
    }

    // The tile that begins at row h of image n, from channel c of x and f of dy on.
    __device__ __forceinline__ void fetch(const Factors &from, int images, int n, int h, int c, int f) {
        const float *x_begin = from.x + ((long long)n * H + h - PAD) * W * C + c;
        long long y_begin = ((long long)n * (OH / SIDE) + h / SIDE) * (OW / SIDE) * F + f;
        Factors of_tile{nullptr, nullptr, from.dy + y_begin, from.y + y_begin, from.won + y_begin, 0, 0};
#pragma unroll
        for (int i = 0; i < X_LOADS; i++) {
            int which = x_at[i] / 4 % 64;
            for (int s = 0; s < X_STEP; s++) x[i][s] = 0;
            if (x_at[i] != NOWHERE && (IMAGES > 1 ? n + which < images : unsigned(h + which - PAD) < H))
                load<X_STEP>(x_begin + x_at[i] / 256, x[i]);
        }
#pragma unroll
        for (int i = 0; i < Y_LOADS; i++) {
            int which = y_at[i] / 4 % 64;
            for (int s = 0; s < Y_STEP; s++) dy[i][s] = 0;
            if (y_at[i] != NOWHERE && (IMAGES > 1 ? n + which < images : h + which < Y_H))
                load_gradient_at<Y_STEP>(of_tile, y_at[i] / 256, y_at[i] % 4, dy[i]);
        }
    }

    __device__ __forceinline__ void store(float *x_tile, float *y_tile) {
#pragma unroll
        for (int i = 0; i < X_LOADS; i++) {
            int number = (threadIdx.x + i * THREADS) * X_STEP;
            for (int s = 0; s < X_STEP; s++) x[i][s] = stored(x[i][s]);
            if (number < X_NUMBERS) put<X_STEP>(x_tile + number / WIDTH * X_PIXEL + number % WIDTH, x[i]);
        }
#pragma unroll
        for (int i = 0; i < Y_LOADS; i++) {
            int number = (threadIdx.x + i * THREADS) * Y_STEP;
            for (int s = 0; s < Y_STEP; s++) dy[i][s] = stored(dy[i][s]);
            if (number < Y_NUMBERS) put<Y_STEP>(y_tile + number / BN * Y_PIXEL + number % BN, dy[i]);
        }
    }
};

// FEW: where in the tile of x a tap and channel lies, from its pixel on.
__device__ __forceinline__ int place_of(int row) { return (row / C / K * TILE_W + row / C % K) * C + row % C; }

// Add to `total` the products of a tile, and to total_db, if it is wanted, the sums of dy. quads: where each lies in x.
// In FLOAT32 the sums of a tile are made by tensor cores.
__device__ __forceinline__ void add_products(const float *x, const float *dy, const int *quads,
                                             float total[MANY][2][4], float total_db[2][4], bool sums_dy) {
    int warp = threadIdx.x / 32 % WARPS, group = threadIdx.x / 32 / WARPS, t = threadIdx.x % 4;
    int g = threadIdx.x % 32 / 4;
    float sums[MANY][2][4] = {};
    for (int step = group; step < STEPS; step += GROUPS) {
        auto right = [&](int j) {
            return Parts<4>([&](float *to) {
                for (int s = 0; s < 4; s++) to[s] = dy[(16 * step + 4 * s + t) * Y_PIXEL + 8 * j + g];
            });
        };
        Parts<4> b[2] = {right(0), right(1)};
#pragma unroll
        for (int m = 0; m < MANY; m++) {
            Parts<8> a([&](float *to) {
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    const float *pixel = x + quads[4 * step + s] + t * X_PIXEL;
                    if constexpr (!FEW) load<2>(pixel + (warp * TILE_W + m) * X_PIXEL + 2 * g, to + 2 * s);
                    for (int i = 0; FEW && i < 2; i++) {
                        int row = m * 16 + 8 * i + g;
                        to[2 * s + i] = row < TAPS ? pixel[place_of(row)] : row == TAPS;
                    }
                }
            });
#pragma unroll
            for (int j = 0; j < 2; j++) multiply((PRECISION == FLOAT32 ? sums : total)[m][j], a, b[j]);
        }
        if (!sums_dy) continue;
        Parts<8> ones([](float *to) {
            for (int i = 0; i < 8; i++) to[i] = 1;
        });
        for (int j = 0; j < 2; j++) multiply(total_db[j], ones, b[j]);
    }
    if (PRECISION == FLOAT32)
#pragma unroll
        for (int i = 0; i < MANY * 8; i++)
            total[i / 8][i / 4 % 2][i % 4] += sums[i / 8][i / 4 % 2][i % 4];
}

// Grid: channels of x / BK, or 1 where they are few; channels of y / BN; slices, all rounded up. As `product` of
// convolution.cu, but `slice` is the number of tiles of one.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) product(
    const float *x, const float *w, const float *dy, const float *y, const unsigned char *won, const float *bias,
    float *out, float *db, unsigned char *winner, float *partial, int rows, int depth, int slice) {
    alignas(16) __shared__ float shared[SHARED];
    __shared__ int quads[STEPS * 4];  // where each lies in the tile of x
    float *x_tile = shared, *y_tile = shared + X_TILE;
    Factors from{x, w, dy, y, won, rows, depth};
    int images = depth / (OH * OW), tiles = (images + IMAGES - 1) / IMAGES * BANDS;
    int c = blockIdx.x * BK, f = blockIdx.y * BN, first = blockIdx.z * slice, last = min(tiles, first + slice);
    int warp = threadIdx.x / 32 % WARPS, group = threadIdx.x / 32 / WARPS, t = threadIdx.x % 4;
    int g = threadIdx.x % 32 / 4;
    bool sums_dy = !FEW && blockIdx.x == 0 && warp == 0;  // FEW: one row of the product is db

    for (int i = threadIdx.x; i < STEPS * 4; i += THREADS) {
        int quad = min(i, ALL_QUADS - 1), row = quad / QUADS;
        quads[i] = ((row / ROWS * TILE_H + row % ROWS) * TILE_W + quad % QUADS * 4) * X_PIXEL;
    }
    float total[MANY][2][4] = {}, total_db[2][4] = {};
    Tiles next(f);
    next.fetch(from, images, first / BANDS * IMAGES, first % BANDS * ROWS, c, f);
    for (int tile = first; tile < last; tile++) {
        if (tile > first) __syncthreads();  // all have read what is written next
        next.store(x_tile, y_tile);
        __syncthreads();
        if (tile + 1 < last)
            next.fetch(from, images, (tile + 1) / BANDS * IMAGES, (tile + 1) % BANDS * ROWS, c, f);
        add_products(x_tile, y_tile, quads, total, total_db, sums_dy);
    }
    __syncthreads();
    float *to = shared + group * BM * (BN + 1);
#pragma unroll
    for (int i = 0; i < MANY * 8; i++) {
        int m = i / 8, column = i / 4 % 2 * 8 + 2 * t + i % 2, lower = i / 2 % 2;
        int row = FEW ? m * 16 + lower * 8 + g : (warp * MANY + m) * 16 + 2 * g + lower;
        to[row * (BN + 1) + column] = total[m][i / 4 % 2][i % 4];
    }
    float *to_db = to + (BM - 1) * (BN + 1) + 2 * t;
    if (sums_dy && g == 0)
        for (int i = 0; i < 4; i++) to_db[i / 2 * 8 + i % 2] = total_db[i / 2][i % 2];
    __syncthreads();

    for (int i = threadIdx.x; i < BM * BN; i += THREADS) {
        int inner = i / BN, column = f + i % BN;
        int row = FEW ? inner : inner == BM - 1 ? TAPS : inner / BK * C + c + inner % BK;
        if (row > TAPS || column >= F || (!FEW && row == TAPS && c > 0)) continue;
        auto sum = [&](int, int) { return sum_of_groups(shared, BM, inner, i % BN); };
        if (gridDim.z > 1)
            partial[(blockIdx.z * rows + row) * COLUMNS + column] = sum(0, 0);
        else
            write<1>(Results{bias, out, db, winner}, row, column, sum);
    }
}
