// Rows of a tensor as they lie in a GGUF file -> aligned streams of chunks (formats.cuh).
//
// The blocks of a file are 17 to 210 bytes long, which forbids 16-byte loads; once per load, each thread takes one
// chunk's bytes from its block and writes them where the mat-vec kernels want them. Bits move, nothing is rounded:
// expanding the streams gives what quants.py gives, bit for bit.
#include "formats.cuh"

struct RepackArgs {
    const unsigned char* raw;  // rows, one after the other, as in the file
    void* q;
    void* h;
    void* s;
    void* d;
    int rows;       // of this piece
    int first;      // row of the matrix that the piece begins with
    int row_bytes;  // of a row in the file
    int pitch;      // chunks a row
};

static __device__ __forceinline__ unsigned word_at(const unsigned char* p) {
    return p[0] | p[1] << 8 | p[2] << 16 | (unsigned)p[3] << 24;
}

static __device__ __forceinline__ uint16_t half_at(const unsigned char* p) { return (uint16_t)(p[0] | p[1] << 8); }

static __device__ __forceinline__ uint4 quad_at(const unsigned char* p) {
    return {word_at(p), word_at(p + 4), word_at(p + 8), word_at(p + 12)};
}

// Third or fifth bits in order of weights -> bit 8b + w for byte b of word w.
static __device__ __forceinline__ unsigned interleaved(unsigned bits) {
    unsigned out = 0;
    for (int i = 0; i < 32; ++i) out |= (bits >> i & 1u) << (8 * (i % 4) + i / 4);
    return out;
}

// Runs f(source of the row, chunk of the row, chunk of the matrix) for this thread's chunk.
template <class F>
static __device__ __forceinline__ void each(const RepackArgs& a, F f) {
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= (long long)a.rows * a.pitch) return;
    const int row = (int)(n / a.pitch), c = (int)(n % a.pitch);
    f(a.raw + (long long)row * a.row_bytes, c, (long long)a.first * a.pitch + n);
}

// Runs f(the block, chunk of the block, chunk of the matrix) for this thread's chunk.
template <class Format, class F>
static __device__ __forceinline__ void each_of(const RepackArgs& a, F f) {
    each(a, [&](const unsigned char* row, int c, long long at) {
        f(row + c / Format::CHUNKS * Format::BYTES, c % Format::CHUNKS, at);
    });
}

KERNEL(repack_plain, RepackArgs, 256) {  // F32, F16, BF16: rows padded with zeros to whole chunks
    each(a, [&](const unsigned char* row, int c, long long at) {
        unsigned words[4] = {0, 0, 0, 0};
        for (int i = 0; i < 16 && c * 16 + i < a.row_bytes; ++i) words[i / 4] |= (unsigned)row[c * 16 + i] << 8 * (i % 4);
        static_cast<uint4*>(a.q)[at] = {words[0], words[1], words[2], words[3]};
    });
}

KERNEL(repack_q8_0, RepackArgs, 256) {
    using B = Q8_0_Block;
    each_of<B>(a, [&](const unsigned char* block, int c, long long at) {
        static_cast<uint4*>(a.q)[at] = quad_at(block + B::Q + c * 16);
        if (c == 0) static_cast<uint16_t*>(a.s)[at / B::CHUNKS] = half_at(block + B::D);
    });
}

// A block is one chunk of nibbles, as they lie, and one half.
template <class B>
static __device__ __forceinline__ void one_chunk(const RepackArgs& a) {
    each_of<B>(a, [&](const unsigned char* block, int c, long long at) {
        static_cast<uint4*>(a.q)[at] = quad_at(block + B::Q);
        static_cast<uint16_t*>(a.s)[at] = half_at(block + B::D);
    });
}

KERNEL(repack_q4_0, RepackArgs, 256) { one_chunk<Q4_0_Block>(a); }
KERNEL(repack_iq4_nl, RepackArgs, 256) { one_chunk<IQ4_NL_Block>(a); }

