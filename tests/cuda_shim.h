// Runs the CUDA C++ of the kernels on a CPU: g++ reads this file before the source (-include).
//
// Every thread of a block is a fiber on one operating system thread: it runs until a barrier, then the next one runs.
// Blocks run one after the other. What a GPU leaves undefined and this emulation can see ends the launch with a message.
#pragma once
#define DISTCONV_EMULATED 1

#include <link.h>
// C's own. That of C++17 has special functions as well, 17,000 lines for each of some 300 compilations.
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static thread_local  // only because what is thread_local lies together, and can be found: see poison

struct uint3 { unsigned x, y, z; };
struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(4) uchar4 { unsigned char x, y, z, w; };

static uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum State { ready, at_warp_barrier, at_block_barrier, done };

struct Fiber {
    State state;
    bool started;
    char *stack;
    jmp_buf resume;
};

const unsigned most_threads = 1024, warp_size = 32;
const size_t stack_bytes = 64 * 1024;

static Fiber fibers[most_threads];
static unsigned live[most_threads / warp_size];  // threads of each warp that have not returned
static jmp_buf scheduler;
static ucontext_t first_entry;
static void (*kernel)(const void *);
static const void *kernel_arguments;
static char failure[300];
__shared__ volatile char in_shared_memory;

// _setjmp and _longjmp, because swapcontext costs a system call each time.
static void switch_to_scheduler(State state) {
    Fiber &self = fibers[threadIdx.x];
    self.state = state;
    if (!_setjmp(self.resume)) _longjmp(scheduler, 1);
}

[[noreturn]] static void fail(const char *reason, unsigned line = 0) {
    const int length = snprintf(failure, sizeof failure, "%s, thread %u of block (%u, %u, %u)", reason, threadIdx.x,
                                blockIdx.x, blockIdx.y, blockIdx.z);
    if (line) snprintf(failure + length, sizeof failure - length, ", line %u", line);
    _longjmp(scheduler, 1);
}

static void fail_by_signal(int number) {
    fail(number == SIGFPE ? "integer division by zero" : "access far outside any array");
}

// A fiber outlives its block: at the end of one it waits for the next.
static void fiber_main() {
    for (;;) {
        kernel(kernel_arguments);
        --live[threadIdx.x / warp_size];
        switch_to_scheduler(done);
    }
}

static void run_until_barrier(unsigned thread) {
    Fiber &fiber = fibers[thread];
    threadIdx.x = thread;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    if (!fiber.stack) fiber.stack = new char[stack_bytes];
    getcontext(&first_entry);
    first_entry.uc_stack.ss_sp = fiber.stack;
    first_entry.uc_stack.ss_size = stack_bytes;
    makecontext(&first_entry, fiber_main, 0);
    setcontext(&first_entry);
}

// Fills the shared memory of a block: what is thread_local in the library that this file is compiled into.
static void poison_shared_memory() {
    in_shared_memory = 0;  // now there is some
    dl_iterate_phdr([](dl_phdr_info *library, size_t, void *) {
        for (int i = 0; i < library->dlpi_phnum; ++i) {
            char *start = static_cast<char *>(library->dlpi_tls_data);
            const size_t size = library->dlpi_phdr[i].p_memsz, offset = const_cast<char *>(&in_shared_memory) - start;
            if (library->dlpi_phdr[i].p_type == PT_TLS && start && offset < size) return memset(start, 0xFF, size), 1;
        }
        return 0;
    }, nullptr);
}

// Lets the threads from `first` to `last` go on if all that have not returned wait at this barrier.
static bool release(unsigned first, unsigned last, State barrier) {
    bool any = false;
    for (unsigned thread = first; thread < last; ++thread) {
        if (fibers[thread].state == done) continue;
        if (fibers[thread].state != barrier) return false;
        any = true;
    }
    for (unsigned thread = first; thread < last && any; ++thread)
        if (fibers[thread].state == barrier) fibers[thread].state = ready;
    return any;
}

