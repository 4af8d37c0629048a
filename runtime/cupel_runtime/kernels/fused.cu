// One dense stage of a decode step in one launch: RMSNorm, mat-vec, and what follows it.
//
// Every block normalises the activations for itself and lays them into shared memory, as float32 (exact) or as
// int8 with a scale for every 32 (fast); then each warp streams groups of four rows, the next chunk's loads in
// flight while this one is summed. Groups are dealt out over the multiprocessors first. What follows the product:
//   PLAIN    out[row] = sum + residual[row]
//   GATE_UP  rows of two matrices: out[row] = silu(gate) * up
//   QKV      rows of three matrices: q rotated, k rotated into the cache, v into the cache
// Sums have a fixed order: runs are bit-equal.
#include "formats.cuh"

#define ROWS 4
#define MOST 512
#define MOST_EXACT 256
#define PLAIN 0
#define GATE_UP 1
#define QKV 2

struct FusedArgs {
    Matrix m0;
    Matrix m1;
    Matrix m2;
    const float* x;          // (in,)
    const float* norm;       // (in,) weight of an RMSNorm over x, or null
    const float* residual;   // (out,) or null
    float* out;              // (out,); may be the residual itself
    const Sequence* sequence;
    const float2* angles;    // (pair,) of the position
    float eps;
    int mode;
    int layer;
    int head_dim;
    int kv_heads;
    int pairs;
};

struct Activations {
    unsigned char* planes;  // 16 bytes of a chunk's activations each, plane after plane
    float* scale;           // of 32 values
    float* sum;             // of their quants
};

// Shared memory: planes, scales, sums. FAST holds a value in one byte, else in four.
template <class Format, bool FAST>
static __device__ __forceinline__ Activations prepare(const FusedArgs& a) {
    __shared__ float shared[32];
    const int cols = a.m0.cols, pitch = a.m0.pitch;
    constexpr int planes = FAST ? Format::N / 16 : Format::N / 4;
    unsigned char* base = dynamic_shared_memory();
    Activations into;
    into.planes = base;
    into.scale = reinterpret_cast<float*>(base + 16 * planes * pitch);
    into.sum = into.scale + cols / 32;
    float root = 1.0f;
    if (a.norm) {
        float squares = 0.0f;
        for (int i = threadIdx.x; i < cols; i += blockDim.x) squares += a.x[i] * a.x[i];
        root = sqrtf(block_sum(squares, shared) / cols + a.eps);
    }
    if (FAST) {
        for (int low = 0; low < cols / 4; low += blockDim.x) {  // eight lanes a block of 32, all lanes in step
            const int i = low + threadIdx.x;
            const bool inside = i < cols / 4;
            float4 v = inside ? reinterpret_cast<const float4*>(a.x)[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (a.norm && inside) {
                const float4 w = reinterpret_cast<const float4*>(a.norm)[i];
                v.x = v.x / root * w.x, v.y = v.y / root * w.y, v.z = v.z / root * w.z, v.w = v.w / root * w.w;
            }
            float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
            for (int step = 4; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, step));
            const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
            const int q[4] = {__float2int_rn(v.x * inverse), __float2int_rn(v.y * inverse),
                              __float2int_rn(v.z * inverse), __float2int_rn(v.w * inverse)};
            int sum = q[0] + q[1] + q[2] + q[3];
            for (int step = 4; step; step >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
            if (!inside) continue;
            const int block = i / 8, j = i % 8;
            const int chunk = Format::N == 16 ? 2 * block + j / 4 : block, plane = Format::N == 16 ? 0 : j / 4;
            const unsigned word = (unsigned)(q[0] & 255) | (unsigned)(q[1] & 255) << 8 | (unsigned)(q[2] & 255) << 16 |
                                  (unsigned)q[3] << 24;
            reinterpret_cast<unsigned*>(into.planes)[(plane * pitch + chunk) * 4 + j % 4] = word;
            if (j == 0) into.scale[block] = most / 127.0f, into.sum[block] = (float)sum;
        }
    } else {
        for (int i = threadIdx.x; i < pitch * planes; i += blockDim.x) {
            float v[4];
            for (int k = 0; k < 4; ++k) {
                const int at = 4 * i + k;
                v[k] = at < cols ? a.x[at] : 0.0f;
                if (a.norm && at < cols) v[k] = v[k] / root * a.norm[at];
            }
            reinterpret_cast<float4*>(into.planes)[i % planes * pitch + i / planes] = make_float4(v[0], v[1], v[2], v[3]);
        }
    }
    __syncthreads();
    return into;
}

// The matrix and row that output row r of a group comes from.
static __device__ __forceinline__ const Matrix& source(const FusedArgs& a, int group, int r, int* row) {
    if (a.mode == GATE_UP) {
        *row = min(2 * group + r / 2, a.m0.rows - 1);
        return r % 2 ? a.m1 : a.m0;
    }
    int at = ROWS * group + r;
    const Matrix* m = &a.m0;
    if (a.mode == QKV && at >= m->rows) {
        at -= m->rows, m = &a.m1;
        if (at >= m->rows) at -= m->rows, m = &a.m2;
    }
    *row = min(at, m->rows - 1);
    return *m;
}

template <class Format, bool FAST>
static __device__ __forceinline__ void accumulate(const typename Format::Raw* raw, const Activations& x, int c, int pitch,
                                                  float* total) {
    constexpr int planes = FAST ? Format::N / 16 : Format::N / 4;
    if constexpr (FAST) {
        int words[Format::N / 4];
#pragma unroll
        for (int p = 0; p < planes; ++p) {
            const int4 four = reinterpret_cast<const int4*>(x.planes)[p * pitch + c];
            words[4 * p] = four.x, words[4 * p + 1] = four.y, words[4 * p + 2] = four.z, words[4 * p + 3] = four.w;
        }
        const int block = Format::N == 16 ? c / 2 : c;
        const float scale = x.scale[block], sum = x.sum[block];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) total[r] += scale * Format::dot(raw[r], words, sum);
    } else {
        float v[Format::N];
#pragma unroll
        for (int p = 0; p < planes; ++p) {
            const float4 four = reinterpret_cast<const float4*>(x.planes)[p * pitch + c];
            v[4 * p] = four.x, v[4 * p + 1] = four.y, v[4 * p + 2] = four.z, v[4 * p + 3] = four.w;
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float w[Format::N];
            Format::expand(raw[r], w);
#pragma unroll
            for (int i = 0; i < Format::N; ++i) total[r] += w[i] * v[i];
        }
    }
}

