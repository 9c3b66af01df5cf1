// What C++ has no operator for, as instructions: halves, and tensor cores, which have these with sm_80.
// Stands before every other file.
// The tests build the same files as C++ for the CPU and bring functions of their own in place of these.

enum { FINITE = 0x7FFFFFFF };  // in place of an index: all numbers are finite

#ifdef DISTCONV_EMULATED

inline float times(float a, float b) { return a * b; }
inline float plus(float a, float b) { return a + b; }

#else

// The bits of the half nearest to x, ties to even.
__device__ __forceinline__ unsigned short half_bits(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// a b and a + b, rounded once, with numbers below 2^-126 as they are: CuPy has the compiler take those for zero.
__device__ __forceinline__ float times(float a, float b) {
    float x;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
}

__device__ __forceinline__ float plus(float a, float b) {
    float x;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
}

// The number that a half stands for, exactly.
__device__ __forceinline__ float half_value(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// x rounded to what a tensor core takes in tf32: the upper 19 bits.
__device__ __forceinline__ float to_tf32(float x) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

// C (16 x 8) += A (16 x 8) B (8 x 8) by a whole warp, sums in float32; of A and B only the upper 19 bits count. Lane l
// holds, with g = l / 4 and t = l % 4, C(g + 8 (i / 2), 2 t + i % 2) in c[i], A(g + 8 (i % 2), t + 4 (i / 2)) in a[i] and
// B(t + 4 i, g) in b[i].
__device__ __forceinline__ void multiply_tile_tf32(float c[4], const float a[4], const float b[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// Two numbers as 16 bits each, rounded.
__device__ __forceinline__ unsigned bfloat_pair(float low, float high) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ unsigned half_pair(float low, float high) {
    unsigned bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// C (16 x 8) += A (16 x 16) B (16 x 8) in 16 bits, c as above. The lane holds pairs along the depth, of numbers 4 t and
// 4 t + 1, then 4 t + 2 and 4 t + 3: in even places of a those of row g of A, in odd ones those of row g + 8, in b those
// of column g of B. (The instruction has 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 there; as the order of the depth is the same
// for A and B, it does not matter.)
#define MULTIPLY_TILE(name, kind)                                                                                      \
    __device__ __forceinline__ void name(float c[4], const unsigned a[4], const unsigned b[2]) {                       \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." kind "." kind ".f32 "                                             \
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                                    \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                           \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                       \
    }
MULTIPLY_TILE(multiply_tile_bfloat16, "bf16")
MULTIPLY_TILE(multiply_tile_float16, "f16")

#endif