// `backwards`: the last thread first. A missing barrier shows in one order or the other.
static void run_block(unsigned threads, bool backwards) {
    poison_shared_memory();
    memset(live, 0, sizeof live);
    for (unsigned thread = 0; thread < threads; ++thread) {
        fibers[thread].state = ready;
        ++live[thread / warp_size];
    }
    for (;;) {
        for (unsigned i = 0; i < threads; ++i) {
            const unsigned thread = backwards ? threads - 1 - i : i;
            if (fibers[thread].state == ready) run_until_barrier(thread);
            if (*failure) return;
        }
        bool released = release(0, threads, at_block_barrier), waiting = false;
        for (unsigned first = 0; first < threads; first += warp_size) {
            const unsigned last = first + warp_size < threads ? first + warp_size : threads;
            released |= release(first, last, at_warp_barrier);
            waiting |= live[first / warp_size] > 0;
        }
        if (!waiting) return;
        if (!released) {
            snprintf(failure, sizeof failure, "some threads wait at __syncthreads, others of the same warp at a "
                     "barrier of the warp, block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
            return;
        }
    }
}

// Null, or what went wrong.
template <typename Call>
const char *launch(unsigned x, unsigned y, unsigned z, unsigned threads, const Call &call) {
    kernel = [](const void *arguments) { (*static_cast<const Call *>(arguments))(); };
    kernel_arguments = &call;
    *failure = 0;
    struct sigaction now = {}, before[2];
    now.sa_handler = fail_by_signal;
    now.sa_flags = SA_NODEFER;  // the handler never returns
    sigaction(SIGSEGV, &now, &before[0]);
    sigaction(SIGFPE, &now, &before[1]);
    gridDim = {x, y, z};
    blockDim = {threads, 1, 1};
    for (unsigned block = 0; block < x * y * z && !*failure; ++block) {
        blockIdx = {block % x, block / x % y, block / (x * y)};
        run_block(threads, block % 2);
    }
    sigaction(SIGSEGV, &before[0], nullptr);
    sigaction(SIGFPE, &before[1], nullptr);
    if (!*failure) return nullptr;
    for (Fiber &fiber : fibers) fiber.started = false;  // they are stuck somewhere inside the kernel
    return failure;
}

static void barrier(State kind) {
    asm volatile("" ::: "memory");  // other threads write what the compiler believes to be this thread's own
    switch_to_scheduler(kind);
    asm volatile("" ::: "memory");
}

template <typename To, typename From> inline To same_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "of the same size");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}

}  // namespace emulated

// -fsanitize=bounds,alignment calls these; the first field of `where` is a file's name, the second a line.
struct SourcePlace { const char *file; unsigned line, column; };
extern "C" void __ubsan_handle_out_of_bounds_abort(void *where, void *) {
    emulated::fail("index outside a shared or local array", static_cast<SourcePlace *>(where)->line);
}
extern "C" void __ubsan_handle_type_mismatch_v1_abort(void *where, void *) {
    emulated::fail("misaligned address", static_cast<SourcePlace *>(where)->line);
}

static void __syncthreads() { emulated::barrier(emulated::at_block_barrier); }
static void __syncwarp() { emulated::barrier(emulated::at_warp_barrier); }

static inline unsigned __float_as_uint(float value) { return emulated::same_bits<unsigned>(value); }
static inline float __uint_as_float(unsigned bits) { return emulated::same_bits<float>(bits); }
static inline int __float_as_int(float value) { return emulated::same_bits<int>(value); }
static inline float __int_as_float(int bits) { return emulated::same_bits<float>(bits); }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) {
    return {x, y, z, w};
}

static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }

static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }

static inline int atomicMin(int *address, int value) {
    const int old = *address;
    *address = min(old, value);
    return old;
}

// What the real source writes as inline PTX.

static unsigned short half_bits(float value) {  // cvt.rn.f16.f32
    const unsigned bits = __float_as_uint(value), magnitude = bits & 0x7FFFFFFF, sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7F800000) return 0x7FFF;
    if (magnitude >= 0x477FF000) return sign | 0x7C00;  // from 65520 on
    if (magnitude < 0x38800000)  // subnormal: a multiple of 2^-24
        return sign | static_cast<unsigned>(nearbyintf(__uint_as_float(magnitude) * 0x1p24f));
    return sign | (((magnitude + 0xFFF + (magnitude >> 13 & 1)) >> 13) - (112 << 10));
}

