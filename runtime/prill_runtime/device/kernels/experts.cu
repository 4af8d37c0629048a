// Mixtures of experts (Shazeer et al. 2017): which experts a row goes to, their matrices, and their sum.
//
// Which experts a row has is said by its weights (row, expert), which are not 0 for them alone; they are taken in
// ascending order everywhere, so that runs are bit-equal.
#include "formats.cuh"

#define THREADS 128

struct RouteArgs {
    const float* logits;  // (row, expert)
    float* out;           // (row, expert)
    int experts;
    int used;
    int normalised;       // the softmax is over the chosen ones
};

KERNEL(route, RouteArgs, THREADS) {  // one block a row
    __shared__ float shared[32];
    const float* x = a.logits + (long long)blockIdx.x * a.experts;
    float* out = a.out + (long long)blockIdx.x * a.experts;
    float top = minus_infinity(), sum = 0.0f;
    for (int e = threadIdx.x; e < a.experts; e += blockDim.x) top = fmaxf(top, x[e]);
    top = block_max(top, shared);
    for (int e = threadIdx.x; e < a.experts; e += blockDim.x) {
        int before = 0;  // of equal logits the lower id is first
        for (int other = 0; other < a.experts; ++other) before += x[other] > x[e] || (x[other] == x[e] && other < e);
        const float weight = expf(x[e] - top);
        if (before < a.used || !a.normalised) sum += weight;
        out[e] = before < a.used ? weight : 0.0f;
    }
    sum = block_sum(sum, shared);
    for (int e = threadIdx.x; e < a.experts; e += blockDim.x) out[e] /= sum;
}

// The expert in place `slot` of a row's, or `experts` where it has fewer.
static __device__ __forceinline__ int expert_at(const float* routed, int experts, int slot) {
    int e = 0;
    while (e < experts && (routed[e] == 0.0f || slot-- > 0)) ++e;
    return e;
}

struct ExpertArgs {
    Matrix m;             // (expert * out, in)
    Matrix bias;          // (expert, out) of float32, or nothing
    const float* x;       // (row, in), or (row, used, in)
    const float* routed;  // (row, expert)
    float* out;           // (row, used, out)
    int outs;
    int experts;
    int used;
    int apart;            // x has a row for each expert of a row
};

template <class Format>
static __device__ __forceinline__ void experts(const ExpertArgs& a) {  // block (output row, row * used + slot)
    __shared__ float shared[32];
    const int row = blockIdx.y / a.used, slot = blockIdx.y % a.used;
    const int expert = expert_at(a.routed + (long long)row * a.experts, a.experts, slot);
    const float* x = a.x + (long long)(a.apart ? blockIdx.y : row) * a.m.cols;
    float total = 0.0f;
    if (expert < a.experts)
        for (int c = threadIdx.x; c < a.m.pitch; c += blockDim.x) {
            float w[Format::N];
            Format::expand(Format::load(a.m, expert * a.outs + blockIdx.x, c), w);
#pragma unroll
            for (int i = 0; i < Format::N; ++i)
                if (c * Format::N + i < a.m.cols) total += w[i] * x[c * Format::N + i];
        }
    total = block_sum(total, shared);
    if (threadIdx.x) return;
    if (expert < a.experts && a.bias.q)
        total += reinterpret_cast<const float*>(a.bias.q)[(long long)expert * a.bias.pitch * 4 + blockIdx.x];
    a.out[(long long)blockIdx.y * a.outs + blockIdx.x] = total;
}

KERNELS(experts, ExpertArgs, THREADS)

struct GroupArgs {
    const float* routed;  // (row, expert)
    int* order;           // (expert, rows) places row * used + slot of each expert, ascending, -1 behind the last;
                          // then (rows * used) those that no expert has
    int rows;
    int experts;
    int used;
};

KERNEL(group, GroupArgs, THREADS) {  // one block an expert, and one for what is left over
    __shared__ int counts[THREADS];
    const int expert = blockIdx.x, each = (a.rows + THREADS - 1) / THREADS;
    const int low = threadIdx.x * each, high = min(low + each, a.rows);
    int* order = a.order + (long long)expert * a.rows;
    const auto visit = [&](auto take) {
        for (int row = low; row < high; ++row) {
            const float* routed = a.routed + (long long)row * a.experts;
            if (expert < a.experts && routed[expert] == 0.0f) continue;
            int slot = 0;
            for (int e = 0; e < expert; ++e) slot += routed[e] != 0.0f;
            for (; slot < a.used; slot += expert < a.experts ? a.used : 1) take(row * a.used + slot);
        }
    };
    int count = 0, at = 0, total = 0;
    visit([&](int) { ++count; });
    counts[threadIdx.x] = count;
    __syncthreads();
    for (int t = 0; t < THREADS; ++t) total += counts[t], at += t < threadIdx.x ? counts[t] : 0;
    visit([&](int place) { order[at++] = place; });
    for (int n = total + threadIdx.x; n < (expert < a.experts ? a.rows : a.rows * a.used); n += THREADS) order[n] = -1;
}

struct MixArgs {
    const float* x;       // (row, used, width)
    const float* routed;  // (row, expert)
    float* out;           // (row, width)
    int rows;
    int width;
    int experts;
    int used;
};

KERNEL(mix, MixArgs, 256) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)a.rows * a.width) return;
    const long long row = i / a.width;
    const float* x = a.x + row * a.used * a.width + i % a.width;
    float sum = 0.0f;
    for (int e = 0, slot = 0; e < a.experts && slot < a.used; ++e)
        if (const float weight = a.routed[row * a.experts + e]) sum += weight * x[(long long)slot++ * a.width];
    a.out[i] = sum;
}
