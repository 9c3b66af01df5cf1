// The float16 wire (comm/wire.py says what it is): blocks of 256 numbers that share a power of two, the same bits as on
// the CPU. A block of threads for each block of numbers.
//
// A message holds `part` halves and then an exponent for each block, all 16 bits wide; `part` is a multiple of BLOCK.
// A vector of n numbers is cut into messages of `part` numbers each, which begin `stride` 16-bit words apart.

constexpr int BLOCK = 256, TOP = 15, LOWEST = -126, BIAS = 127, MANTISSA = 23, INFINITE = 0x7F800000;

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((BIAS + exponent) << MANTISSA); }

// The exponent that the block's numbers, one a thread, share.
__device__ __forceinline__ int shared_exponent(float x) {
    __shared__ int peaks[BLOCK];
    int magnitude = __float_as_int(x) & 0x7FFFFFFF;
    __syncthreads();  // the last block's peaks have been read
    peaks[threadIdx.x] = magnitude < INFINITE ? magnitude : 0;
    for (int half_way = BLOCK / 2; half_way > 0; half_way /= 2) {
        __syncthreads();
        if (threadIdx.x < half_way) peaks[threadIdx.x] = max(peaks[threadIdx.x], peaks[threadIdx.x + half_way]);
    }
    __syncthreads();
    int peak = peaks[0];
    return peak > 0 ? max((peak >> MANTISSA) - (BIAS - 1 + TOP), LOWEST) : 0;
}

// Write the block's numbers, one a thread, as halves and their exponent; a thread beyond the vector's end brings 0.
__device__ __forceinline__ void write_block(float x, bool inside, unsigned short *half, unsigned short *exponent) {
    int shared = shared_exponent(x);
    if (inside) *half = half_bits(times(x, power_of_two(-shared)));
    if (threadIdx.x == 0) *exponent = (unsigned short)shared;
}

__device__ __forceinline__ float read(const unsigned short *message, int part, int i) {
    return times(half_value(message[i]), power_of_two((short)message[part + i / BLOCK]));
}

// Write x (n,) as messages. bad_at becomes the index of the first number that is not finite, if there is one.
extern "C" __global__ void __launch_bounds__(BLOCK) encode(const float *x, unsigned short *messages, int n, int part,
                                                           int stride, int *bad_at) {
    int i = blockIdx.x * BLOCK + threadIdx.x;
    float number = i < n ? x[i] : 0;
    if ((__float_as_int(number) & 0x7FFFFFFF) >= INFINITE) atomicMin(bad_at, i);
    unsigned short *message = messages + (long long)(i / part) * stride;
    write_block(number, i < n, message + i % part, message + part + i % part / BLOCK);
}

// Add up the contributions of P ranks to this rank's part, in float32 and rank order, and write the sum as one message.
// own (n,) is that of `rank`, as it is; those of the others are messages in `received`.
extern "C" __global__ void __launch_bounds__(BLOCK) sum_and_encode(const float *own, int rank, int P,
                                                                   const unsigned short *received, int stride, int part,
                                                                   unsigned short *message, int n) {
    int i = blockIdx.x * BLOCK + threadIdx.x;
    float total = 0;
    if (i < n)
        for (int r = 0; r < P; r++)
            total = plus(total, r == rank ? own[i] : read(received + (long long)r * stride, part, i));
    write_block(total, i < n, message + i, message + part + i / BLOCK);
}

// Write the numbers of the messages into x (n,); bad_at as in encode.
extern "C" __global__ void __launch_bounds__(BLOCK) decode(const unsigned short *messages, float *x, int n, int part,
                                                           int stride, int *bad_at) {
    int i = blockIdx.x * BLOCK + threadIdx.x;
    if (i >= n) return;
    float number = read(messages + (long long)(i / part) * stride, part, i % part);
    if ((__float_as_int(number) & 0x7FFFFFFF) >= INFINITE) atomicMin(bad_at, i);
    x[i] = number;
}

// What encode, sum_and_encode of one rank and decode make of x (n,): bad[0] tells of it before, bad[1] after.
extern "C" __global__ void __launch_bounds__(BLOCK) round_trip(float *x, int n, int *bad) {
    int i = blockIdx.x * BLOCK + threadIdx.x;
    float before = i < n ? x[i] : 0, sum = plus(0, before);
    int exponent = shared_exponent(sum);
    float after = times(half_value(half_bits(times(sum, power_of_two(-exponent)))), power_of_two(exponent));
    if ((__float_as_int(before) & 0x7FFFFFFF) >= INFINITE) atomicMin(bad, i);
    if ((__float_as_int(after) & 0x7FFFFFFF) >= INFINITE) atomicMin(bad + 1, i);
    if (i < n) x[i] = after;
}

// bad_at becomes the index of the first number of x (n,) that is not finite, if there is one.
extern "C" __global__ void find_bad(const float *x, int n, int *bad_at) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && (__float_as_int(x[i]) & 0x7FFFFFFF) >= INFINITE) atomicMin(bad_at, i);
}
