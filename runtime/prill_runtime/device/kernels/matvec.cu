// x (row, in) times a matrix (out, in) transposed, plus a bias -> (row, out): float32 throughout.
//
// A block of up to four warps shares ROWS output rows; its threads split the columns, so that a thread loads its
// activations once for all of them, and four independent 16-byte loads are in flight. Sums go through shuffles and
// shared memory in a fixed order.
#include "formats.cuh"

#define ROWS 4
#define THREADS 128

struct MatvecArgs {
    Matrix m;
    const float* x;         // (row, in)
    const float* bias;      // (out,) or null
    float* out;             // (row, out)
};

template <class Format>
static __device__ __forceinline__ void matvec(const MatvecArgs& a) {
    __shared__ float sums[ROWS][THREADS / 32];
    const int low = blockIdx.x * ROWS;
    const float* x = a.x + (long long)blockIdx.y * a.m.cols;
    float total[ROWS] = {};
    for (int c = threadIdx.x; c < a.m.pitch; c += blockDim.x) {
        typename Format::Raw raw[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) raw[r] = Format::load(a.m, min(low + r, a.m.rows - 1), c);
        float v[Format::N];
        const int at = c * Format::N;
        if (a.m.cols % 4 == 0 && at + Format::N <= a.m.cols) {
#pragma unroll
            for (int i = 0; i < Format::N; i += 4) {
                const float4 four = *reinterpret_cast<const float4*>(x + at + i);
                v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < Format::N; ++i) v[i] = at + i < a.m.cols ? x[at + i] : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float w[Format::N];
            Format::expand(raw[r], w);
#pragma unroll
            for (int i = 0; i < Format::N; ++i) total[r] += w[i] * v[i];
        }
    }
    const float sum = four_sums(total);
    if (threadIdx.x % 8 == 0) sums[threadIdx.x % 32 / 8][threadIdx.x / 32] = sum;
    __syncthreads();
    const int row = low + threadIdx.x;
    if (threadIdx.x >= ROWS || row >= a.m.rows) return;
    float y = sums[threadIdx.x][0];
    for (int w = 1; w < blockDim.x / 32; ++w) y += sums[threadIdx.x][w];
    const long long to = (long long)blockIdx.y * a.m.rows + row;
    if (a.bias) y += a.bias[row];
    a.out[to] = y;
}

KERNELS(matvec, MatvecArgs, THREADS)