KERNEL(repack_q4_1, RepackArgs, 256) {
    using B = Q4_1_Block;
    each_of<B>(a, [&](const unsigned char* block, int c, long long at) {
        static_cast<uint4*>(a.q)[at] = quad_at(block + B::Q);
        static_cast<unsigned*>(a.s)[at] = word_at(block + B::D);
    });
}

KERNEL(repack_q5_0, RepackArgs, 256) {
    using B = Q5_0_Block;
    each_of<B>(a, [&](const unsigned char* block, int c, long long at) {
        static_cast<uint4*>(a.q)[at] = quad_at(block + B::Q);
        static_cast<unsigned*>(a.h)[at] = interleaved(word_at(block + B::H));
        static_cast<uint16_t*>(a.s)[at] = half_at(block + B::D);
    });
}

KERNEL(repack_q5_1, RepackArgs, 256) {
    using B = Q5_1_Block;
    each_of<B>(a, [&](const unsigned char* block, int c, long long at) {
        static_cast<uint4*>(a.q)[at] = quad_at(block + B::Q);
        static_cast<unsigned*>(a.h)[at] = interleaved(word_at(block + B::H));
        static_cast<unsigned*>(a.s)[at] = word_at(block + B::D);
    });
}

// Scale (low byte) and minimum (high byte) of group g of a block of 256, from 12 packed bytes.
static __device__ __forceinline__ uint16_t six_bits(const unsigned char* p, int g) {
    const int scale = g < 4 ? p[g] & 63 : (p[g + 4] & 15) | (p[g - 4] >> 6) << 4;
    const int minimum = g < 4 ? p[g + 4] & 63 : p[g + 4] >> 4 | (p[g] >> 6) << 4;
    return (uint16_t)(scale | minimum << 8);
}

// The 32 nibbles of group g, of which 32 bytes hold two groups, as a chunk.
static __device__ __forceinline__ uint4 regrouped(const unsigned char* q, int g) {
    const unsigned char* from = q + g / 2 * 32;
    const int shift = g % 2 * 4;
    unsigned words[4] = {0, 0, 0, 0};
    for (int i = 0; i < 16; ++i) {
        const unsigned both = (from[i] >> shift & 15u) | (from[i + 16] >> shift & 15u) << 4;
        words[i / 4] |= both << 8 * (i % 4);
    }
    return {words[0], words[1], words[2], words[3]};
}

KERNEL(repack_q4_k, RepackArgs, 256) {
    using B = Q4_K_Block;
    each_of<B>(a, [&](const unsigned char* block, int c, long long at) {
        static_cast<uint4*>(a.q)[at] = regrouped(block + B::Q, c);
        static_cast<uint16_t*>(a.s)[at] = six_bits(block + B::S, c);
        if (c == 0) static_cast<unsigned*>(a.d)[at / B::CHUNKS] = word_at(block + B::D);
    });
}

KERNEL(repack_q5_k, RepackArgs, 256) {
    using B = Q5_K_Block;
    each_of<B>(a, [&](const unsigned char* block, int c, long long at) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= (block[B::H + i] >> c & 1u) << i;
        static_cast<uint4*>(a.q)[at] = regrouped(block + B::Q, c);
        static_cast<unsigned*>(a.h)[at] = interleaved(bits);
        static_cast<uint16_t*>(a.s)[at] = six_bits(block + B::S, c);
        if (c == 0) static_cast<unsigned*>(a.d)[at / B::CHUNKS] = word_at(block + B::D);
    });
}

KERNEL(repack_q6_k, RepackArgs, 256) {
    using B = Q6_K_Block;
    each_of<B>(a, [&](const unsigned char* block, int c, long long at) {
        // 128 weights: 64 bytes of low nibbles (32 weights in each half of them), 32 bytes of upper bits.
        const int part = c % 4;
        const unsigned char* low = block + B::L + c / 4 * 64 + part % 2 * 32;
        const unsigned char* high = block + B::H + c / 4 * 32;
        unsigned words[4] = {0, 0, 0, 0}, upper[2] = {0, 0};
        for (int i = 0; i < 32; ++i) {
            const unsigned value = low[i] >> part / 2 * 4 & 15u, two = high[i] >> 2 * part & 3u;
            words[i % 16 / 4] |= value << (8 * (i % 4) + i / 16 * 4);
            upper[i / 16] |= two << (8 * (i % 4) + 2 * (i / 4 % 4));
        }
        static_cast<uint4*>(a.q)[at] = {words[0], words[1], words[2], words[3]};
        static_cast<uint2*>(a.h)[at] = {upper[0], upper[1]};
        static_cast<uint16_t*>(a.s)[at] = half_at(block + B::S + 2 * c);
        if (c == 0) static_cast<uint16_t*>(a.d)[at / B::CHUNKS] = half_at(block + B::D);
    });
}

