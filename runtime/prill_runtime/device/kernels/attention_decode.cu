// Causal attention of one new row over one sequence's cache, for a captured graph: one launch.
//
// A cluster of blocks takes one kv_head, for all query heads that share it, so that keys and values are read once.
// Its warps share the keys evenly, each with a softmax of its own over its keys; then every block joins its warps,
// sends the result to the cluster's first block, and that one joins the blocks. All joins have a fixed order: runs
// are bit-equal. Older keys and values do not change within a step, and the kernel before this one started after
// every earlier one had ended: they are fetched before the wait.
//
// Where heads have norms, queries and the new key come as they were projected, and are normalised and turned on their
// way in: no kernel before this one has whole heads. The warp that has the new key puts it back into the cache.
#include "common.cuh"

#define CLUSTER 8
#ifdef PRILL_EMU
#define THREADS 64
#else
#define THREADS 256
#endif
#define WARPS (THREADS / 32)

struct DecodeAttentionArgs {
    const Sequence* sequence;
    const float* q;      // (head, dim)
    float* out;          // (head, dim)
    int kv_heads;
    int group;           // query heads of a kv_head
    int head_dim;        // a multiple of 4
    int layer;
    int window;
    float scale;
    const float* sinks;  // (head,): scores of no key; or null
    const unsigned char* ahead0;  // what a launch after the next one reads first, or null
    const unsigned char* ahead1;
    int ahead_bytes;              // of each, a multiple of 16
    float softcap;                // scores stay within it; 0: there is none
    int original;                 // beta ln(1 + position / original) more of every score, where there is a beta
    float beta;
    const float* q_norm;          // (dim,) weights of an RMSNorm of each head, or null: heads come whole
    const float* k_norm;
    const float2* angles;         // (pair,) of the position, for heads with norms
    float eps;
    int pairs;
    int neox;                     // pairs are (i, i + pairs), not (2i, 2i + 1)
};

// Lanes p of eight neighbours share `count` values: each gets the sums over the eight of its own share of them, the
// count / 8 from p * count / 8 on, or one that 8 / count lanes have.
template <int COUNT>
static __device__ __forceinline__ void shared_sums(float* v) {
    int count = COUNT;
#pragma unroll
    for (int step = 4; step; step >>= 1) {
        if (count == 1) {
            v[0] += __shfl_xor_sync(0xFFFFFFFFu, v[0], step);
            continue;
        }
        count /= 2;
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i)
            if (i < count) {
                const float sent = upper ? v[i] : v[i + count];
                v[i] = (upper ? v[i + count] : v[i]) + __shfl_xor_sync(0xFFFFFFFFu, sent, step);
            }
    }
}

// What every block reads of a sequence before the wait, past the first-level cache.
static __device__ __forceinline__ Sequence sequence_of(const Sequence* from) {
    const uint4 words[2] = {load_shared_by_blocks(reinterpret_cast<const uint4*>(from)),
                            load_shared_by_blocks(reinterpret_cast<const uint4*>(from) + 1)};
    Sequence s = {};
    memcpy(&s, words, sizeof words);
    return s;
}

// The factors that bring sums with these maxima to one maximum, which is returned; nothing has none.
template <int COUNT>
static __device__ __forceinline__ float common_scale(const float* tops, int pitch, float* factors) {
    float best = minus_infinity();
#pragma unroll
    for (int n = 0; n < COUNT; ++n) factors[n] = tops[n * pitch], best = fmaxf(best, factors[n]);
#pragma unroll
    for (int n = 0; n < COUNT; ++n) factors[n] = factors[n] == minus_infinity() ? 0.0f : expf(factors[n] - best);
    return best;
}

// Attention leaves the memory's bandwidth idle: meanwhile every block asks for its share of the weights ahead.
static __device__ __forceinline__ void ask_ahead(const DecodeAttentionArgs& a) {
    constexpr int PIECE = 16 << 10;
    const int blocks = gridDim.x * gridDim.y, block = blockIdx.y * gridDim.x + blockIdx.x;
    for (int n = threadIdx.x * blocks + block; n * PIECE < a.ahead_bytes; n += THREADS * blocks) {
        const int at = n * PIECE, bytes = min(PIECE, a.ahead_bytes - at);
        ask_for(a.ahead0 + at, bytes);
        ask_for(a.ahead1 + at, bytes);
    }
}

