// Weight formats as they lie in device memory, repacked into aligned streams: quants apart from scales.
//
// A chunk is what one lane takes at a time: N weights from one 16-byte load, plus its high bits and scales. How
// a block of each format lies in a file is made of quants.py: NAME_Block.
// Nibbles: byte j holds weight j (low) and weight j + 16 (high). Single bits: bit 8b + w is byte b of word w,
// word w holding weights 4w to 4w + 3; two upper bits likewise, at 8b + 2(w % 4) of half w / 4.
#pragma once

#include "common.cuh"
#include "formats_table.cuh"

struct Matrix {
    const void* q;   // 16 bytes a chunk: values, bytes or nibbles; 8 of two bits
    const void* h;   // high bits: 4 bytes a chunk (third or fifth bits), 8 bytes (two bits)
    const void* s;   // scales of a chunk
    const void* d;   // scales of a block of 256
    int rows;
    int cols;
    int pitch;       // chunks a row, the last one filled up with zeros
    int blocks;      // blocks of 256 a row
};

static __device__ __forceinline__ uint4 quants(const Matrix& m, long long chunk) {
    return load_once(static_cast<const uint4*>(m.q) + chunk);
}

static __device__ __forceinline__ void spread(unsigned word, float* out) {
    for (int b = 0; b < 4; ++b) out[b] = (float)(int)(word >> 8 * b & 255u);
}

// Values 0 to 15 of a chunk of nibbles: (32,) in order.
static __device__ __forceinline__ void nibbles(const uint4& q, float* out) {
    const unsigned words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        spread(words[w] & 0x0F0F0F0Fu, out + 4 * w);
        spread(words[w] >> 4 & 0x0F0F0F0Fu, out + 16 + 4 * w);
    }
}

static __device__ __forceinline__ void fifth(unsigned h, float* out) {
#pragma unroll
    for (int w = 0; w < 8; ++w)
#pragma unroll
        for (int b = 0; b < 4; ++b) out[4 * w + b] += (h >> (8 * b + w) & 1u) ? 16.0f : 0.0f;
}

struct F32 : F32_Block {
    struct Raw { uint4 q; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        return {quants(m, (long long)row * m.pitch + c)};
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        w[0] = __uint_as_float(r.q.x), w[1] = __uint_as_float(r.q.y);
        w[2] = __uint_as_float(r.q.z), w[3] = __uint_as_float(r.q.w);
    }
};

struct F16 : F16_Block {
    struct Raw { uint4 q; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        return {quants(m, (long long)row * m.pitch + c)};
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const unsigned words[4] = {r.q.x, r.q.y, r.q.z, r.q.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            w[2 * i] = half_to_float((uint16_t)words[i]), w[2 * i + 1] = half_to_float((uint16_t)(words[i] >> 16));
    }
};

struct BF16 : BF16_Block {
    struct Raw { uint4 q; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        return {quants(m, (long long)row * m.pitch + c)};
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const unsigned words[4] = {r.q.x, r.q.y, r.q.z, r.q.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            w[2 * i] = __uint_as_float(words[i] << 16), w[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    }
};

struct Q8_0 : Q8_0_Block {  // half a block: two neighbouring chunks share a scale
    struct Raw { uint4 q; uint16_t d; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {quants(m, at), static_cast<const uint16_t*>(m.s)[at >> 1]};
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const unsigned words[4] = {r.q.x, r.q.y, r.q.z, r.q.w};
        const float d = half_to_float(r.d);
#pragma unroll
        for (int i = 0; i < 16; ++i) w[i] = d * (float)(int8_t)(words[i / 4] >> 8 * (i % 4));
    }
    // Sum of weight times quantised activation (4 words), without the activation's scale.
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float) {
        const int sum = dp4a(r.q.w, x[3], dp4a(r.q.z, x[2], dp4a(r.q.y, x[1], dp4a(r.q.x, x[0], 0))));
        return half_to_float(r.d) * (float)sum;
    }
};

static __device__ __forceinline__ int dot_nibbles(const uint4& q, const int* x) {
    const unsigned words[4] = {q.x, q.y, q.z, q.w};
    int sum = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        sum = dp4a(words[w] & 0x0F0F0F0Fu, x[w], sum);
        sum = dp4a(words[w] >> 4 & 0x0F0F0F0Fu, x[w + 4], sum);
    }
    return sum;
}

static __device__ __forceinline__ int dot_five(const uint4& q, unsigned h, const int* x) {
    const unsigned words[4] = {q.x, q.y, q.z, q.w};
    int sum = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        sum = dp4a((words[w] & 0x0F0F0F0Fu) | (h >> w & 0x01010101u) << 4, x[w], sum);
        sum = dp4a((words[w] >> 4 & 0x0F0F0F0Fu) | (h >> (w + 4) & 0x01010101u) << 4, x[w + 4], sum);
    }
    return sum;
}

// The formats of 32 weights a chunk: `dot` gets the chunk's quantised activations (8 words) and their sum.
struct Q4_0 : Q4_0_Block {
    struct Raw { uint4 q; uint16_t d; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {quants(m, at), static_cast<const uint16_t*>(m.s)[at]};
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const float d = half_to_float(r.d);
        nibbles(r.q, w);
#pragma unroll
        for (int i = 0; i < 32; ++i) w[i] = d * (w[i] - 8.0f);
    }
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float sum) {
        return half_to_float(r.d) * ((float)dot_nibbles(r.q, x) - 8.0f * sum);
    }
};

