// Convolution with stride 1, FORWARD or INPUT of convolution.cu, from images that lie in shared memory: each number is
// loaded once for a block of threads, not once for each of the K x K taps, and where it lies needs no arithmetic.
//
// What is convolved, `in`, is x, or dy with the taps mirrored. A block computes ROWS rows, a band, of IMAGES images of
// what comes out, BN channels of them. It goes through the channels of `in` by BK: K K steps of the depth of BK each.
// These are shared by GROUPS of warps, one or K, each with a row of the filters. FEW: where `in` has no multiple of BK
// channels, it takes all at once, and the depth is filled up with filters of zeros.
//
// A warp computes 16 channels of 32 pixels. The filters are the left factor: they are written to shared memory once, in
// the order in which tensor cores want them, and a pixel's channels, of the right one, follow each other in any case.

constexpr bool FORWARDS = PASS == FORWARD, WINDOWS = FORWARDS && POOL;
constexpr int Y_H = POOL ? OH / 2 * 2 : OH, Y_W = POOL ? OW / 2 * 2 : OW;  // what fills windows
constexpr int CHANNELS = FORWARDS ? C : F, IN_H = FORWARDS ? H : Y_H, IN_W = FORWARDS ? W : Y_W;
constexpr int OUT_H = FORWARDS ? Y_H : H, OUT_W = FORWARDS ? Y_W : W;
constexpr int BORDER = FORWARDS ? PAD : K - 1 - PAD;
constexpr bool FEW = CHANNELS % BK != 0;
constexpr int WIDTH = FEW ? CHANNELS : BK, STEPS = (K * K * WIDTH + BK - 1) / BK;
constexpr bool PAIRS = SIXTEEN_BITS && !FEW;  // the tiles hold two numbers in a word
constexpr int PACKED = PAIRS ? 2 : 1;
constexpr int FILTER_ROWS = FEW ? 1 : K, ROW_STEPS = STEPS / FILTER_ROWS;

constexpr int TILE_H = ROWS + K - 1, TILE_W = OUT_W + K - 1;
constexpr int BANDS = (OUT_H + ROWS - 1) / ROWS, BAND = ROWS * OUT_W;
constexpr int BM = (IMAGES * BAND + 31) / 32 * 32, TALL = BN / 16;  // warps for the channels of a pixel
constexpr int THREADS = BM * TALL * GROUPS;
// Registers are short, most of all in FLOAT32: how much of the loop is unrolled; whether the next tile is loaded while
// this one is multiplied; how many blocks a multiprocessor must have room for.
constexpr int ROWS_AT_A_TIME = PRECISION == FLOAT32 ? 1 : FILTER_ROWS;
constexpr bool AHEAD = PRECISION != FLOAT32 || THREADS <= 384;
constexpr int MIN_BLOCKS = THREADS < 512 ? 512 / THREADS : 1;
constexpr int IN_STEP = FEW ? 1 : 4, AT_ONCE = COLUMNS % 4 == 0 ? 4 : 1;  // numbers that follow each other
constexpr int TILE = (IMAGES * TILE_H * TILE_W * WIDTH / PACKED + 3) / 4 * 4, ALL_FILTERS = STEPS * BK * BN;
constexpr int SUMS = GROUPS * BM * (BN + 1), TILES = TILE + ALL_FILTERS / PACKED, SHARED = TILES > SUMS ? TILES : SUMS;
static_assert(IMAGES == 1 || BANDS == 1, "several images, or bands of one");
static_assert(!WINDOWS || ROWS % 2 == 0, "whole windows");
static_assert(!FEW || FORWARDS, "few channels are those of x");
static_assert(GROUPS == 1 || (GROUPS == K && !FEW), "a group for each row of the filters");

// Where in the tile the first tap of a block's result lies; four in a row make a window where these are pooled.
__device__ __forceinline__ int place_of(int row) {
    int image = row / BAND, i = row % BAND;
    int h = WINDOWS ? i / 4 / (OUT_W / 2) * 2 + i / 2 % 2 : i / OUT_W;
    int w = WINDOWS ? i / 4 % (OUT_W / 2) * 2 + i % 2 : i % OUT_W;
    return ((image * TILE_H + h) * TILE_W + w) * WIDTH / PACKED;
}

// Write the filter of channel k of `in` and f of what comes out, both below 16, to where its lane looks for it.
__device__ __forceinline__ void put_filter(float *filters, int k, int f, float number) {
    int lane = f % 8 * 4 + k / 4;
    if (PAIRS)
        reinterpret_cast<unsigned short *>(filters)[(lane * 4 + k % 4 / 2 * 2 + f / 8) * 2 + k % 2] = pair(number, 0);
    else
        filters[k % 4 / 2 * 128 + lane * 4 + k % 2 * 2 + f / 8] = stored(number);
}

