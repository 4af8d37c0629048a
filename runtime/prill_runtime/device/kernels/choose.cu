// A row of logits -> the most probable id, ties to the lowest, with its logprob; then the sequence moves on.
//
// Every block reduces a part of the vocabulary; the one that arrives last joins the parts in order, writes id and
// logprob into the ring the host reads, and sets token and length for the next replay. Sums are in float64.
#include "common.cuh"

#define THREADS 256

struct ChooseArgs {
    const float* logits;   // (vocab,)
    double* partial;       // (block, 4): maximum, id, sum of exp(x - maximum), values that are not finite
    unsigned* arrived;     // blocks that are done with their part; 0 between launches
    Sequence* sequence;
    int* position;         // the next position, for embeddings and angles
    int* ids;              // (ring,)
    double* logprobs;      // (ring,)
    int vocab;
    int ring;
};

struct Best {
    double value;
    int id;
};

static __device__ __forceinline__ void take_better(Best& b, double value, int id) {
    if (value > b.value || (value == b.value && id < b.id)) b = {value, id};
}

// The best of a block, in every thread; `best` holds one of each warp.
static __device__ __forceinline__ Best block_best(Best b, Best* best) {
    for (int step = 16; step; step >>= 1) {
        const double value = __shfl_xor_sync(0xFFFFFFFFu, b.value, step);
        take_better(b, value, __shfl_xor_sync(0xFFFFFFFFu, b.id, step));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = b;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; ++w) take_better(b, best[w].value, best[w].id);
    return b;
}

KERNEL(choose, ChooseArgs, THREADS) {
    __shared__ Best best[THREADS / 32];
    __shared__ double sums[THREADS / 32];
    __shared__ unsigned arrived;
    wait_for_previous();
    const int each = (a.vocab + gridDim.x - 1) / gridDim.x, low = blockIdx.x * each, high = min(low + each, a.vocab);
    Best top = {minus_infinity(), 0x7FFFFFFF};
    double sum = 0.0, wrong = 0.0;
    for (int i = low + threadIdx.x; i < high; i += THREADS) {
        const float x = a.logits[i];
        wrong += (__float_as_uint(x) & INFINITY_BITS) == INFINITY_BITS;
        if (x > top.value) top = {x, i};
    }
    top = block_best(top, best);
    for (int i = low + threadIdx.x; i < high; i += THREADS) sum += exp((double)a.logits[i] - top.value);
    sum = block_sum(sum, sums);
    wrong = block_sum(wrong, sums);
    if (threadIdx.x == 0) {
        double* out = a.partial + 4 * blockIdx.x;
        out[0] = top.value, out[1] = top.id, out[2] = low < high ? sum : 0.0, out[3] = wrong;
        __threadfence();
        arrived = atomicAdd(a.arrived, 1u);
    }
    __syncthreads();
    if (arrived != gridDim.x - 1) return;
    __threadfence();
    const double none = minus_infinity();
    const bool mine = threadIdx.x < gridDim.x;
    const double* part = a.partial + 4 * threadIdx.x;
    const auto load = [&](int field) { return load_shared_by_blocks(part + field); };
    top = {mine ? load(0) : none, mine ? (int)load(1) : 0x7FFFFFFF};
    const double own = mine ? load(2) : 0.0, its = top.value;
    top = block_best(top, best);
    sum = block_sum(own > 0.0 ? own * exp(its - top.value) : 0.0, sums);
    wrong = block_sum(mine ? load(3) : 0.0, sums);
    if (threadIdx.x) return;
    const int id = top.id < a.vocab ? top.id : 0;  // no finite logit: keep the next replay's lookup in range
    Sequence& s = *a.sequence;
    *a.arrived = 0;
    a.ids[s.step % a.ring] = wrong > 0.0 ? NOT_FINITE : id;
    a.logprobs[s.step % a.ring] = -log(sum);
    s.token = id;
    s.step += 1;
    s.length += 1;
    *a.position = s.offset + s.length;
}