struct Q4_1 : Q4_1_Block {
    struct Raw { uint4 q; unsigned dm; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {quants(m, at), static_cast<const unsigned*>(m.s)[at]};
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const float d = half_to_float((uint16_t)r.dm), m = half_to_float((uint16_t)(r.dm >> 16));
        nibbles(r.q, w);
#pragma unroll
        for (int i = 0; i < 32; ++i) w[i] = d * w[i] + m;
    }
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float sum) {
        const float d = half_to_float((uint16_t)r.dm), m = half_to_float((uint16_t)(r.dm >> 16));
        return d * (float)dot_nibbles(r.q, x) + m * sum;
    }
};

struct Q5_0 : Q5_0_Block {
    struct Raw { uint4 q; unsigned h; uint16_t d; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {quants(m, at), static_cast<const unsigned*>(m.h)[at], static_cast<const uint16_t*>(m.s)[at]};
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const float d = half_to_float(r.d);
        nibbles(r.q, w);
        fifth(r.h, w);
#pragma unroll
        for (int i = 0; i < 32; ++i) w[i] = d * (w[i] - 16.0f);
    }
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float sum) {
        return half_to_float(r.d) * ((float)dot_five(r.q, r.h, x) - 16.0f * sum);
    }
};

struct Q5_1 : Q5_1_Block {
    struct Raw { uint4 q; unsigned h; unsigned dm; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {quants(m, at), static_cast<const unsigned*>(m.h)[at], static_cast<const unsigned*>(m.s)[at]};
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const float d = half_to_float((uint16_t)r.dm), m = half_to_float((uint16_t)(r.dm >> 16));
        nibbles(r.q, w);
        fifth(r.h, w);
#pragma unroll
        for (int i = 0; i < 32; ++i) w[i] = d * w[i] + m;
    }
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float sum) {
        const float d = half_to_float((uint16_t)r.dm), m = half_to_float((uint16_t)(r.dm >> 16));
        return d * (float)dot_five(r.q, r.h, x) + m * sum;
    }
};

// Scale and minimum of a group of 32: d s and dmin m, each exact in float32.
static __device__ __forceinline__ float2 group_scales(unsigned dm, uint16_t sm) {
    return make_float2(half_to_float((uint16_t)dm) * (float)(sm & 255),
                       half_to_float((uint16_t)(dm >> 16)) * (float)(sm >> 8));
}

struct Q4_K : Q4_K_Block {
    struct Raw { uint4 q; unsigned dm; uint16_t sm; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {quants(m, at), static_cast<const unsigned*>(m.d)[at >> 3], static_cast<const uint16_t*>(m.s)[at]};
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const float2 g = group_scales(r.dm, r.sm);
        nibbles(r.q, w);
#pragma unroll
        for (int i = 0; i < 32; ++i) w[i] = g.x * w[i] - g.y;
    }
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float sum) {
        const float2 g = group_scales(r.dm, r.sm);
        return g.x * (float)dot_nibbles(r.q, x) - g.y * sum;
    }
};

struct Q5_K : Q5_K_Block {
    struct Raw { uint4 q; unsigned h; unsigned dm; uint16_t sm; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {quants(m, at), static_cast<const unsigned*>(m.h)[at], static_cast<const unsigned*>(m.d)[at >> 3],
                static_cast<const uint16_t*>(m.s)[at]};
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const float2 g = group_scales(r.dm, r.sm);
        nibbles(r.q, w);
        fifth(r.h, w);
#pragma unroll
        for (int i = 0; i < 32; ++i) w[i] = g.x * w[i] - g.y;
    }
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float sum) {
        const float2 g = group_scales(r.dm, r.sm);
        return g.x * (float)dot_five(r.q, r.h, x) - g.y * sum;
    }
};

struct Q6_K : Q6_K_Block {
    struct Raw { uint4 q; uint2 h; uint16_t d; uint16_t s; };
    static __device__ __forceinline__ Raw load(const Matrix& m, int row, int c) {
        const long long at = (long long)row * m.pitch + c;
        return {quants(m, at), static_cast<const uint2*>(m.h)[at], static_cast<const uint16_t*>(m.d)[at >> 3],
                static_cast<const uint16_t*>(m.s)[at]};
    }
    static __device__ __forceinline__ unsigned word(const Raw& r, int w) {
        const unsigned words[4] = {r.q.x, r.q.y, r.q.z, r.q.w};
        const unsigned low = (w < 4 ? words[w] : words[w - 4] >> 4) & 0x0F0F0F0Fu;
        return low | ((w < 4 ? r.h.x : r.h.y) >> 2 * (w % 4) & 0x03030303u) << 4;
    }
    static __device__ __forceinline__ float2 scales(const Raw& r) {
        const float d = half_to_float(r.d);
        return make_float2(d * (float)(int8_t)(r.s & 255), d * (float)(int8_t)(r.s >> 8));
    }
    static __device__ __forceinline__ void expand(const Raw& r, float* w) {
        const float2 g = scales(r);
#pragma unroll
        for (int i = 0; i < 8; ++i) spread(word(r, i), w + 4 * i);
#pragma unroll
        for (int i = 0; i < 32; ++i) w[i] = (i < 16 ? g.x : g.y) * (w[i] - 32.0f);
    }
    static __device__ __forceinline__ float dot(const Raw& r, const int* x, float) {
        const float2 g = scales(r);
        int first = 0, second = 0, ones = 0x01010101, a = 0, b = 0;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            first = dp4a(word(r, w), x[w], first);
            a = dp4a(ones, x[w], a);
            second = dp4a(word(r, w + 4), x[w + 4], second);
            b = dp4a(ones, x[w + 4], b);
        }
        return g.x * (float)(first - 32 * a) + g.y * (float)(second - 32 * b);
    }
};

#include "formats_low.cuh"

#define KERNELS(prefix, Args, threads)       \
    KERNELS_OF_VALUES(prefix, Args, threads) \
    KERNELS_OF_BLOCKS(prefix, Args, threads)
