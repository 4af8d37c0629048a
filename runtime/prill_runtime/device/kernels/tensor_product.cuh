// The parts of a tile of products of many rows in half precision, summed in float32: how its weights arrive, and who
// multiplies what. The loop over them is in tensor.cu, and for experts in tensor_experts.cu: with one text for both,
// nvcc 13 makes the dense one slower.
#pragma once

#include "tensor.cuh"

// Formats whose weights become halves without a float between, if `fits`: with the bits that rounding a float gives.
template <class Format>
struct Halves {
    static constexpr bool DIRECT = false;
};

template <>
struct Halves<MXFP4> {
    static constexpr bool DIRECT = true;
    // The scale is a half itself; else the sizes below 1 would be lost, or those above it too large.
    static __device__ __forceinline__ bool fits(const MXFP4::Raw& r) { return r.e >= 103 && r.e <= 142; }
    // Weights 8p to 8p + 7. Of a size as a half the lower byte is 0.
    static __device__ __forceinline__ uint4 eight(const MXFP4::Raw& r, int p) {
        const float d = 2.0f * MXFP4::scale(r);
        const unsigned words[4] = {r.q.x, r.q.y, r.q.z, r.q.w}, q = words[p], sizes = q & 0x77777777u;
        const unsigned scale = pack_halves(d, d), even = q << 4;
        unsigned out[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // pairs; bytes 1 and 3 of a word are upper ones
            const unsigned four = pick_bytes(0x3E3C3800u, 0x46444240u, sizes >> i / 2 * 16);
            const unsigned both = pick_bytes(four, 0u, i % 2 ? 0x3424u : 0x1404u);
            const unsigned signs = pick_bytes(even, q, (unsigned)(4 + i) << 12 | (unsigned)i << 4) & 0x80008000u;
            out[i] = multiply_halves(both | signs, scale);
        }
        return {out[0], out[1], out[2], out[3]};
    }
};

// How tiles of weights arrive. Halves are copied as they are. Quants of 16 bytes are queued: a thread copies its own,
// and expands them a step before they are multiplied.
// Columns past the last one repeat it: the rows of x hold zeros there.
template <class Format, int OUTS>
struct Weights {
    static constexpr bool COPIED = false, QUEUED = Format::N >= 16 && sizeof(Format::Raw::q) == 16;
    static constexpr int THREADS = 2 * OUTS, A_ROW = 64 / Format::N, EACH = OUTS * A_ROW / THREADS;
    static constexpr int QUEUE = QUEUED ? OUTS * A_ROW * 16 : 0;  // bytes of a step's quants as they lie in memory
    typename Format::Raw raw[EACH];

    static __device__ __forceinline__ int row_of(int j) { return (threadIdx.x + j * THREADS) / A_ROW; }
    static __device__ __forceinline__ int chunk_of(int j) { return (threadIdx.x + j * THREADS) % A_ROW; }
    __device__ __forceinline__ void copy(const Matrix& m, SharedAt to, int out0, int step, bool real) {
        if constexpr (QUEUED)
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                const long long row = min(out0 + row_of(j), m.rows - 1);
                copy_16(to + (threadIdx.x + j * THREADS) * 16,
                        static_cast<const uint4*>(m.q) + row * m.pitch + min(step * A_ROW + chunk_of(j), m.pitch - 1),
                        real ? 16 : 0);
            }
    }
    // Scales, high bits, and the quants unless they are queued (the compiler drops unused loads).
    __device__ __forceinline__ void fetch(const Matrix& m, int out0, int step) {
#pragma unroll
        for (int j = 0; j < EACH; ++j)
            raw[j] = Format::load(m, min(out0 + row_of(j), m.rows - 1), min(step * A_ROW + chunk_of(j), m.pitch - 1));
    }
    __device__ __forceinline__ void expand(SharedAt tile, SharedAt queued) {
        if constexpr (QUEUED)
#pragma unroll
            for (int j = 0; j < EACH; ++j) raw[j].q = load_16(queued + (threadIdx.x + j * THREADS) * 16);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int row = row_of(j), first = chunk_of(j) * Format::N;
            if constexpr (Halves<Format>::DIRECT) if (Halves<Format>::fits(raw[j])) {
#pragma unroll
                for (int p = 0; p < Format::N / 8; ++p)
                    store_16(tile + row * 128 + ((first / 8 + p ^ row % 8) * 16), Halves<Format>::eight(raw[j], p));
                continue;
            }
            float w[Format::N];
            Format::expand(raw[j], w);
            if constexpr (Format::N == 4) {
                const SharedAt to = tile + row * 128 + ((first / 8 ^ row % 8) * 16) + first % 8 * 2;
                store_8(to, {pack_halves(w[0], w[1]), pack_halves(w[2], w[3])});
            } else {
#pragma unroll
                for (int p = 0; p < Format::N / 8; ++p) {
                    const float* v = w + 8 * p;
                    store_16(tile + row * 128 + ((first / 8 + p ^ row % 8) * 16),
                             {pack_halves(v[0], v[1]), pack_halves(v[2], v[3]), pack_halves(v[4], v[5]),
                              pack_halves(v[6], v[7])});
                }
            }
        }
    }
};