// The tile of `in` and its filters on their way: read into registers, then written to shared memory.
struct Tiles {
    static constexpr int NUMBERS = IMAGES * TILE_H * TILE_W * WIDTH;
    static constexpr int IN_LOADS = (NUMBERS / IN_STEP + THREADS - 1) / THREADS;
    static constexpr int LINE = FORWARDS ? BN : BK, LINES = ALL_FILTERS / LINE, SIDE = LINE / VW;
    static constexpr int W_LOADS = (LINES * SIDE + THREADS - 1) / THREADS;
    static constexpr int NOWHERE = -1;
    static constexpr bool CORNERS = !FORWARDS && POOL;  // places are followed by 2 bits: the corner of the window
    float in[IN_LOADS][IN_STEP], filters[W_LOADS][VW];
    int in_at[IN_LOADS], filters_at[W_LOADS];  // where this thread's numbers of the first channels lie, or NOWHERE

    // The tile begins at row h of the first of some images; the filters are those of `column` and what follows.
    __device__ __forceinline__ Tiles(int images, int h, int column) {
        Walk<TILE_H, TILE_W, WIDTH / IN_STEP, THREADS> walk;
#pragma unroll
        for (int i = 0; i < IN_LOADS; i++, walk.next()) {
            Pixel at{walk.image, h + walk.row - BORDER, walk.column - BORDER};
            bool inside = at.n < min(images, IMAGES) && unsigned(at.h) < IN_H && unsigned(at.w) < IN_W;
            int place = place_of_pixel(at) + walk.place * IN_STEP, corner = at.h % 2 * 2 + at.w % 2;
            in_at[i] = !inside ? NOWHERE : CORNERS ? place * 4 + corner : place;
        }
#pragma unroll
        for (int i = 0; i < W_LOADS; i++) {
            int line = (threadIdx.x + i * THREADS) / SIDE, place = (threadIdx.x + i * THREADS) % SIDE * VW;
            int tap = FORWARDS ? line / WIDTH : K * K - 1 - line / BN, c = FORWARDS ? line % WIDTH : column + line % BN;
            int f = FORWARDS ? column + place : place;
            filters_at[i] = tap >= 0 && tap < K * K && c < C && f < F ? (tap * C + c) * F + f : NOWHERE;
        }
    }

    // Of an image's pixel its first channel, in x or in dy.
    __device__ __forceinline__ static int place_of_pixel(Pixel at) {
        if (FORWARDS) return ((at.n * H + at.h) * W + at.w) * C;
        return POOL ? ((at.n * (OH / 2) + at.h / 2) * (OW / 2) + at.w / 2) * F : ((at.n * OH + at.h) * OW + at.w) * F;
    }

    // From channel c on. `from` begins with the first of the images.
    __device__ __forceinline__ void fetch(const Factors &from, int c) {
#pragma unroll
        for (int i = 0; i < IN_LOADS; i++) {
            for (int s = 0; s < IN_STEP; s++) in[i][s] = 0;
            if (in_at[i] == NOWHERE) continue;
            if (FORWARDS)
                load<IN_STEP>(from.x + in_at[i] + c, in[i]);
            else
                load_gradient_at<IN_STEP>(from, (CORNERS ? in_at[i] / 4 : in_at[i]) + c, in_at[i] % 4, in[i]);
        }
#pragma unroll
        for (int i = 0; i < W_LOADS; i++) {
            for (int s = 0; s < VW; s++) filters[i][s] = 0;
            if (filters_at[i] != NOWHERE) load<VW>(from.w + filters_at[i] + (FORWARDS ? c * F : c), filters[i]);
        }
    }

    __device__ __forceinline__ void store(float *tile, float *filters_tile) {
#pragma unroll
        for (int i = 0; i < IN_LOADS; i++) {
            int number = (threadIdx.x + i * THREADS) * IN_STEP;
            if (number >= NUMBERS) continue;
            float words[IN_STEP];
            for (int s = 0; s < IN_STEP; s++) words[s] = stored(in[i][s]);
            if (PAIRS)
                for (int s = 0; s < IN_STEP / 2; s++) words[s] = __uint_as_float(pair(in[i][2 * s], in[i][2 * s + 1]));
            put<IN_STEP / PACKED>(tile + number / PACKED, words);
        }
#pragma unroll
        for (int i = 0; i < W_LOADS; i++) {
            int line = (threadIdx.x + i * THREADS) / SIDE, place = (threadIdx.x + i * THREADS) % SIDE * VW;
            int step = FORWARDS ? line / BK : line / BN, k = FORWARDS ? line % BK : place;
            int f = FORWARDS ? place : line % BN;
            if (line >= LINES) continue;
            float *to = filters_tile + (step * TALL + f / 16) * (256 / PACKED);
            for (int s = 0; s < VW; s++)
                put_filter(to, FORWARDS ? k : k + s, f % 16 + (FORWARDS ? s : 0), filters[i][s]);
        }
    }
};

