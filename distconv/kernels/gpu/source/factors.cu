// What convolution.cu multiplies, and how it comes to shared memory: the first part of that file, which says what the
// names mean.

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
