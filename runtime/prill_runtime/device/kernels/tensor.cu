// x (row, in) in half precision times a matrix (out, in) transposed, summed in float32 -> (row, out), for many rows.
//
// A block computes a tile of OUTS outputs by ROWS rows: tiles of 64 columns pass through a ring of stages in shared
// memory, rows by copies that nobody waits for, weights likewise (halves) or expanded from their stream on the way.
// Blocks may share a tile, each summing some of the columns: a second kernel joins their sums in a fixed order.
// Names say outputs x rows of the tile; the grid is (rows / ROWS, outputs / OUTS, splits), rounded up, a block has
// 2 OUTS threads, and takes 193, 105 or 97 KiB of shared memory for tiles of 256, 128 or 64 rows.
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

template <int OUTS, int ROWS>
static __device__ __forceinline__ void copy_rows(const TensorArgs& a, SharedAt tile, int row0, int step, bool real) {
    const uint16_t* x = static_cast<const uint16_t*>(a.x) + step * 64;
#pragma unroll
    for (int j = 0; j < ROWS * 4 / OUTS; ++j) {
        const int i = threadIdx.x + j * 2 * OUTS, row = i / 8;
        copy_16(tile + row * 128 + ((i % 8 ^ row % 8) * 16),
                x + (long long)min(row0 + row, a.rows - 1) * a.x_pitch + i % 8 * 8, real ? 16 : 0);
    }
}

// AHEAD: steps between the start of a copy and its use. Three rings lie in shared memory: weights, rows, quants.
// While the products of a step run, copies for later ones start and the weights of the next are expanded.
template <class Format, int OUTS, int ROWS, int AHEAD>
static __device__ __forceinline__ void product(const TensorArgs& a) {
    constexpr int HELD = OUTS * 128, STAGE = ROWS * 128, STAGES = AHEAD + 1;
    Weights<Format, OUTS> weights;
    Core<OUTS, ROWS> core;
    constexpr int TILES = weights.COPIED ? STAGES : 2;
    const SharedAt tiles = shared_at(aligned_1024(dynamic_shared_memory()));
    const SharedAt rows = tiles + TILES * HELD, queue = rows + STAGES * STAGE;
    const int row0 = blockIdx.x * ROWS, out0 = blockIdx.y * OUTS, first = blockIdx.z * a.steps;
    const int steps = min(a.steps, a.x_pitch / 64 - first);  // at least one
    const auto ask = [&](int step) {
        if constexpr (weights.QUEUED)
            weights.copy(a.m, queue + step % STAGES * weights.QUEUE, out0, first + min(step, steps - 1), step < steps);
    };
    const auto copy = [&](int step) {  // rows of a step, and quants of the next
        const int at = first + min(step, steps - 1);
        if constexpr (weights.COPIED) weights.copy(a.m, tiles + step % TILES * HELD, out0, at, step < steps);
        copy_rows<OUTS, ROWS>(a, rows + step % STAGES * STAGE, row0, at, step < steps);
        ask(step + 1);
        copies_end();
    };
    const auto prepare = [&](int step) {  // past the end it fills a free tile with columns that are never used
        weights.expand(tiles + step % TILES * HELD, queue + step % STAGES * weights.QUEUE);
        weights.fetch(a.m, out0, first + step + 1);
        copies_wait<AHEAD - 1>();
        stores_fence();
    };
    ask(0);
    copies_end();
    weights.fetch(a.m, out0, first);
    for (int step = 0; step < AHEAD; ++step) copy(step);
    copies_wait<AHEAD>();
    prepare(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        core.multiply(tiles + step % TILES * HELD, rows + step % STAGES * STAGE);
        copy(step + AHEAD);
        prepare(step + 1);
        core.wait();
    }
    copies_wait<0>();
    const bool whole = gridDim.z == 1;
    float* out = a.out + (long long)blockIdx.z * a.rows * a.out_pitch;
    core.each([&](int o, int r, float sum) {
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
static __device__ __forceinline__ void tensor_128x256(const TensorArgs& a) { product<Format, 128, 256, 3>(a); }
template <class Format>
static __device__ __forceinline__ void tensor_128x128(const TensorArgs& a) { product<Format, 128, 128, 2>(a); }
template <class Format>
static __device__ __forceinline__ void tensor_128x64(const TensorArgs& a) { product<Format, 128, 64, 3>(a); }

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
