// Causal attention of one new row over one sequence's cache, for a captured graph: one launch.
//
// Block (split, kv_head) takes KEYS keys for all query heads that share them, GROUP at most, so that keys and values
// are read once, all of them at once; the block that finishes last joins the splits in their order, so that two runs
// are bit-equal. The grid covers the capacity; blocks past the sequence's length return at once.
#include "common.cuh"

#define THREADS 128
#define KEYS 32
#define GROUP 8
#define MOST_DIM 256
#define TILE KEYS

struct DecodeAttentionArgs {
    const Sequence* sequence;
    const float* q;      // (head, dim)
    float* partial;      // (head, split, dim + 4): mixture, maximum, sum, two unused
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

KERNEL(attention_decode, DecodeAttentionArgs, THREADS) {
    __shared__ float scores[GROUP][KEYS], tops[GROUP], totals[GROUP];
    __shared__ unsigned arrived;
    float4* q = reinterpret_cast<float4*>(dynamic_shared_memory());  // (group, dim)
    const int split = blockIdx.x, kv = blockIdx.y, dim = a.head_dim, quads = dim / 4, group = a.heads / a.kv_heads;
    float4* mixed = q + group * quads;  // (part, group, dim)
    wait_for_previous();
    let_next_start();
    const Sequence& s = *a.sequence;
    const int position = s.length;
    const int visible = a.window && position >= a.window ? position - a.window + 1 : 0;
    const int low = max(split * KEYS, visible), high = min(split * KEYS + KEYS, position + 1);
    if (low >= high) return;
    const long long at = ((long long)a.layer * a.kv_heads + kv) * s.capacity * quads;
    const float4* keys = reinterpret_cast<const float4*>(s.keys) + at;
    const float4* values = reinterpret_cast<const float4*>(s.values) + at;
    // Four lanes a key; later one thread a column of the values, every parts-th key.
    const int lane = threadIdx.x % 4, mine = threadIdx.x / 4, count = high - low;
    const int parts = min(THREADS / quads, KEYS), part = threadIdx.x / quads, column = threadIdx.x % quads;
    constexpr int PIECES = MOST_DIM / 16, HELD = 8;
    float4 key[PIECES], value[HELD];
#pragma unroll
    for (int n = 0; n < PIECES; ++n)
        if (mine < count && lane + 4 * n < quads) key[n] = keys[(long long)(low + mine) * quads + lane + 4 * n];
#pragma unroll
    for (int n = 0; n < HELD; ++n)
        if (part < parts && part + n * parts < count) value[n] = values[(long long)(low + part + n * parts) * quads + column];
    for (int i = threadIdx.x; i < group * quads; i += THREADS) q[i] = reinterpret_cast<const float4*>(a.q)[kv * group * quads + i];
    __syncthreads();
    for (int g = 0; g < group; ++g) {
        float dot = 0.0f;
#pragma unroll
        for (int n = 0; n < PIECES; ++n)
            if (mine < count && lane + 4 * n < quads) {
                const float4 x = q[g * quads + lane + 4 * n];
                dot += x.x * key[n].x + x.y * key[n].y + x.z * key[n].z + x.w * key[n].w;
            }
        dot += __shfl_xor_sync(0xFFFFFFFFu, dot, 2);
        dot += __shfl_xor_sync(0xFFFFFFFFu, dot, 1);
        if (lane == 0) scores[g][mine] = mine < count ? dot * a.scale : minus_infinity();
    }
    __syncthreads();
    for (int g = threadIdx.x / 32; g < group; g += THREADS / 32) {
        const float score = scores[g][threadIdx.x % 32];
        const float top = warp_max(score), weight = expf(score - top), total = warp_sum(weight);
        scores[g][threadIdx.x % 32] = weight;
        if (threadIdx.x % 32 == 0) tops[g] = top, totals[g] = total;
    }
    __syncthreads();
    if (part < parts) {
        float4 sum[GROUP] = {};
#pragma unroll
        for (int n = 0; n < KEYS; ++n) {
            const int j = part + n * parts;
            if (j >= count) break;
            const float4 v = n < HELD ? value[n < HELD ? n : 0] : values[(long long)(low + j) * quads + column];
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
        float* out = a.partial + ((long long)(kv * group + g) * a.splits + split) * (dim + 4);
        out[i % dim] = sum;
        if (i % dim == 0) out[dim] = tops[g], out[dim + 1] = totals[g];
    }
    __threadfence();
    __syncthreads();
    const int first = visible / KEYS, last = position / KEYS;
    if (threadIdx.x == 0) arrived = atomicAdd(a.counters + kv, 1u);
    __syncthreads();
    if ((int)arrived != last - first) return;
    __threadfence();
    if (threadIdx.x == 0) a.counters[kv] = 0;
    // The columns of the first splits are on their way while the weight of every split is computed for each head.
    const float* from = a.partial + (long long)kv * group * a.splits * (dim + 4);
    const auto column_of = [&](int i) {
        return reinterpret_cast<const float4*>(from + (long long)min(i / quads, group - 1) * a.splits * (dim + 4)) + i % quads;
    };
    const bool single = last - first < TILE;
#pragma unroll
    for (int n = 0; n < HELD; ++n)
        if (first + n <= last) value[n] = load_shared_by_blocks(column_of(threadIdx.x) + (long long)(first + n) * (quads + 1));
    for (int g = threadIdx.x / 32; g < group; g += THREADS / 32) {
        const float* parts = from + (long long)g * a.splits * (dim + 4) + dim;
        const int mine = first + threadIdx.x % 32;
        const float top0 = mine <= last ? load_shared_by_blocks(parts + (long long)mine * (dim + 4)) : minus_infinity();
        const float total0 = mine <= last ? load_shared_by_blocks(parts + (long long)mine * (dim + 4) + 1) : 0.0f;
        float top = top0;
        for (int n = mine + 32; n <= last; n += 32) top = fmaxf(top, load_shared_by_blocks(parts + (long long)n * (dim + 4)));
        top = warp_max(top);
        const float weight0 = expf(top0 - top);
        float total = weight0 * total0;
        for (int n = mine + 32; n <= last; n += 32)
            total += expf(load_shared_by_blocks(parts + (long long)n * (dim + 4)) - top) *
                     load_shared_by_blocks(parts + (long long)n * (dim + 4) + 1);
        total = warp_sum(total);
        scores[g][threadIdx.x % 32] = weight0;
        if (threadIdx.x % 32 == 0) tops[g] = top, totals[g] = total;
    }
    __syncthreads();
    for (int base = 0; base < group * quads; base += THREADS) {
        const int i = base + threadIdx.x, g = min(i / quads, group - 1);
        const float4* column = column_of(i);
        float4 joined = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int tile = first; tile <= last; tile += TILE) {
            if (!single) {
                __syncthreads();
                for (int k = threadIdx.x; k < group * TILE; k += THREADS) {
                    const int n = tile + k % TILE;
                    const float* part = from + ((long long)(k / TILE) * a.splits + n) * (dim + 4) + dim;
                    scores[k / TILE][k % TILE] = n <= last ? expf(load_shared_by_blocks(part) - tops[k / TILE]) : 0.0f;
                }
                __syncthreads();
            }
            const int begun = base == 0 && tile == first ? HELD : 0;
#pragma unroll
            for (int n = 0; n < HELD; ++n)
                if (n < begun && tile + n <= last) {
                    const float weight = scores[g][n];
                    joined.x += weight * value[n].x, joined.y += weight * value[n].y;
                    joined.z += weight * value[n].z, joined.w += weight * value[n].w;
                }
#pragma unroll 8
            for (int n = tile + begun; n < min(tile + TILE, last + 1); ++n) {
                const float weight = scores[g][n - tile];
                const float4 v = load_shared_by_blocks(column + (long long)n * (quads + 1));
                joined.x += weight * v.x, joined.y += weight * v.y, joined.z += weight * v.z, joined.w += weight * v.w;
            }
        }
        const float total = totals[g];
        if (i < group * quads)
            reinterpret_cast<float4*>(a.out)[kv * group * quads + i] = make_float4(joined.x / total, joined.y / total, joined.z / total, joined.w / total);
    }
}
