// What C++ has no operator for, as instructions: halves, and tensor cores, which begin with sm_75 (float16) and sm_80.
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

// C (16 x 8) += A (16 x 8) B (8 x 8) by a whole warp, sums in float32. Lane l holds, with g = l / 4 and t = l % 4,
// C(g + 8 (i / 2), 2 t + i % 2) in c[i]; in tf32 A(g + 8 (i % 2), t + 4 (i / 2)) in a[i] and B(t + 4 i, g) in b[i];
// with 16 bits A(g + 8 (i / 2), 2 t + i % 2) in a[i] and B(2 t + i, g) in b[i].
__device__ __forceinline__ unsigned tf32_bits(float x) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ void multiply_tile_tf32(float c[4], const float a[4], const float b[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(tf32_bits(a[0])), "r"(tf32_bits(a[1])), "r"(tf32_bits(a[2])), "r"(tf32_bits(a[3])),
          "r"(tf32_bits(b[0])), "r"(tf32_bits(b[1])));
}

__device__ __forceinline__ unsigned bfloat_pair(float low, float high) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ void multiply_tile_bfloat16(float c[4], const float a[4], const float b[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(bfloat_pair(a[0], a[1])), "r"(bfloat_pair(a[2], a[3])), "r"(bfloat_pair(b[0], b[1])));
}

__device__ __forceinline__ unsigned half_pair(float low, float high) {
    return half_bits(low) | (unsigned)half_bits(high) << 16;
}

__device__ __forceinline__ void multiply_tile_float16(float c[4], const float a[4], const float b[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(half_pair(a[0], a[1])), "r"(half_pair(a[2], a[3])), "r"(half_pair(b[0], b[1])));
}

#endif
