// Rows in half precision times the matrices of their experts, summed in float32 -> (row, used, out): a tile's rows are
// some of those that one expert has, wherever they lie.
//
// The grid is (outputs / 128, experts and one more, rows / ROWS), rounded up; a block without rows ends at once. The
// one expert more has what is left over, and gives zeros.
#include "tensor_product.cuh"

// AHEAD: steps between the start of a copy and its use. Three rings lie in shared memory: weights, rows, quants.
// While the products of a step run, copies for later ones start and the weights of the next are expanded.
// Of m are the rows from out0 on; copy_rows(tile, step, real) copies 64 columns of each row of the tile, finish(output,
// row, sum) takes what came out, both counted from the tile's first.
template <class Format, int OUTS, int ROWS, int AHEAD, class Rows, class Finish>
static __device__ __forceinline__ void product(const Matrix& m, int out0, int first, int steps, const Rows& copy_rows,
                                               const Finish& finish) {
    constexpr int HELD = OUTS * 128, STAGE = ROWS * 128, STAGES = AHEAD + 1;
    Weights<Format, OUTS> weights;
    Core<OUTS, ROWS> core;
    constexpr int TILES = weights.COPIED ? STAGES : 2;
    const SharedAt tiles = shared_at(aligned_1024(dynamic_shared_memory()));
    const SharedAt rows = tiles + TILES * HELD, queue = rows + STAGES * STAGE;
    const auto ask = [&](int step) {
        if constexpr (weights.QUEUED)
            weights.copy(m, queue + step % STAGES * weights.QUEUE, out0, first + min(step, steps - 1), step < steps);
    };
    const auto copy = [&](int step) {  // rows of a step, and quants of the next
        const int at = first + min(step, steps - 1);
        if constexpr (weights.COPIED) weights.copy(m, tiles + step % TILES * HELD, out0, at, step < steps);
        copy_rows(rows + step % STAGES * STAGE, at, step < steps);
        ask(step + 1);
        copies_end();
    };
    const auto prepare = [&](int step) {  // past the end it fills a free tile with columns that are never used
        weights.expand(tiles + step % TILES * HELD, queue + step % STAGES * weights.QUEUE);
        weights.fetch(m, out0, first + step + 1);
        copies_wait<AHEAD - 1>();
        stores_fence();
    };
    ask(0);
    copies_end();
    weights.fetch(m, out0, first);
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
    core.each(finish);
}

#define OUTS 128

struct ExpertTensorArgs {
    Matrix m;           // (expert * out, in)
    const void* x;      // halves (place / each, x_pitch) from tensor_halves
    const float* bias;  // (expert, bias_pitch) or null
    const int* order;   // (expert, rows) places row * used + slot of each, -1 behind the last; then what is left over
    float* out;         // (place, out)
    int rows;           // the most that an expert has
    int used;
    int each;           // places that share a row of x
    int x_pitch;
    int outs;           // of one expert
    int bias_pitch;
};

template <class Format, int ROWS, int AHEAD>
static __device__ __forceinline__ void tile(const ExpertTensorArgs& a) {
    __shared__ int places[ROWS];
    const int out0 = blockIdx.x * OUTS, expert = blockIdx.y, low = blockIdx.z * ROWS;
    const int* order = a.order + (long long)expert * a.rows;
    if (expert + 1 == gridDim.y) {
        for (int n = low; n < a.rows * a.used && order[n] >= 0; n += n % ROWS < ROWS - 1 ? 1 : (gridDim.z - 1) * ROWS + 1)
            for (int o = threadIdx.x; o < min(OUTS, a.outs - out0); o += blockDim.x)
                a.out[(long long)order[n] * a.outs + out0 + o] = 0.0f;
        return;
    }
    if (order[low] < 0) return;
    for (int r = threadIdx.x; r < ROWS; r += blockDim.x) places[r] = low + r < a.rows ? order[low + r] : -1;
    __syncthreads();
    const uint16_t* from[ROWS * 4 / OUTS];
#pragma unroll
    for (int j = 0; j < ROWS * 4 / OUTS; ++j) {
        const int i = threadIdx.x + j * 2 * OUTS, place = places[i / 8] < 0 ? places[0] : places[i / 8];
        from[j] = static_cast<const uint16_t*>(a.x) + (long long)(place / a.each) * a.x_pitch + i % 8 * 8;
    }
    const auto copy = [&](SharedAt tile, int step, bool real) {
#pragma unroll
        for (int j = 0; j < ROWS * 4 / OUTS; ++j) {
            const int i = threadIdx.x + j * 2 * OUTS, row = i / 8;
            copy_16(tile + row * 128 + ((i % 8 ^ row % 8) * 16), from[j] + step * 64, real ? 16 : 0);
        }
    };
    Matrix m = a.m;
    m.rows = (expert + 1) * a.outs;  // rows past the last repeat it
    product<Format, OUTS, ROWS, AHEAD>(m, expert * a.outs + out0, 0, a.x_pitch / 64, copy, [&](int o, int r, float sum) {
        o += out0;
        if (o >= a.outs || places[r] < 0) return;
        if (a.bias) sum += a.bias[expert * a.bias_pitch + o];
        a.out[(long long)places[r] * a.outs + o] = sum;
    });
}

template <class Format>
static __device__ __forceinline__ void tensor_experts_128(const ExpertTensorArgs& a) { tile<Format, 128, 2>(a); }
template <class Format>
static __device__ __forceinline__ void tensor_experts_64(const ExpertTensorArgs& a) { tile<Format, 64, 3>(a); }

// Two blocks of a multiprocessor: one expands weights while the other waits. Products of warps take more registers.
#if PRILL_WARPGROUP
#undef RESIDENT
#define RESIDENT 2
#endif
KERNELS(tensor_experts_128, ExpertTensorArgs, 256)
KERNELS(tensor_experts_64, ExpertTensorArgs, 256)
