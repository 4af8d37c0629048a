// A row of logits -> the most probable id, ties to the lowest, with its logprob; then the sequence moves on.
//
// Blocks of the first kernel reduce a part of the vocabulary each; the second joins them in order, writes id and
// logprob into the ring the host reads, and sets token and length for the next replay. Sums are in float64.
#include "common.cuh"

struct ChooseArgs {
    const float* logits;   // (vocab,)
    double* partial;       // (part, 4): maximum, id, sum of exp(x - maximum), values that are not finite
    Sequence* sequence;
    int* position;         // the next position, for embeddings and angles
    int* ids;              // (ring,)
    float* logprobs;       // (ring,)
    int vocab;
    int parts;             // blocks of the first kernel
    int ring;
};

KERNEL(choose_parts, ChooseArgs, 256) {
    __shared__ float tops[256];
    __shared__ int ids[256];
    __shared__ double sums[32];
    __shared__ int wrongs[32];
    wait_for_previous();
    const int each = (a.vocab + a.parts - 1) / a.parts, low = blockIdx.x * each, high = min(low + each, a.vocab);
    float top = minus_infinity();
    int id = 0x7FFFFFFF, wrong = 0;
    for (int i = low + threadIdx.x; i < high; i += 256) {
        const float x = a.logits[i];
        wrong += (__float_as_uint(x) & INFINITY_BITS) == INFINITY_BITS;
        if (x > top) top = x, id = i;
    }
    tops[threadIdx.x] = top, ids[threadIdx.x] = id;
    for (unsigned step = 128; step; step >>= 1) {
        __syncthreads();
        if (threadIdx.x < step) {
            const float other = tops[threadIdx.x + step];
            const int its = ids[threadIdx.x + step];
            if (other > tops[threadIdx.x] || (other == tops[threadIdx.x] && its < ids[threadIdx.x]))
                tops[threadIdx.x] = other, ids[threadIdx.x] = its;
        }
    }
    __syncthreads();
    top = tops[0];
    double sum = 0.0;
    for (int i = low + threadIdx.x; i < high; i += 256) sum += exp((double)a.logits[i] - top);
    sum = block_sum(sum, sums);
    wrong = block_sum(wrong, wrongs);
    if (threadIdx.x == 0) {
        double* out = a.partial + 4 * blockIdx.x;
        out[0] = top, out[1] = ids[0], out[2] = low < high ? sum : 0.0, out[3] = wrong;
    }
}

KERNEL(choose_join, ChooseArgs, 32) {
    wait_for_previous();
    double top = minus_infinity(), id = 0x7FFFFFFF, sum = 0.0, wrong = 0.0;
    for (int p = threadIdx.x; p < a.parts; p += 32) {
        const double* part = a.partial + 4 * p;
        if (part[0] > top || (part[0] == top && part[1] < id)) top = part[0], id = part[1];
        wrong += part[3];
    }
    for (int step = 16; step; step >>= 1) {
        const double other = __shfl_xor_sync(0xFFFFFFFFu, top, step), its = __shfl_xor_sync(0xFFFFFFFFu, id, step);
        if (other > top || (other == top && its < id)) top = other, id = its;
    }
    for (int p = threadIdx.x; p < a.parts; p += 32)
        if (a.partial[4 * p + 2] > 0.0) sum += a.partial[4 * p + 2] * exp(a.partial[4 * p] - top);
    sum = warp_sum(sum);
    wrong = warp_sum(wrong);
    if (threadIdx.x) return;
    if (!(id < a.vocab)) id = 0.0;  // no logit was a number: `bad` tells, and the next replay must not read astray
    Sequence& s = *a.sequence;
    a.ids[s.step % a.ring] = (int)id;
    a.logprobs[s.step % a.ring] = (float)-log(sum);
    s.token = (int)id;
    s.step += 1;
    s.length += 1;
    s.bad += wrong > 0.0;
    *a.position = s.offset + s.length;
}