// Add to total[i] the products of 16 channels and pixels 8 i + g of a warp, which begin at places[i], over all the tile.
// filters: those of the lane. In FLOAT32 the sums of a row of the filters are made by tensor cores.
__device__ __forceinline__ void add_products(const float *tile, const float *filters, const int places[4],
                                             float total[4][4]) {
    int t = threadIdx.x % 4;
#pragma unroll ROWS_AT_A_TIME
    for (int row = 0; row < (GROUPS == 1 ? FILTER_ROWS : 1); row++) {
        float sums[4][4] = {};
#pragma unroll
        for (int step = 0; step < ROW_STEPS; step++) {
            const float *left = filters + (row * ROW_STEPS + step) * TALL * (256 / PACKED);
            int tap = (row * TILE_W + step) * WIDTH / PACKED;
            if constexpr (PAIRS) {
                unsigned some_filters[4], pixel[2];
                load_words<4>(left, some_filters);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    load_words<2>(tile + places[i] + tap + 2 * t, pixel);
                    multiply_pairs(total[i], some_filters, pixel);
                }
                continue;
            }
            Parts<8> some_filters([&](float *to) { load<4>(left, to), load<4>(left + 128, to + 4); });
#pragma unroll
            for (int i = 0; i < 4; i++) {
                Parts<4> pixel([&](float *to) {
                    if constexpr (!FEW) load<4>(tile + places[i] + tap + 4 * t, to);
                    for (int s = 0; FEW && s < 4; s++) {  // beyond the taps any number of the patch will do
                        int k = BK * step + 4 * t + s, inside = k < TAPS ? k : 0;
                        to[s] = tile[places[i] + (inside / C / K * TILE_W + inside / C % K) * C + inside % C];
                    }
                });
                multiply((PRECISION == FLOAT32 ? sums : total)[i], some_filters, pixel);
            }
        }
        if (PRECISION != FLOAT32) continue;
#pragma unroll
        for (int i = 0; i < 16; i++) total[i / 4][i % 4] += sums[i / 4][i % 4];
    }
}

// Grid: bands of all images, or images / IMAGES; channels that come out / BN, rounded up.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) product(
    const float *x, const float *w, const float *dy, const float *y, const unsigned char *won, const float *bias,
    float *out, float *db, unsigned char *winner, float *partial, int rows, int depth, int slice) {
    alignas(16) __shared__ float shared[SHARED];
    float *tile = shared, *filters_tile = shared + TILE;
    int n = blockIdx.x / BANDS * IMAGES, images = rows / (OUT_H * OUT_W) - n;  // from the first on
    int h = blockIdx.x % BANDS * ROWS, first_column = blockIdx.y * BN;
    long long y_place = (long long)n * (POOL ? (OH / 2) * (OW / 2) : OH * OW) * F;
    Factors from{x + (long long)n * H * W * C, w, dy + y_place, y + y_place, won + y_place, rows, depth};

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4, g = lane / 4;
    int group = warp / (BM / 32 * TALL), first_pixel = warp / TALL % (BM / 32) * 32, sixteen = warp % TALL;
    int places[4];
    for (int i = 0; i < 4; i++)
        places[i] = place_of(min(first_pixel + g + 8 * i, IMAGES * BAND - 1)) + group * TILE_W * WIDTH / PACKED;
    const float *my_filters = filters_tile + (group * K * TALL + sixteen) * (256 / PACKED) + lane * 4;

    float total[4][4] = {};
    Tiles next(images, h, first_column);
    next.fetch(from, 0);
    for (int c = 0; c < CHANNELS; c += WIDTH) {
        if (!AHEAD && c > 0) next.fetch(from, c);
        if (c > 0) __syncthreads();  // all have read what is written next
        next.store(tile, filters_tile);
        __syncthreads();
        if (AHEAD && c + WIDTH < CHANNELS) next.fetch(from, c + WIDTH);
        add_products(tile, my_filters, places, total);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 16; i++) {
        int pixel = first_pixel + i / 4 * 8 + 2 * t + i % 2, channel = sixteen * 16 + i / 2 % 2 * 8 + g;
        shared[(group * BM + pixel) * (BN + 1) + channel] = total[i / 4][i % 4];
    }
    __syncthreads();

    int first_row = (n * OUT_H + h) * OUT_W;
    int here = IMAGES > 1 ? min(IMAGES, images) * BAND : min(ROWS, OUT_H - h) * OUT_W;  // rows of this block
    for (int i = threadIdx.x * AT_ONCE; i < BM / ROWS_AT_ONCE * BN; i += THREADS * AT_ONCE) {
        int row = i / BN * ROWS_AT_ONCE, column = i % BN;
        if (row < here && first_column + column < COLUMNS)
            write<AT_ONCE>(Results{bias, out, db, winner}, first_row + row, first_column + column,
                           [&](int r, int c) { return sum_of_groups(shared, BM, row + r, column + c); });
    }
}
