// Causal attention of many new rows over one sequence's cache, on the tensor cores: halves multiplied, float32 sums.
//
// A block takes 64 rows of one head, a warp 16 of them. Keys and values pass through shared memory 64 positions at a
// time, converted on the way; maxima and sums are carried along (Dao et al. 2022), in order of position.
#include "tensor.cuh"

#define KEYS 64

struct PrefillArgs {
    const Sequence* sequence;
    const float* q;  // (row, head, dim), rows q_pitch apart
    float* out;      // (row, head, dim) or null
    void* halves;    // the same, rounded, rows halves_pitch apart, for the product that follows; or null
    int rows;
    int heads;
    int kv_heads;
    int q_pitch;
    int halves_pitch;
    int layer;
    int window;      // keys a row sees, its own included; 0: all
    float scale;
    float softcap;       // in kernels with hooks: scores stay within it; 0: they are as they are
    const float* sinks;  // there too: (head,), scores of no key; or null
};

// All loads of a thread start before the first store waits for one. Positions past the end repeat the last: they
// weigh nothing, and what lies there need not be a number.
template <int DIM>
static __device__ __forceinline__ void fill(uint16_t (*tile)[DIM + 8], const float* from, int valid) {
    constexpr int EACH = KEYS * DIM / 512, STEP = 512 / DIM;
    const SharedAt to = shared_at(tile);
    const int row = threadIdx.x / (DIM / 4), column = threadIdx.x % (DIM / 4) * 4;
    float4 v[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        v[i] = *reinterpret_cast<const float4*>(from + (long long)min(row + i * STEP, valid - 1) * DIM + column);
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        store_8(to + ((row + i * STEP) * (DIM + 8) + column) * 2,
                {pack_halves(v[i].x, v[i].y), pack_halves(v[i].z, v[i].w)});
}

// Over the four lanes that share a row of fragments.
static __device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
    return v + __shfl_xor_sync(0xFFFFFFFFu, v, 2);
}
static __device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, 2));
}

// HOOKED: with soft capped scores and sinks, which most models do not have.
template <int DIM, bool HOOKED>
static __device__ __forceinline__ void prefill(const PrefillArgs& a) {
    alignas(16) __shared__ uint16_t keys[KEYS][DIM + 8], values[KEYS][DIM + 8];
    const int lane = threadIdx.x % 32, head = blockIdx.y, length = a.sequence->length;
    const float log2e = 1.4426950408889634f, cap = a.softcap * log2e;
    const int row0 = (gridDim.x - 1 - blockIdx.x) * 64;  // the longest first
    const int mine = row0 + threadIdx.x / 32 * 16 + lane / 4;  // and 8 more
    const long long base = ((long long)a.layer * a.kv_heads + head / (a.heads / a.kv_heads)) * a.sequence->capacity * DIM;
    unsigned q[DIM / 16][4];
    for (int e = 0; e < 2; ++e) {
        const float* from = a.q + (long long)min(mine + 8 * e, a.rows - 1) * a.q_pitch + head * DIM + lane % 4 * 2;
        const float scale = a.scale * log2e;  // powers of two below
#pragma unroll
        for (int k = 0; k < DIM / 8; ++k)
            q[k / 2][k % 2 * 2 + e] = pack_halves(from[8 * k] * scale, from[8 * k + 1] * scale);
    }
    float mixed[DIM / 8][4] = {}, top[2] = {minus_infinity(), minus_infinity()}, sum[2] = {};
    const int lowest = a.window ? max(length + row0 - a.window + 1, 0) : 0, end = length + min(row0 + 64, a.rows);
    for (int start = lowest / KEYS * KEYS; start < end; start += KEYS) {
        __syncthreads();
        fill<DIM>(keys, a.sequence->keys + base + (long long)start * DIM, end - start);
        fill<DIM>(values, a.sequence->values + base + (long long)start * DIM, end - start);
        __syncthreads();
        float score[KEYS / 8][4] = {};
        const SharedAt key = shared_at(keys) + ((lane / 16 * 8 + lane % 8) * (DIM + 8) + lane / 8 % 2 * 8) * 2;
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k)
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) {
                unsigned right[4];
                load_fragments(right, key + (j * 16 * (DIM + 8) + k * 16) * 2);
                multiply_fragments(score[2 * j], q[k], right);
                multiply_fragments(score[2 * j + 1], q[k], right + 2);
            }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int position = length + mine + 8 * e, first = a.window ? position - a.window + 1 : 0;
            float high = top[e];
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int at = start + j * 8 + lane % 4 * 2 + i;
                    float& s = score[j][2 * e + i];
                    if (HOOKED && a.softcap != 0.0f) s = cap * tanhf(s / cap);
                    if (at > position || at < first) s = minus_infinity();
                    high = fmaxf(high, s);
                }
            high = quad_max(high);
            const float against = high == minus_infinity() ? 0.0f : high, keep = exp2f(top[e] - against);
            top[e] = high;
            sum[e] *= keep;
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) sum[e] += score[j][2 * e + i] = exp2f(score[j][2 * e + i] - against);
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n) mixed[n][2 * e] *= keep, mixed[n][2 * e + 1] *= keep;
        }
        const SharedAt value = shared_at(values) + (lane % 16 * (DIM + 8) + lane / 16 * 8) * 2;
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k) {
            const float *l = score[2 * k], *r = score[2 * k + 1];
            const unsigned left[4] = {pack_halves(l[0], l[1]), pack_halves(l[2], l[3]), pack_halves(r[0], r[1]),
                                      pack_halves(r[2], r[3])};
#pragma unroll
            for (int n = 0; n < DIM / 16; ++n) {
                unsigned right[4];
                load_fragments_across(right, value + (k * 16 * (DIM + 8) + n * 16) * 2);
                multiply_fragments(mixed[2 * n], left, right);
                multiply_fragments(mixed[2 * n + 1], left, right + 2);
            }
        }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        float total = quad_sum(sum[e]);
        if (HOOKED && a.sinks) total += exp2f(a.sinks[head] * log2e - top[e]);
        const int row = mine + 8 * e;
        if (row >= a.rows) continue;
        const int column = head * DIM + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < DIM / 8; ++n) {
            const float x = mixed[n][2 * e] / total, y = mixed[n][2 * e + 1] / total;
            if (a.out) {
                float* out = a.out + (long long)row * a.heads * DIM + column + 8 * n;
                out[0] = x, out[1] = y;
            }
            if (a.halves)
                *reinterpret_cast<unsigned*>(static_cast<uint16_t*>(a.halves) + (long long)row * a.halves_pitch +
                                             column + 8 * n) = pack_halves(x, y);
        }
    }
}

KERNEL(prefill_attention_64, PrefillArgs, 128) { prefill<64, false>(a); }
KERNEL(prefill_attention_128, PrefillArgs, 128) { prefill<128, false>(a); }
KERNEL(prefill_hooked_64, PrefillArgs, 128) { prefill<64, true>(a); }
KERNEL(prefill_hooked_128, PrefillArgs, 128) { prefill<128, true>(a); }
