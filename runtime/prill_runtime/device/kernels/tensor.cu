// x (row, in) in half precision times a matrix (out, in) transposed, summed in float32 -> (row, out), for many rows.
//
// Blocks may share a tile, each summing some of the columns: a second kernel joins their sums in a fixed order.
// Names say outputs x rows of the tile; the grid is (rows / ROWS, outputs / OUTS, splits), rounded up.
#include "tensor_product.cuh"

struct TensorArgs {
    Matrix m;
    const void* x;          // halves (row, x_pitch) from tensor_halves
    const float* bias;      // (out,) or null
    const float* residual;  // (row, out_pitch) or null
    float* out;             // (row, out_pitch); of several splits (split, row, out): to be joined
    int rows;
    int x_pitch;            // halves a row: columns, filled up with zeros to a multiple of 64
    int out_pitch;
    int steps;              // tiles of 64 columns that one split takes
};

template <class Format, int OUTS, int ROWS, int AHEAD>
static __device__ __forceinline__ void tile(const TensorArgs& a) {
    const int row0 = blockIdx.x * ROWS, out0 = blockIdx.y * OUTS, first = blockIdx.z * a.steps;
    const int steps = min(a.steps, a.x_pitch / 64 - first);  // at least one
    const auto copy = [&](SharedAt tile, int step, bool real) {
        const uint16_t* x = static_cast<const uint16_t*>(a.x) + step * 64;
#pragma unroll
        for (int j = 0; j < ROWS * 4 / OUTS; ++j) {
            const int i = threadIdx.x + j * 2 * OUTS, row = i / 8;
            copy_16(tile + row * 128 + ((i % 8 ^ row % 8) * 16),
                    x + (long long)min(row0 + row, a.rows - 1) * a.x_pitch + i % 8 * 8, real ? 16 : 0);
        }
    };
    const bool whole = gridDim.z == 1;
    float* out = a.out + (long long)blockIdx.z * a.rows * a.out_pitch;
    product<Format, OUTS, ROWS, AHEAD>(a.m, out0, first, steps, copy, [&](int o, int r, float sum) {
        o += out0, r += row0;
        if (o >= a.m.rows || r >= a.rows) return;
        const long long at = (long long)r * a.out_pitch + o;
        if (whole && a.bias) sum += a.bias[o];
        // Nobody passes a residual, but without the branch nvcc 13 makes code a quarter shorter and a tenth slower.
        if (whole && a.residual) sum += a.residual[at];
        out[at] = sum;
    });
}

template <class Format>
static __device__ __forceinline__ void tensor_128x256(const TensorArgs& a) { tile<Format, 128, 256, 3>(a); }
template <class Format>
static __device__ __forceinline__ void tensor_128x128(const TensorArgs& a) { tile<Format, 128, 128, 2>(a); }
template <class Format>
static __device__ __forceinline__ void tensor_128x64(const TensorArgs& a) { tile<Format, 128, 64, 3>(a); }

KERNELS(tensor_128x256, TensorArgs, 256)
KERNELS(tensor_128x128, TensorArgs, 256)
KERNELS(tensor_128x64, TensorArgs, 256)

struct JoinArgs {
    const float* sums;      // (split, row, out)
    const float* bias;      // (out,) or null
    float* out;             // (row, out)
    long long count;        // rows times outputs
    int outs;
    int splits;
};

KERNEL(tensor_join, JoinArgs, 256) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.count) return;
    float sum = a.sums[i];
    for (int s = 1; s < a.splits; ++s) sum += a.sums[s * a.count + i];
    if (a.bias) sum += a.bias[i % a.outs];
    a.out[i] = sum;
}

struct HalvesArgs {
    const float* x;  // (row, in), rows `pitch` apart
    void* out;       // halves (row, out_pitch), zeros past `in`
    int rows;
    int cols;
    int pitch;
    int out_pitch;   // a multiple of 8
};

KERNEL(tensor_halves, HalvesArgs, 256) {
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int pieces = a.out_pitch / 8;
    if (n >= (long long)a.rows * pieces) return;
    const int row = (int)(n / pieces), first = (int)(n % pieces) * 8;
    const float* x = a.x + (long long)row * a.pitch;
    float v[8];
    for (int i = 0; i < 8; ++i) v[i] = first + i < a.cols ? x[first + i] : 0.0f;
    static_cast<uint4*>(a.out)[n] = {pack_halves(v[0], v[1]), pack_halves(v[2], v[3]), pack_halves(v[4], v[5]),
                                     pack_halves(v[6], v[7])};
}