template <int OUTS>
struct Weights<F16, OUTS> {
    static constexpr bool COPIED = true, QUEUED = false;
    static constexpr int QUEUE = 0;
    __device__ __forceinline__ void copy(const Matrix& m, SharedAt tile, int out0, int step, bool real) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int i = threadIdx.x + j * 2 * OUTS, row = i / 8, c = step * 8 + i % 8;
            const uint4* from = static_cast<const uint4*>(m.q) + (long long)min(out0 + row, m.rows - 1) * m.pitch;
            copy_16(tile + row * 128 + ((i % 8 ^ row % 8) * 16), from + min(c, m.pitch - 1), real ? 16 : 0);
        }
    }
    __device__ __forceinline__ void fetch(const Matrix&, int, int) {}
    __device__ __forceinline__ void expand(SharedAt, SharedAt) {}
};

// Warpgroups: 64 outputs each, by all rows. Products run until somebody waits for them.
template <int OUTS, int ROWS>
struct Groups {
    float d[ROWS / 2] = {};
    __device__ __forceinline__ void multiply(SharedAt weights, SharedAt rows) {
        __syncthreads();
        warpgroup_begin();
#pragma unroll
        for (int k = 0; k < 4; ++k)
            warpgroup_multiply<ROWS>(d, weights + threadIdx.x / 128 * 8192 + 32 * k, rows + 32 * k);
        warpgroup_end();
    }
    __device__ __forceinline__ void wait() { warpgroup_wait(); }
    template <class F>
    __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int i = 0; i < ROWS / 2; ++i) hold(d[i]);
        const int lane = threadIdx.x % 32, out = threadIdx.x / 32 * 16 + lane / 4, row = lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < ROWS / 2; ++i) f(out + i / 2 % 2 * 8, row + i / 4 * 8 + i % 2, d[i]);
    }
};

// Warps: each a part of the tile, fragment by fragment.
template <int OUTS, int ROWS>
struct Warps {
    static constexpr int ACROSS = ROWS >= 128 ? 4 : 2, DOWN = OUTS / 16 / ACROSS;
    static constexpr int HIGH = OUTS / DOWN, WIDE = ROWS / ACROSS, MS = HIGH / 16, NS = WIDE / 16;
    float d[MS][2 * NS][4] = {};
    __device__ __forceinline__ void multiply(SharedAt weights, SharedAt rows) {
        __syncthreads();
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        weights += (warp / ACROSS * HIGH + lane % 16) * 128;
        rows += (warp % ACROSS * WIDE + lane / 16 * 8 + lane % 8) * 128;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            unsigned left[MS][4], right[NS][4];
#pragma unroll
            for (int i = 0; i < MS; ++i)
                load_fragments(left[i], weights + i * 2048 + ((2 * k + lane / 16 ^ lane % 8) * 16));
#pragma unroll
            for (int j = 0; j < NS; ++j)
                load_fragments(right[j], rows + j * 2048 + ((2 * k + lane / 8 % 2 ^ lane % 8) * 16));
#pragma unroll
            for (int i = 0; i < MS; ++i)
#pragma unroll
                for (int j = 0; j < 2 * NS; ++j) multiply_fragments(d[i][j], left[i], right[j / 2] + j % 2 * 2);
        }
    }
    __device__ __forceinline__ void wait() {}
    template <class F>
    __device__ __forceinline__ void each(F f) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int out = warp / ACROSS * HIGH + lane / 4, row = warp % ACROSS * WIDE + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < MS; ++i)
#pragma unroll
            for (int j = 0; j < 2 * NS; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) f(out + i * 16 + e / 2 * 8, row + j * 8 + e % 2, d[i][j][e]);
    }
};

#if PRILL_WARPGROUP
template <int OUTS, int ROWS>
using Core = Groups<OUTS, ROWS>;
#else
template <int OUTS, int ROWS>
using Core = Warps<OUTS, ROWS>;
#endif
