// Formats of few bits, as formats.cuh has the others: two bits and three, in groups of 16.
//
// Two bits of 32 weights take 8 bytes: those of weight i at bits 8(i % 4) + 2(i / 4 % 4) of half i / 16, the order
// that the upper bits of Q6_K have.
#pragma once

#include "formats.cuh"

// Two bits of weights 4i to 4i + 3 of a chunk, a byte each.
static __device__ __forceinline__ unsigned two_bits(const uint2& q, int i) {
    return (i < 4 ? q.x : q.y) >> 2 * (i % 4) & 0x03030303u;
}

struct Q2_K {
    static constexpr int N = 32;
    static constexpr bool WIDE = true;  // a chunk takes many registers
    struct Raw { uint2 q; unsigned dm; uint16_t s; };  // s: a group's scale in the low nibble, its minimum above
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {static_cast<const uint2*>(m.q)[at], static_cast<const unsigned*>(m.d)[at >> 3],
                static_cast<const uint16_t*>(m.s)[at]};
    }
    // Scale and minimum of the first 16 weights or the second: exact in float32, as are their products.
    static __device__ __forceinline__ float2 scales(const Raw& r, int half) {
        const int sm = r.s >> 8 * half;
        return make_float2(half_to_float((uint16_t)r.dm) * (float)(sm & 15),
                           half_to_float((uint16_t)(r.dm >> 16)) * (float)(sm >> 4 & 15));
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const float2 first = scales(r, 0), second = scales(r, 1);
#pragma unroll
        for (int i = 0; i < 8; ++i) spread(two_bits(r.q, i), w + 4 * i);
#pragma unroll
        for (int i = 0; i < 32; ++i) w[i] = (i < 16 ? first.x : second.x) * w[i] - (i < 16 ? first.y : second.y);
    }
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float) {
        float total = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 g = scales(r, half);
            int products = 0, sum = 0;
#pragma unroll
            for (int i = 4 * half; i < 4 * half + 4; ++i) {
                products = dp4a(two_bits(r.q, i), x[i], products);
                sum = dp4a(0x01010101, x[i], sum);
            }
            total += g.x * (float)products - g.y * (float)sum;
        }
        return total;
    }
};

struct Q3_K {
    static constexpr int N = 32;
    static constexpr bool WIDE = true;  // a chunk takes many registers
    struct Raw { uint2 q; unsigned h; uint16_t d; uint16_t s; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {static_cast<const uint2*>(m.q)[at], static_cast<const unsigned*>(m.h)[at],
                static_cast<const uint16_t*>(m.d)[at >> 3], static_cast<const uint16_t*>(m.s)[at]};
    }
    static __device__ __forceinline__ unsigned word(const Raw& r, int i) {
        return two_bits(r.q, i) | (r.h >> i & 0x01010101u) << 2;
    }
    static __device__ __forceinline__ float scale(const Raw& r, int half) {
        return half_to_float(r.d) * (float)(int8_t)(r.s >> 8 * half);
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const float first = scale(r, 0), second = scale(r, 1);
#pragma unroll
        for (int i = 0; i < 8; ++i) spread(word(r, i), w + 4 * i);
#pragma unroll
        for (int i = 0; i < 32; ++i) w[i] = (i < 16 ? first : second) * (w[i] - 4.0f);
    }
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float) {
        float total = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int products = 0, sum = 0;
#pragma unroll
            for (int i = 4 * half; i < 4 * half + 4; ++i) {
                products = dp4a(word(r, i), x[i], products);
                sum = dp4a(0x01010101, x[i], sum);
            }
            total += scale(r, half) * (float)(products - 4 * sum);
        }
        return total;
    }
};