// Lane 8r of the warp gets the sum of total[r] over all lanes; six shuffles for the four of them.
static __device__ __forceinline__ float four_sums(const float* total) {
    const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
    float first = upper ? total[2] : total[0], second = upper ? total[3] : total[1];
    first += __shfl_xor_sync(0xFFFFFFFFu, upper ? total[0] : total[2], 16);
    second += __shfl_xor_sync(0xFFFFFFFFu, upper ? total[1] : total[3], 16);
    float sum = odd ? second : first;
    sum += __shfl_xor_sync(0xFFFFFFFFu, odd ? first : second, 8);
    for (int step = 4; step; step >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    return sum;
}

// Lane 8r holds the sum of row r of the group; `other` is the sum of the row beside it.
static __device__ __forceinline__ void finish(const FusedArgs& a, int group, float sum, float other) {
    const int r = threadIdx.x % 32 / 8;
    if (a.mode == GATE_UP) {
        const int row = 2 * group + r / 2;
        if (r % 2 == 0 && row < a.m0.rows) a.out[row] = sum / (1.0f + expf(-sum)) * other;
        return;
    }
    const int at = ROWS * group + r;
    if (a.mode == PLAIN) {
        if (at < a.m0.rows) a.out[at] = a.residual ? sum + a.residual[at] : sum;
        return;
    }
    const bool is_v = at >= a.m0.rows + a.m1.rows;
    const int row = at < a.m0.rows ? at : at - a.m0.rows - (is_v ? a.m1.rows : 0);
    if (at >= a.m0.rows + a.m1.rows + a.m2.rows) return;
    const int i = row % a.head_dim, pair = i / 2;
    if (!is_v && pair < a.pairs) {
        const float2 turn = a.angles[pair];
        sum = i % 2 ? other * turn.y + sum * turn.x : sum * turn.x - other * turn.y;
    }
    if (at < a.m0.rows) {
        a.out[at] = sum;
        return;
    }
    const Sequence& s = *a.sequence;
    if (s.length >= s.capacity) return;
    float* to = is_v ? s.values : s.keys;
    to[(((long long)a.layer * a.kv_heads + row / a.head_dim) * s.capacity + s.length) * a.head_dim + i] = sum;
}

template <class Format, bool FAST>
static __device__ __forceinline__ void fused(const FusedArgs& a) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int pitch = a.m0.pitch, stride = warps * gridDim.x;
    const int rows = a.mode == QKV ? a.m0.rows + a.m1.rows + a.m2.rows : a.m0.rows;
    const int groups = a.mode == GATE_UP ? (rows + 1) / 2 : (rows + ROWS - 1) / ROWS;
    const int steps = (pitch + 31) / 32;
    int group = warp * gridDim.x + blockIdx.x;
    const Matrix* m[ROWS];
    int at[ROWS];
    typename Format::Raw raw[ROWS];
    if (group < groups)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            m[r] = &source(a, group, r, &at[r]);
            raw[r] = Format::load(*m[r], at[r], min(lane, pitch - 1));
        }
    const Activations x = prepare<Format, FAST>(a);
    for (; group < groups; group += stride) {
        float total[ROWS] = {};
        for (int step = 0; step < steps; ++step) {
            const int c = step * 32 + lane;
            typename Format::Raw next[ROWS];
            const bool last = step + 1 == steps;
            if (last && group + stride < groups)
#pragma unroll
                for (int r = 0; r < ROWS; ++r) m[r] = &source(a, group + stride, r, &at[r]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) next[r] = Format::load(*m[r], at[r], min(last ? lane : c + 32, pitch - 1));
            if (c < pitch) accumulate<Format, FAST>(raw, x, c, pitch, total);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) raw[r] = next[r];
        }
        const float sum = four_sums(total), other = __shfl_xor_sync(0xFFFFFFFFu, sum, 8);
        if (lane % 8 == 0) finish(a, group, sum, other);
    }
}

template <class Format>
static __device__ __forceinline__ void fused_exact(const FusedArgs& a) { fused<Format, false>(a); }
template <class Format>
static __device__ __forceinline__ void fused_fast(const FusedArgs& a) { fused<Format, true>(a); }

KERNELS(fused_exact, FusedArgs, MOST_EXACT)
KERNELS_OF_BLOCKS(fused_fast, FusedArgs, MOST)
