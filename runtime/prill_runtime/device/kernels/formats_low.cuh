// Formats of few bits, as formats.cuh has the others: two and three bits in groups of 16, and four-bit floats.
//
// Two bits of 32 weights take 8 bytes: those of weight i at bits 8(i % 4) + 2(i / 4 % 4) of half i / 16, the order
// that the upper bits of Q6_K have. Four-bit floats lie in order: nibble k of word w holds weight 8w + k.
#pragma once

#include "formats.cuh"

// Two bits of weights 4i to 4i + 3 of a chunk, a byte each.
static __device__ __forceinline__ unsigned two_bits(const uint2& q, int i) {
    return (i < 4 ? q.x : q.y) >> 2 * (i % 4) & 0x03030303u;
}

struct Q2_K : Q2_K_Block {
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

struct Q3_K : Q3_K_Block {
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

struct MXFP4 : MXFP4_Block {
    static constexpr int ZERO = 12;     // what twelve more than twice an E2M1 number is for 0
    struct Raw { uint4 q; uint8_t e; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {quants(m, at), static_cast<const uint8_t*>(m.s)[at]};
    }
    // 2^(e - 128), half of what e stands for; subnormal for 0 and 1.
    static __device__ __forceinline__ float scale(const Raw& r) {
        return __uint_as_float(r.e < 2 ? 0x00200000u << r.e : (unsigned)(r.e - 1) << 23);
    }
    // Twice the sizes of the weights whose four codes are given, a byte each; 0 for those with the sign bit.
    static __device__ __forceinline__ unsigned sizes(unsigned codes) {
        return pick_bytes(0x03020100u, 0x0C080604u, codes);  // 0 1 2 3 4 6 8 12
    }
    static __device__ __forceinline__ unsigned codes(const Raw& r, int i) {
        const unsigned words[4] = {r.q.x, r.q.y, r.q.z, r.q.w};
        return words[i / 2] >> 16 * (i % 2);
    }
    // Weights 4i to 4i + 3 in a byte each, from 0 to 24.
    static __device__ __forceinline__ unsigned word(const Raw& r, int i) {
        return ZERO * 0x01010101u + sizes(codes(r, i)) - sizes(codes(r, i) ^ 0x8888u);
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const float d = scale(r);
#pragma unroll
        for (int i = 0; i < 8; ++i) spread(word(r, i), w + 4 * i);
#pragma unroll
        for (int i = 0; i < 32; ++i) w[i] = d * (w[i] - (float)ZERO);
    }
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float) {
        int more = 0, less = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            more = dp4a(sizes(codes(r, i)), x[i], more);
            less = dp4a(sizes(codes(r, i) ^ 0x8888u), x[i], less);
        }
        return scale(r) * (float)(more - less);
    }
};

// Four codes of four bits, a byte each, as the signed levels they stand for: -127 -104 -83 -65 -49 -35 -22 -10 1 13 25
// 38 53 69 89 113.
static __device__ __forceinline__ unsigned levels(unsigned codes) {
    unsigned out = 0;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
        const unsigned code = codes >> 8 * b & 15u;
        const unsigned lower = code & 4u ? 0xF6EADDCFu : 0xBFAD9881u, upper = code & 4u ? 0x71594535u : 0x26190D01u;
        out |= ((code & 8u ? upper : lower) >> 8 * (code & 3u) & 255u) << 8 * b;
    }
    return out;
}

static __device__ __forceinline__ unsigned level_word(const uint4& q, int i) {
    const unsigned words[4] = {q.x, q.y, q.z, q.w};
    return levels(i < 4 ? words[i] : words[i - 4] >> 4);
}

static __device__ __forceinline__ void expand_levels(const uint4& q, float d, float* w) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const unsigned four = level_word(q, i);
#pragma unroll
        for (int b = 0; b < 4; ++b) w[4 * i + b] = d * (float)(int8_t)(four >> 8 * b);
    }
}

static __device__ __forceinline__ int dot_levels(const uint4& q, const int* x) {
    int products = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) products = dp4a((int)level_word(q, i), x[i], products);
    return products;
}

struct IQ4_NL : IQ4_NL_Block {
    struct Raw { uint4 q; uint16_t d; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {quants(m, at), static_cast<const uint16_t*>(m.s)[at]};
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) { expand_levels(r.q, half_to_float(r.d), w); }
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float) {
        return half_to_float(r.d) * (float)dot_levels(r.q, x);
    }
};

struct IQ4_XS : IQ4_XS_Block {
    struct Raw { uint4 q; uint16_t d; uint16_t s; };  // s: signed, a group's
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {quants(m, at), static_cast<const uint16_t*>(m.d)[at >> 3], static_cast<const uint16_t*>(m.s)[at]};
    }
    static __device__ __forceinline__ float scale(const Raw& r) { return half_to_float(r.d) * (float)(int16_t)r.s; }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) { expand_levels(r.q, scale(r), w); }
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float) {
        return scale(r) * (float)dot_levels(r.q, x);
    }
};