// A head, normalised and turned by a warp: `from` is another kernel's, past the first-level cache, and may be `to`.
// What is turned no further is in pairs too. `also` is another place for it, or null.
template <int COLUMNS>
static __device__ __forceinline__ void enter(const DecodeAttentionArgs& a, const float* weight, const float* from,
                                             float* to, float* also) {
    const int lane = threadIdx.x % 32, half = a.head_dim / 2;
    float2 x[2 * COLUMNS];
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < 2 * COLUMNS; ++n) {
        const int i = 32 * n + lane;
        const bool apart = a.neox && i < a.pairs;
        x[n] = i < half ? make_float2(load_shared_by_blocks(from + (apart ? i : 2 * i)),
                                      load_shared_by_blocks(from + (apart ? i + a.pairs : 2 * i + 1)))
                        : make_float2(0.0f, 0.0f);
        squares += x[n].x * x[n].x + x[n].y * x[n].y;
    }
    const float scale = 1.0f / sqrtf(warp_sum(squares) / a.head_dim + a.eps);
#pragma unroll
    for (int n = 0; n < 2 * COLUMNS; ++n) {
        const int i = 32 * n + lane;
        if (i >= half) continue;
        const bool turns = i < a.pairs, apart = a.neox && turns;
        const int first = apart ? i : 2 * i, second = apart ? i + a.pairs : 2 * i + 1;
        float u = x[n].x * scale * weight[first], v = x[n].y * scale * weight[second];
        if (turns) {
            const float2 turn = a.angles[i];
            const float old = u;
            u = old * turn.x - v * turn.y, v = old * turn.y + v * turn.x;
        }
        to[first] = u, to[second] = v;
        if (also) also[first] = u, also[second] = v;
    }
}

