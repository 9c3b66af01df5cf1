// STEP neighbouring numbers or bytes of memory at once: those of a float4 begin at a multiple of 16 bytes.

template <int STEP>
__device__ __forceinline__ void load(const float *from, float *to) {
    if constexpr (STEP == 4) {
        float4 four = *reinterpret_cast<const float4 *>(from);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else if constexpr (STEP == 2) {
        float2 two = *reinterpret_cast<const float2 *>(from);
        to[0] = two.x, to[1] = two.y;
    } else {
        to[0] = from[0];
    }
}

template <int STEP>
__device__ __forceinline__ void load_words(const float *from, unsigned *to) {
    float words[STEP];
    load<STEP>(from, words);
    for (int i = 0; i < STEP; i++) to[i] = __float_as_uint(words[i]);
}

template <int STEP>
__device__ __forceinline__ void put(float *to, const float *from) {
    if constexpr (STEP == 4)
        *reinterpret_cast<float4 *>(to) = make_float4(from[0], from[1], from[2], from[3]);
    else if constexpr (STEP == 2)
        *reinterpret_cast<float2 *>(to) = make_float2(from[0], from[1]);
    else
        to[0] = from[0];
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

template <int STEP>
__device__ __forceinline__ void put_bytes(unsigned char *to, const unsigned char *from) {
    if constexpr (STEP == 4)
        *reinterpret_cast<uchar4 *>(to) = make_uchar4(from[0], from[1], from[2], from[3]);
    else
        to[0] = from[0];
}
