// Causal attention of new rows over one sequence's cache: keys split among blocks, then combined in order.
//
// Block (split, head, row) takes SPLIT keys: eight lanes a key for the scores, then one thread a component of
// the values. It writes the maximum, the sum and the unscaled mixture of its keys; the second kernel joins the
// splits in their order, so that two runs are bit-equal. The grid covers the capacity, blocks past the
// sequence's length return at once: the same launch serves every position of a captured graph.
#include "common.cuh"

#define SPLIT 128
#define THREADS 128

struct AttentionArgs {
    const Sequence* sequence;
    const float* q;  // (row, head, dim), rows q_pitch apart
    float* partial;  // (row, head, split, dim + 2): maximum, sum, mixture
    float* out;      // (row, head * dim)
    int heads;
    int kv_heads;
    int head_dim;
    int q_pitch;
    int layer;
    int splits;
    int window;      // keys a row sees, its own included; 0: all
    int first;       // row of the step that row 0 of this launch is
    float scale;
    float softcap;   // scores stay within it; 0: they are as they are
    const float* sinks;  // (head,): scores of no key; or null
};

static __device__ __forceinline__ int first_visible(const AttentionArgs& a, int position) {
    return a.window && position >= a.window ? position - a.window + 1 : 0;
}

KERNEL(attention_split, AttentionArgs, THREADS) {
    __shared__ float scores[SPLIT];
    __shared__ float shared[32];
    float* q = reinterpret_cast<float*>(dynamic_shared_memory());  // (dim,)
    const int split = blockIdx.x, head = blockIdx.y, row = blockIdx.z, dim = a.head_dim;
    const Sequence& s = *a.sequence;
    const int position = s.length + a.first + row;
    const int low = max(split * SPLIT, first_visible(a, position)), high = min(split * SPLIT + SPLIT, position + 1);
    if (low >= high) return;
    const long long at = ((long long)a.layer * a.kv_heads + head / (a.heads / a.kv_heads)) * s.capacity;
    const float* keys = s.keys + at * dim;
    const float* values = s.values + at * dim;
    for (int i = threadIdx.x; i < dim; i += THREADS) q[i] = a.q[(long long)row * a.q_pitch + head * dim + i];
    __syncthreads();
    const int lane = threadIdx.x % 8;
    float top = minus_infinity();
    for (int base = low; base < high; base += THREADS / 8) {  // the same rounds for every lane: shuffles inside
        const int j = base + threadIdx.x / 8;
        float dot = 0.0f;
        if (j < high)
            for (int i = lane; i < dim; i += 8) dot += q[i] * keys[(long long)j * dim + i];
        dot += __shfl_xor_sync(0xFFFFFFFFu, dot, 4);
        dot += __shfl_xor_sync(0xFFFFFFFFu, dot, 2);
        dot += __shfl_xor_sync(0xFFFFFFFFu, dot, 1);
        if (j < high) {
            dot *= a.scale;
            if (a.softcap != 0.0f) dot = a.softcap * tanhf(dot / a.softcap);
            if (lane == 0) scores[j - low] = dot;
            top = fmaxf(top, dot);
        }
    }
    top = block_max(top, shared);
    float sum = 0.0f;
    for (int j = threadIdx.x; j < high - low; j += THREADS) {
        const float weight = expf(scores[j] - top);
        scores[j] = weight;
        sum += weight;
    }
    sum = block_sum(sum, shared);
    float* out = a.partial + (((long long)row * a.heads + head) * a.splits + split) * (dim + 2);
    if (threadIdx.x == 0) out[0] = top, out[1] = sum;
    for (int i = threadIdx.x; i < dim; i += THREADS) {
        float mixed = 0.0f;
        for (int j = 0; j < high - low; ++j) mixed += scores[j] * values[(long long)(low + j) * dim + i];
        out[2 + i] = mixed;
    }
}

KERNEL(attention_combine, AttentionArgs, THREADS) {
    const int head = blockIdx.x, row = blockIdx.y, dim = a.head_dim;
    const int position = a.sequence->length + a.first + row;
    const int first = first_visible(a, position) / SPLIT, last = min(position / SPLIT, a.splits - 1);
    const float* parts = a.partial + ((long long)row * a.heads + head) * a.splits * (dim + 2);
    float top = minus_infinity(), sum = 0.0f;
    for (int s = first; s <= last; ++s) top = fmaxf(top, parts[s * (dim + 2)]);
    if (a.sinks) top = fmaxf(top, a.sinks[head]), sum = expf(a.sinks[head] - top);
    for (int s = first; s <= last; ++s) sum += expf(parts[s * (dim + 2)] - top) * parts[s * (dim + 2) + 1];
    for (int i = threadIdx.x; i < dim; i += THREADS) {
        float mixed = 0.0f;
        for (int s = first; s <= last; ++s) mixed += expf(parts[s * (dim + 2)] - top) * parts[s * (dim + 2) + 2 + i];
        a.out[((long long)row * a.heads + head) * dim + i] = mixed / sum;
    }
}