// G: query heads of the kv_head, rounded up to a power of two; what the heads too many compute is not used.
// COLUMNS: of four components, that one lane has of a row of values.
template <int G, int COLUMNS>
static __device__ __forceinline__ void decode(const DecodeAttentionArgs& a) {
    constexpr int TILE = 16 / COLUMNS;  // keys of a warp at a time
    constexpr int VALUES = TILE / 4 * G, OWN = VALUES < 8 ? 1 : VALUES / 8, KEYS = TILE / 4;
    constexpr int APART = G < WARPS ? G : WARPS;  // heads that warps join at a time
    const int dim = a.head_dim, quads = dim / 4, group = a.group, kv = blockIdx.y, rank = blockIdx.x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float4* tiles = reinterpret_cast<float4*>(dynamic_shared_memory());  // (warp, 2, TILE, quad)
    float4* q = tiles + WARPS * 2 * TILE * quads;                        // (G, quad)
    float* weights = reinterpret_cast<float*>(q + G * quads);            // (warp, TILE + 1, G)
    float* tops = weights + WARPS * (TILE + 1) * G;                      // (warp, G)
    float* totals = tops + WARPS * G;                                    // (warp, G)
    float* got_tops = totals + WARPS * G;                                // (CLUSTER, G), in the first block
    float* got_totals = got_tops + CLUSTER * G;                          // (CLUSTER, G)
    float* got = got_totals + CLUSTER * G;                               // (CLUSTER, G, dim)
    float4* keys = tiles + warp * 2 * TILE * quads;
    float4* values = keys + TILE * quads;
    weights += warp * (TILE + 1) * G;

    cluster_arrive();
    const Sequence s = sequence_of(a.sequence);
    const int position = min(s.length, s.capacity - 1), visible = a.window ? max(position - a.window + 1, 0) : 0;
    const int share = (position - visible) / (CLUSTER * WARPS) + 1;
    const int low = visible + (rank * WARPS + warp) * share, high = min(low + share, position + 1);
    const long long at = ((long long)a.layer * a.kv_heads + kv) * s.capacity * quads;
    const auto copy = [&](int from, int to, int into, bool with_keys = true) {
        const float4* k = reinterpret_cast<const float4*>(s.keys) + at + (long long)from * quads;
        const float4* v = reinterpret_cast<const float4*>(s.values) + at + (long long)from * quads;
        for (int i = lane; i < (to - from) * quads; i += 32) {
            if (with_keys) copy_piece(keys + into * quads + i, k + i);
            copy_piece(values + into * quads + i, v + i);
        }
    };
    copy(low, min(min(low + TILE, high), position), 0);
    wait_for_previous();
    let_next_start();
    const bool newest = low <= position && position < high, at_once = newest && position < low + TILE;
    const bool enters = a.k_norm && s.length < s.capacity;  // else nothing was put into the cache
    if (a.q_norm) {
        for (int g = warp; g < group; g += WARPS)
            enter<COLUMNS>(a, a.q_norm, a.q + (kv * group + g) * dim, reinterpret_cast<float*>(q + g * quads), nullptr);
    } else {
        for (int i = threadIdx.x; i < group * quads; i += THREADS)
            copy_piece(q + i, reinterpret_cast<const float4*>(a.q) + kv * group * quads + i);
    }
    ask_ahead(a);
    if (newest && enters) {
        float* key = s.keys + (at + (long long)position * quads) * 4;
        enter<COLUMNS>(a, a.k_norm, key, key, at_once ? reinterpret_cast<float*>(keys + (position - low) * quads) : nullptr);
    }
    if (at_once) copy(position, position + 1, position - low, !enters);
    copies_done();
    __syncthreads();

    const float scale = a.beta ? a.scale * (1.0f + a.beta * logf(1.0f + (float)((s.offset + s.length) / a.original)))
                               : a.scale;
    // Eight lanes a key, KEYS keys a lane; then a lane holds the scores of key `own` and heads `head` on.
    constexpr int EACH = 8 / KEYS;  // lanes, of eight, that hold the scores of one key
    const int p = lane % 8, own = lane / 8 + p / EACH * 4, head = p % EACH * G / EACH;
    // Rows of values: 8, 16 or 32 lanes each, so that 4, 2 or 1 are read at a time.
    const int bits = quads > 16 ? 0 : quads > 8 ? 1 : 2, slice = lane >> (5 - bits), column = lane & ((32 >> bits) - 1);
    float top[OWN], total[OWN];
    float4 sum[G][COLUMNS];
#pragma unroll
    for (int i = 0; i < OWN; ++i) top[i] = minus_infinity(), total[i] = 0.0f;
#pragma unroll
    for (int g = 0; g < G; ++g)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) sum[g][c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int tile = low; tile < high; tile += TILE) {
        const int count = min(TILE, high - tile);
        if (tile != low) {
            copy(tile, tile + count, 0);
            copies_done();
            __syncwarp();
        }
        float v[VALUES] = {};
#pragma unroll
        for (int n = 0; n < 4 * COLUMNS; ++n)
            if (8 * n + p < quads) {
                float4 x[G];
#pragma unroll
                for (int g = 0; g < G; ++g) x[g] = q[g * quads + 8 * n + p];
#pragma unroll
                for (int k = 0; k < KEYS; ++k)
                    if (4 * k < count) {
                        const float4 key = keys[(lane / 8 + 4 * k) * quads + 8 * n + p];
#pragma unroll
                        for (int g = 0; g < G; ++g)
                            v[k * G + g] += x[g].x * key.x + x[g].y * key.y + x[g].z * key.z + x[g].w * key.w;
                    }
            }
        shared_sums<VALUES>(v);
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            float score = v[i] * scale;
            if (a.softcap) score = a.softcap * tanhf(score / a.softcap);
            if (own >= count) score = minus_infinity();
            float best = score;
#pragma unroll
            for (int step = 16; step >= EACH; step >>= 1) best = fmaxf(best, __shfl_xor_sync(0xFFFFFFFFu, best, step));
            best = fmaxf(best, top[i]);
            const float weight = expf(score - best), shrink = expf(top[i] - best);
            top[i] = best, total[i] = total[i] * shrink + weight;
            weights[own * G + head + i] = weight;
            if (lane < EACH) weights[TILE * G + head + i] = shrink;
        }
        __syncwarp();
        if (tile != low) {
#pragma unroll
            for (int g = 0; g < G; ++g)
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const float shrink = weights[TILE * G + g];
                    sum[g][c].x *= shrink, sum[g][c].y *= shrink, sum[g][c].z *= shrink, sum[g][c].w *= shrink;
                }
        }
        const int mine = (count - slice + (1 << bits) - 1) >> bits;  // of the tile's values
