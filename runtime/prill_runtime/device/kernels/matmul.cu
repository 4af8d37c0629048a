// x (row, in) times a matrix (out, in) transposed, plus a bias -> (row, out), for many rows: float32 throughout.
//
// A block of 16 x 16 threads computes 64 rows by 64 outputs, each thread 4 by 4 of them; tiles of 32 columns pass
// through shared memory, the weights expanded on the way.
#include "formats.cuh"

#define TILE 64
#define DEPTH 32

struct MatmulArgs {
    Matrix m;
    const float* x;     // (row, in)
    const float* bias;  // (out,) or null
    float* out;         // (row, out)
    int rows;
};

template <class Format>
static __device__ __forceinline__ void matmul(const MatmulArgs& a) {
    __shared__ float left[DEPTH][TILE + 4], right[DEPTH][TILE + 4];
    const int thread = threadIdx.x, ty = thread / 16, tx = thread % 16;
    const int row0 = blockIdx.y * TILE, out0 = blockIdx.x * TILE;
    float sum[4][4] = {};
    for (int k0 = 0; k0 < a.m.cols; k0 += DEPTH) {
        __syncthreads();
        for (int i = thread; i < TILE * DEPTH; i += 256) {
            const int row = row0 + i / DEPTH, k = k0 + i % DEPTH;
            left[i % DEPTH][i / DEPTH] = row < a.rows && k < a.m.cols ? a.x[(long long)row * a.m.cols + k] : 0.0f;
        }
        constexpr int chunks = DEPTH / Format::N;
        for (int i = thread; i < TILE * chunks; i += 256) {
            const int n = i / chunks, c = k0 / Format::N + i % chunks;
            float w[Format::N] = {};
            if (out0 + n < a.m.rows && c < a.m.pitch) Format::expand(Format::load(a.m, out0 + n, c), w);
#pragma unroll
            for (int j = 0; j < Format::N; ++j) right[i % chunks * Format::N + j][n] = w[j];
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            const float4 l = *reinterpret_cast<const float4*>(&left[k][4 * ty]);
            const float4 r = *reinterpret_cast<const float4*>(&right[k][4 * tx]);
            const float ls[4] = {l.x, l.y, l.z, l.w}, rs[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][j] += ls[i] * rs[j];
        }
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const int row = row0 + 4 * ty + i, n = out0 + 4 * tx + j;
            if (row < a.rows && n < a.m.rows)
                a.out[(long long)row * a.m.rows + n] = sum[i][j] + (a.bias ? a.bias[n] : 0.0f);
        }
}

KERNELS(matmul, MatmulArgs, 256)