static float half_value(unsigned short bits) {  // cvt.f32.f16
    const unsigned exponent = bits >> 10 & 0x1F, fraction = bits & 0x3FF, sign = (bits & 0x8000u) << 16;
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint(fraction * 0x1p-24f));
    return __uint_as_float(sign | (exponent == 0x1F ? 0xFF : exponent + 112) << 23 | fraction << 13);
}

namespace emulated {

struct Tile { float a[16][16], b[16][8]; };
static Tile tiles[most_threads / warp_size];

static float rounded_to_tf32(float value) {  // half away from zero
    return isfinite(value) ? __uint_as_float((__float_as_uint(value) + 0x1000) & 0xFFFFE000) : value;
}
static float cut_to_tf32(float value) { return __uint_as_float(__float_as_uint(value) & 0xFFFFE000); }
static float rounded_to_bfloat16(float value) {  // half to even
    const unsigned bits = __float_as_uint(value);
    return isfinite(value) ? __uint_as_float((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000) : value;
}

// mma.sync: what all lanes have written into the tile is multiplied.
static void multiply_tile(float c[4], unsigned depth) {
    const unsigned warp = threadIdx.x / warp_size, g = threadIdx.x % warp_size >> 2, t = threadIdx.x & 3;
    const Tile &tile = tiles[warp];
    barrier(at_warp_barrier);
    if (live[warp] != warp_size) fail("a tile product without all 32 threads of the warp");
    for (unsigned i = 0; i < 4; ++i)
        for (unsigned k = 0; k < depth; ++k) c[i] += tile.a[g + 8 * (i >> 1)][k] * tile.b[k][2 * t + (i & 1)];
    barrier(at_warp_barrier);  // until all have read
}

static void multiply_tile_16(float c[4], const unsigned a[4], const unsigned b[2], float (*value)(unsigned short)) {
    const unsigned warp = threadIdx.x / warp_size, g = threadIdx.x % warp_size >> 2, t = threadIdx.x & 3;
    for (unsigned k = 0; k < 4; ++k) {
        const unsigned shift = k % 2 * 16;
        for (unsigned half = 0; half < 2; ++half)
            tiles[warp].a[g + 8 * half][4 * t + k] = value(a[k / 2 * 2 + half] >> shift);
        tiles[warp].b[4 * t + k][g] = value(b[k / 2] >> shift);
    }
    multiply_tile(c, 16);
}

static float bfloat16_value(unsigned short bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

}  // namespace emulated

static float to_tf32(float value) { return emulated::rounded_to_tf32(value); }

static void multiply_tile_tf32(float c[4], const float a[4], const float b[2]) {
    const unsigned warp = threadIdx.x / emulated::warp_size, g = threadIdx.x % 32 >> 2, t = threadIdx.x & 3;
    for (unsigned i = 0; i < 4; ++i)
        emulated::tiles[warp].a[g + 8 * (i & 1)][t + 4 * (i >> 1)] = emulated::cut_to_tf32(a[i]);
    for (unsigned i = 0; i < 2; ++i) emulated::tiles[warp].b[t + 4 * i][g] = emulated::cut_to_tf32(b[i]);
    emulated::multiply_tile(c, 8);
}
static unsigned half_pair(float low, float high) {
    return half_bits(low) | static_cast<unsigned>(half_bits(high)) << 16;
}
static unsigned bfloat_pair(float low, float high) {
    return __float_as_uint(emulated::rounded_to_bfloat16(low)) >> 16 |
           (__float_as_uint(emulated::rounded_to_bfloat16(high)) & 0xFFFF0000);
}
static void multiply_tile_float16(float c[4], const unsigned a[4], const unsigned b[2]) {
    emulated::multiply_tile_16(c, a, b, half_value);
}
static void multiply_tile_bfloat16(float c[4], const unsigned a[4], const unsigned b[2]) {
    emulated::multiply_tile_16(c, a, b, emulated::bfloat16_value);
}
