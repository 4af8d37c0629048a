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
    for (int s = first; s <= last; ++s) sum += expf(parts[s * (dim + 2)] - top) * parts[s * (dim + 2) + 1];
    for (int i = threadIdx.x; i < dim; i += THREADS) {
        float mixed = 0.0f;
        for (int s = first; s <= last; ++s) mixed += expf(parts[s * (dim + 2)] - top) * parts[s * (dim + 2) + 2 + i];
        a.out[((long long)row * a.heads + head) * dim + i] = mixed / sum;
    }
}

#define KEYS 64
#define GROUP 8
#define MOST_DIM 256

struct DecodeAttentionArgs {
    const Sequence* sequence;
    const float* q;      // (head, dim)
    float* partial;      // (head, split, dim + 2)
    float* out;          // (head, dim)
    unsigned* counters;  // (kv_head,) zeros; left as zeros
    int heads;
    int kv_heads;
    int head_dim;        // a multiple of 4, at most MOST_DIM
    int layer;
    int splits;
    int window;
    float scale;
};

// One new row, its last one: block (split, kv_head) takes KEYS keys for all query heads that share them, GROUP at
// most, so that keys and values are read once; the block that finishes last joins the splits in their order.
KERNEL(attention_decode, DecodeAttentionArgs, THREADS) {
    __shared__ float scores[GROUP][KEYS], tops[GROUP], totals[GROUP];
    __shared__ unsigned arrived;
    float4* q = reinterpret_cast<float4*>(dynamic_shared_memory());  // (group, dim)
    const int split = blockIdx.x, kv = blockIdx.y, dim = a.head_dim, quads = dim / 4, group = a.heads / a.kv_heads;
    float4* mixed = q + group * quads;  // (part, group, dim)
    const Sequence& s = *a.sequence;
    const int position = s.length;
    const int visible = a.window && position >= a.window ? position - a.window + 1 : 0;
    const int low = max(split * KEYS, visible), high = min(split * KEYS + KEYS, position + 1);
    if (low >= high) return;
    const long long at = ((long long)a.layer * a.kv_heads + kv) * s.capacity * quads;
    const float4* keys = reinterpret_cast<const float4*>(s.keys) + at;
    const float4* values = reinterpret_cast<const float4*>(s.values) + at;
    for (int i = threadIdx.x; i < group * quads; i += THREADS) q[i] = reinterpret_cast<const float4*>(a.q)[kv * group * quads + i];
    __syncthreads();
    const int lane = threadIdx.x % 8, count = high - low;
    for (int base = 0; base < count; base += THREADS / 8) {
        const int j = base + threadIdx.x / 8;
        float4 key[MOST_DIM / 32];
#pragma unroll
        for (int n = 0; n < MOST_DIM / 32; ++n)
            if (j < count && lane + 8 * n < quads) key[n] = keys[(long long)(low + j) * quads + lane + 8 * n];
        for (int g = 0; g < group; ++g) {
            float dot = 0.0f;
#pragma unroll
            for (int n = 0; n < MOST_DIM / 32; ++n)
                if (j < count && lane + 8 * n < quads) {
                    const float4 x = q[g * quads + lane + 8 * n];
                    dot += x.x * key[n].x + x.y * key[n].y + x.z * key[n].z + x.w * key[n].w;
                }
            for (int step = 4; step; step >>= 1) dot += __shfl_xor_sync(0xFFFFFFFFu, dot, step);
            if (lane == 0 && j < count) scores[g][j] = dot * a.scale;
        }
    }
    __syncthreads();
    for (int g = threadIdx.x / 32; g < group; g += THREADS / 32) {
        const int one = threadIdx.x % 32, two = one + 32;
        const float first = one < count ? scores[g][one] : minus_infinity();
        const float second = two < count ? scores[g][two] : minus_infinity();
        const float top = warp_max(fmaxf(first, second));
        const float x = expf(first - top), y = expf(second - top);
        const float total = warp_sum(x + y);
        scores[g][one] = x, scores[g][two] = y;
        if (one == 0) tops[g] = top, totals[g] = total;
    }
    __syncthreads();
    const int parts = THREADS / quads, part = threadIdx.x / quads, column = threadIdx.x % quads;
    if (part < parts) {
        float4 sum[GROUP] = {};
        for (int j = part; j < count; j += parts) {
            const float4 v = values[(long long)(low + j) * quads + column];
#pragma unroll
            for (int g = 0; g < GROUP; ++g)
                if (g < group) {
                    const float w = scores[g][j];
                    sum[g].x += w * v.x, sum[g].y += w * v.y, sum[g].z += w * v.z, sum[g].w += w * v.w;
                }
        }
#pragma unroll
        for (int g = 0; g < GROUP; ++g)
            if (g < group) mixed[(part * group + g) * quads + column] = sum[g];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group * dim; i += THREADS) {
        const int g = i / dim;
        float sum = 0.0f;
        for (int p = 0; p < parts; ++p) sum += reinterpret_cast<const float*>(mixed)[p * group * dim + i];
        float* out = a.partial + ((long long)(kv * group + g) * a.splits + split) * (dim + 2);
        out[2 + i % dim] = sum;
        if (i % dim == 0) out[0] = tops[g], out[1] = totals[g];
    }
    __threadfence();
    __syncthreads();
    const int first = visible / KEYS, last = position / KEYS;
    if (threadIdx.x == 0) arrived = atomicAdd(a.counters + kv, 1u);
    __syncthreads();
    if ((int)arrived != last - first) return;
    __threadfence();
    if (threadIdx.x == 0) a.counters[kv] = 0;
    for (int i = threadIdx.x; i < group * dim; i += THREADS) {
        const int head = kv * group + i / dim;
        const volatile float* from = a.partial + (long long)head * a.splits * (dim + 2);
        float top = minus_infinity(), sum = 0.0f, value = 0.0f;
        for (int n = first; n <= last; ++n) top = fmaxf(top, from[n * (dim + 2)]);
        for (int n = first; n <= last; ++n) {
            const float weight = expf(from[n * (dim + 2)] - top);
            sum += weight * from[n * (dim + 2) + 1];
            value += weight * from[n * (dim + 2) + 2 + i % dim];
        }
        a.out[head * dim + i % dim] = value / sum;
    }
}