// Two bits of the 32 weights of group g of a block of 256, of whose 64 bytes each holds four groups of its half.
static __device__ __forceinline__ uint2 two_bits_of(const unsigned char* q, int g) {
    unsigned halves[2] = {0, 0};
    for (int i = 0; i < 32; ++i)
        halves[i / 16] |= (q[g / 4 * 32 + i] >> 2 * (g % 4) & 3u) << (8 * (i % 4) + 2 * (i / 4 % 4));
    return {halves[0], halves[1]};
}

KERNEL(repack_q2_k, RepackArgs, 256) {
    using B = Q2_K_Block;
    each_of<B>(a, [&](const unsigned char* block, int c, long long at) {
        static_cast<uint2*>(a.q)[at] = two_bits_of(block + B::Q, c);
        static_cast<uint16_t*>(a.s)[at] = half_at(block + B::S + 2 * c);
        if (c == 0) static_cast<unsigned*>(a.d)[at / B::CHUNKS] = word_at(block + B::D);
    });
}

// The signed scale of group i of 16, from 12 packed bytes: eight of two low nibbles, four of four upper pairs of bits.
static __device__ __forceinline__ uint8_t signed_six_bits(const unsigned char* p, int i) {
    return (uint8_t)((p[i % 8] >> i / 8 * 4 & 15 | (p[8 + i % 4] >> i / 4 * 2 & 3) << 4) - 32);
}

KERNEL(repack_q3_k, RepackArgs, 256) {
    using B = Q3_K_Block;
    each_of<B>(a, [&](const unsigned char* block, int c, long long at) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= (block[B::H + i] >> c & 1u) << i;
        static_cast<uint2*>(a.q)[at] = two_bits_of(block + B::Q, c);
        static_cast<unsigned*>(a.h)[at] = interleaved(bits);
        static_cast<uint16_t*>(a.s)[at] =
            (uint16_t)(signed_six_bits(block + B::S, 2 * c) | signed_six_bits(block + B::S, 2 * c + 1) << 8);
        if (c == 0) static_cast<uint16_t*>(a.d)[at / B::CHUNKS] = half_at(block + B::D);
    });
}

KERNEL(repack_mxfp4, RepackArgs, 256) {
    using B = MXFP4_Block;
    each_of<B>(a, [&](const unsigned char* block, int, long long at) {
        unsigned words[4] = {0, 0, 0, 0};
        for (int i = 0; i < 32; ++i) words[i / 8] |= (block[B::Q + i % 16] >> i / 16 * 4 & 15u) << 4 * (i % 8);
        static_cast<uint4*>(a.q)[at] = {words[0], words[1], words[2], words[3]};
        static_cast<uint8_t*>(a.s)[at] = block[B::E];
    });
}

KERNEL(repack_iq4_xs, RepackArgs, 256) {
    using B = IQ4_XS_Block;
    each_of<B>(a, [&](const unsigned char* block, int c, long long at) {
        const int low = block[B::S + c / 2] >> c % 2 * 4 & 15, high = half_at(block + B::T) >> 2 * c & 3;
        static_cast<uint4*>(a.q)[at] = quad_at(block + B::Q + 16 * c);
        static_cast<uint16_t*>(a.s)[at] = (uint16_t)((low | high << 4) - 32);
        if (c == 0) static_cast<uint16_t*>(a.d)[at / B::CHUNKS] = half_at(block + B::D);
    });
}
