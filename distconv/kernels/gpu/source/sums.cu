// What convolution.cu and the direct convolutions share: sums of products on tensor cores, and what becomes of them.

constexpr bool SIXTEEN_BITS = PRECISION == FLOAT16 || PRECISION == BFLOAT16;

__device__ __forceinline__ unsigned pair(float low, float high) {
    return PRECISION == FLOAT16 ? half_pair(low, high) : bfloat_pair(low, high);
}

__device__ __forceinline__ void multiply_pairs(float c[4], const unsigned a[4], const unsigned b[2]) {
    PRECISION == FLOAT16 ? multiply_tile_float16(c, a, b) : multiply_tile_bfloat16(c, a, b);
}

// COUNT numbers of a lane as tensor cores take them: in FLOAT32 a large and a small part of each.
template <int COUNT>
struct Parts {
    float large[COUNT], small[COUNT];

    template <typename Read>
    __device__ __forceinline__ explicit Parts(Read read) {
        read(large);
        if (PRECISION != FLOAT32) return;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            float rest = __uint_as_float(__float_as_uint(large[i]) & 0xFFFFE000);
            small[i] = large[i] - rest;
            large[i] = rest;
        }
    }
};

__device__ __forceinline__ void multiply_parts(float c[4], const float a[8], const float b[4]) {
    if constexpr (SIXTEEN_BITS) {
        unsigned pairs[4] = {pair(a[0], a[2]), pair(a[1], a[3]), pair(a[4], a[6]), pair(a[5], a[7])};
        unsigned b_pairs[2] = {pair(b[0], b[1]), pair(b[2], b[3])};
        multiply_pairs(c, pairs, b_pairs);
    } else {
        multiply_tile_tf32(c, a, b);
        multiply_tile_tf32(c, a + 4, b + 2);
    }
}

// C (16 x 8) += A (16 x BK) B (BK x 8) by a warp. Lane 4 g + t holds four numbers along the depth: a[2 i] of row g and
// a[2 i + 1] of row g + 8 of A, b[i] of column g of B. Which four these are is free, if it is the same for A and B.
// Tensor cores cut off what they add, so in FLOAT32 let few products follow each other before their sum goes elsewhere.
__device__ __forceinline__ void multiply(float c[4], const Parts<8> &a, const Parts<4> &b) {
    if (PRECISION == FLOAT32) {
        multiply_parts(c, a.small, b.large);
        multiply_parts(c, a.large, b.small);
    }
    multiply_parts(c, a.large, b.large);
}

// A number on its way to shared memory.
__device__ __forceinline__ float stored(float x) { return PRECISION == TF32 ? to_tf32(x) : x; }

// The places of a tile of images, PLACES for each pixel, as a thread comes by them: the next is FURTHER further.
template <int HEIGHT, int BREADTH, int PLACES, int FURTHER>
struct Walk {
    static constexpr int PIXELS = FURTHER / PLACES, REST = FURTHER % PLACES, DOWN = PIXELS / BREADTH;
    int place = threadIdx.x % PLACES, column = threadIdx.x / PLACES % BREADTH;
    int row = threadIdx.x / PLACES / BREADTH % HEIGHT, image = threadIdx.x / PLACES / BREADTH / HEIGHT;

    __device__ __forceinline__ void next() {
        if (REST > 0 && (place += REST) >= PLACES) place -= PLACES, column++;
        if ((column += PIXELS % BREADTH) >= BREADTH) column -= BREADTH, row++;
        if ((row += DOWN % HEIGHT) >= HEIGHT) row -= HEIGHT, image++;
        image += DOWN / HEIGHT;
    }
};

// Of a row and column of a block, whose groups of warps have written `rows` rows each.
__device__ __forceinline__ float sum_of_groups(const float *sums, int rows, int row, int column) {
    float total = 0;
    for (int group = 0; group < GROUPS; group++) total += sums[(group * rows + row) * (BN + 1) + column];
    return total;
}

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

// Write the results of a row and COUNT columns of the product, or of the four rows from `row` on that are pooled.
// sum(r, c): r rows below and c columns beside the first. With 4 columns, `out` and `winner` begin at a multiple of 16.
template <int COUNT, typename Sum>
__device__ __forceinline__ void write(const Results &to, int row, int column, Sum sum) {
    if (PASS == FILTERS) {
        if (row == TAPS && !BIAS) return;
        float &result = row == TAPS ? to.db[column] : to.out[row * COLUMNS + column];
        result += sum(0, 0);
        return;
    }
    float results[COUNT];
    unsigned char winners[COUNT];
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
        results[c] = sum(0, c);
        if (PASS == FORWARD) results[c] = with_bias_and_relu(results[c], BIAS ? to.bias[column + c] : 0);
        if (PASS == FORWARD && POOL) {
            int best = 0;
            for (int i = 1; i < 4; i++) {
                float other = with_bias_and_relu(sum(i, c), BIAS ? to.bias[column + c] : 0);
                if (other > results[c] || other != other) results[c] = other, best = i;  // what is not a number stays
            }
            winners[c] = RELU && results[c] <= 0 ? NOBODY : best;
        }
    }
    int place = row / ROWS_AT_ONCE * COLUMNS + column;
    put<COUNT>(to.out + place, results);
    if (PASS == FORWARD && POOL) put_bytes<COUNT>(to.winner + place, winners);
}

constexpr int OUTPUTS = 32, PARTS = 8;  // of a block of `finish`: the threads of a warp have an output each

// Add up the slices, partial (slices, rows, COLUMNS), and write the result: a warp its part of the slices, in order,
// then the first warp the parts. A block for every OUTPUTS columns of the rows, or windows, of the product.
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
    write<1>(Results{bias, out, db, winner}, row, column, [&](int r, int) {
        float sum = 0;
        for (int p = 0; p < PARTS; p++) sum += sums[r][p][lane];
        return sum;
    });
}
