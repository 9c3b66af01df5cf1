// The factors of the products that convolution.cu tells of, as they lie in memory. It says what the names mean.

enum { FORWARD, INPUT, FILTERS, FLOAT32, TF32, FLOAT16, BFLOAT16 };

constexpr int BK = 16;  // steps of the depth that a warp takes at once: two of tf32, one of 16 bits
constexpr int TAPS = K * K * C, COLUMNS = PASS == INPUT ? C : F;
constexpr unsigned char NOBODY = 4;
constexpr int LEFT_STEP = PASS == INPUT ? VY : VX;  // numbers that one load brings
constexpr int RIGHT_STEP = PASS == FILTERS ? VY : VW;

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

// STEP numbers of dy from `place` on, as they were before pooling and ReLU. corner: which of a window of 2 x 2 this is.
template <int STEP>
__device__ __forceinline__ void load_gradient_at(const Factors &from, int place, int corner, float *to) {
    load<STEP>(from.dy + place, to);
    if (POOL) {
        unsigned char won[STEP];
        load_bytes<STEP>(from.won + place, won);
        for (int i = 0; i < STEP; i++) to[i] = won[i] == corner ? to[i] : 0;
    } else if (RELU) {
        float y[STEP];
        load<STEP>(from.y + place, y);
        for (int i = 0; i < STEP; i++) to[i] = y[i] <= 0 ? 0 : to[i];
    }
}

// STEP numbers of dy of a pixel, from filter f on. `to` holds zeros.
template <int STEP>
__device__ __forceinline__ void load_gradient(const Factors &from, Pixel at, int f, float *to) {
    if (POOL && (at.h / 2 >= OH / 2 || at.w / 2 >= OW / 2)) return;  // a last odd row or column fills no window
    int place = POOL ? ((at.n * (OH / 2) + at.h / 2) * (OW / 2) + at.w / 2) * F + f
                     : ((at.n * OH + at.h) * OW + at.w) * F + f;
    load_gradient_at<STEP>(from, place, at.h % 2 * 2 + at.w % 2, to);
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