#pragma unroll 4
        for (int n = 0; n < mine; ++n) {
            const int j = (n << bits) + slice;
            float w[G];
#pragma unroll
            for (int g = 0; g < G; ++g) w[g] = weights[j * G + g];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
                if (column + 32 * c < quads) {
                    const float4 value = values[j * quads + column + 32 * c];
#pragma unroll
                    for (int g = 0; g < G; ++g) {
                        sum[g][c].x += w[g] * value.x, sum[g][c].y += w[g] * value.y;
                        sum[g][c].z += w[g] * value.z, sum[g][c].w += w[g] * value.w;
                    }
                }
        }
        __syncwarp();
    }

    // The warp's sums take the place of its keys and values: (slice, G, quad).
#pragma unroll
    for (int g = 0; g < G; ++g)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            if (column + 32 * c < quads) keys[(slice * G + g) * quads + column + 32 * c] = sum[g][c];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        for (int step = 16; step >= EACH; step >>= 1) total[i] += __shfl_xor_sync(0xFFFFFFFFu, total[i], step);
        if (lane < EACH) tops[warp * G + head + i] = top[i], totals[warp * G + head + i] = total[i];
    }
    __syncthreads();
    cluster_wait();
    for (int g = warp % APART; g < group; g += APART) {
        float factors[WARPS], all = 0.0f;
        const float best = common_scale<WARPS>(tops + g, G, factors);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) all += factors[w] * totals[w * G + g];
        if (lane == 0 && warp < APART) {
            *in_block(got_tops + rank * G + g, 0) = best;
            *in_block(got_totals + rank * G + g, 0) = all;
        }
        for (int c = warp / APART * 32 + lane; c < dim; c += 32 * (WARPS / APART)) {
            float mixed = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float* part = reinterpret_cast<const float*>(tiles + w * 2 * TILE * quads) + g * dim + c;
                float slices = part[0];
#pragma unroll
                for (int n = 1; n < 4; ++n)
                    if (n < 1 << bits) slices += part[n * G * dim];
                mixed += factors[w] * slices;
            }
            *in_block(got + (rank * G + g) * dim + c, 0) = mixed;
        }
    }
    cluster_arrive();
    if (rank) return;
    cluster_wait();
    for (int g = warp % APART; g < group; g += APART) {
        float factors[CLUSTER], all = 0.0f, shrink = 1.0f;
        const float best = common_scale<CLUSTER>(got_tops + g, G, factors);
#pragma unroll
        for (int b = 0; b < CLUSTER; ++b) all += factors[b] * got_totals[b * G + g];
        if (a.sinks) {
            const float sink = a.sinks[kv * group + g], top = fmaxf(best, sink);
            shrink = expf(best - top), all = all * shrink + expf(sink - top);
        }
        for (int c = warp / APART * 32 + lane; c < dim; c += 32 * (WARPS / APART)) {
            float mixed = 0.0f;
#pragma unroll
            for (int b = 0; b < CLUSTER; ++b) mixed += factors[b] * got[(b * G + g) * dim + c];
            a.out[(kv * group + g) * dim + c] = mixed * shrink / all;
        }
    }
}

CLUSTER_KERNEL(attention_decode_1, DecodeAttentionArgs, THREADS, CLUSTER) { decode<1, 1>(a); }
CLUSTER_KERNEL(attention_decode_2, DecodeAttentionArgs, THREADS, CLUSTER) { decode<2, 1>(a); }
CLUSTER_KERNEL(attention_decode_4, DecodeAttentionArgs, THREADS, CLUSTER) { decode<4, 1>(a); }
CLUSTER_KERNEL(attention_decode_8, DecodeAttentionArgs, THREADS, CLUSTER) { decode<8, 1>(a); }
// Heads wider than 128.
CLUSTER_KERNEL(attention_decode_wide_1, DecodeAttentionArgs, THREADS, CLUSTER) { decode<1, 2>(a); }
CLUSTER_KERNEL(attention_decode_wide_2, DecodeAttentionArgs, THREADS, CLUSTER) { decode<2, 2>(a); }
CLUSTER_KERNEL(attention_decode_wide_4, DecodeAttentionArgs, THREADS, CLUSTER) { decode<4, 2>(a); }
CLUSTER_KERNEL(attention_decode_wide_8, DecodeAttentionArgs, THREADS, CLUSTER) { decode<8, 2>(a); }
