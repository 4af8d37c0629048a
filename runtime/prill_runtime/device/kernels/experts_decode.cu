// A mixture of experts in a decode step, after fused.cuh: the router in one launch; gate, up and activation of the
// chosen experts in a second; down of these and their sum in a third.
//
// Every block reads the router's logits and chooses for itself: the largest, of equal ones the lowest id, taken in
// ascending order. An expert's weight is put on its activations, so that down is one product whose rows are those of
// the chosen experts, side by side. Sums have a fixed order: runs are bit-equal.
#define MOST 512
#define MOST_EXACT 256
#include "fused.cuh"

#define ROUTER 256
#define MOST_EXPERTS 256
#define MOST_USED 16

struct RouterArgs {
    Matrix m;           // (expert, in)
    const float* x;     // (in,)
    const float* norm;  // (in,) weight of an RMSNorm over x
    const float* bias;  // (expert,) or null
    float* out;         // (expert,) logits
    float eps;
};

// A block an expert. The norm's factor is one number: it comes last, and x is read once.
template <class Format>
static __device__ __forceinline__ void router(const RouterArgs& a) {
    __shared__ float shared[32];
    constexpr int HELD = 3;  // chunks of a thread whose loads start before the wait
    typename Format::Raw raw[HELD];
#pragma unroll
    for (int k = 0; k < HELD; ++k)
        raw[k] = Format::load(a.m, blockIdx.x, min((int)(threadIdx.x + k * blockDim.x), a.m.pitch - 1));
    wait_for_previous();
    let_next_start();
    float squares = 0.0f, dot = 0.0f;
    const auto take = [&](const typename Format::Raw& from, int c) {
        if (c >= a.m.pitch) return;
        float w[Format::N];
        Format::expand(from, w);
#pragma unroll
        for (int i = 0; i < Format::N; i += 4) {
            const int at = c * Format::N / 4 + i / 4;
            const float4 x = quad(a.x, at, a.m.cols), n = quad(a.norm, at, a.m.cols);
            squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
            dot += w[i] * (x.x * n.x) + w[i + 1] * (x.y * n.y) + w[i + 2] * (x.z * n.z) + w[i + 3] * (x.w * n.w);
        }
    };
#pragma unroll
    for (int k = 0; k < HELD; ++k) take(raw[k], threadIdx.x + k * blockDim.x);
    for (int c = threadIdx.x + HELD * blockDim.x; c < a.m.pitch; c += blockDim.x)
        take(Format::load(a.m, blockIdx.x, c), c);
    squares = block_sum(squares, shared);
    dot = block_sum(dot, shared);
    if (threadIdx.x == 0)
        a.out[blockIdx.x] = dot / sqrtf(squares / a.m.cols + a.eps) + (a.bias ? a.bias[blockIdx.x] : 0.0f);
}

KERNELS(router, RouterArgs, ROUTER)

struct MixtureArgs {
    Matrix m0;              // (expert * out, in): gate; or down
    Matrix m1;              // up; or nothing
    const float* x;         // (in,); of down (used, in)
    const float* norm;      // (in,) weight of an RMSNorm over x, or null
    const float* logits;    // (expert,)
    const float* bias0;     // (expert, out) of each matrix, or null
    const float* bias1;
    const float* residual;  // of down: (out,)
    float* out;             // (used, out), each expert's times its weight; of down (out,)
    const unsigned char* next;  // quants that the launch after this one reads, or null: of down's for all experts
    int next_bytes;         // of one expert, or of so many parts as experts are used; a multiple of 16
    float eps;
    int down;
    int outs;               // rows of one expert
    int experts;
    int used;
    int normalised;         // the softmax is over the chosen ones
    float limit;            // of swiglu_clamped; 0: it is swiglu
    float alpha;
    int team_bits;          // as in FusedArgs; of down a step is one of the rows of all chosen experts
    int steps;
    int rounds;
};

struct Chosen {
    int expert[MOST_USED];
    float weight[MOST_USED];
};

static __device__ __forceinline__ void choose(const MixtureArgs& a, Chosen& chosen) {
    __shared__ float logits[MOST_EXPERTS], weights[MOST_EXPERTS];
    __shared__ int taken[MOST_EXPERTS];
    for (int e = threadIdx.x; e < a.experts; e += blockDim.x) logits[e] = load_shared_by_blocks(a.logits + e);
    if (threadIdx.x < MOST_USED) chosen.expert[threadIdx.x] = 0, chosen.weight[threadIdx.x] = 0.0f;
    __syncthreads();
    for (int e = threadIdx.x; e < a.experts; e += blockDim.x) {
        int before = 0;  // of equal logits the lower id is first
        float top = minus_infinity();
#pragma unroll 8
        for (int other = 0; other < a.experts; ++other) {
            const float x = logits[other];
            before += x > logits[e] || (x == logits[e] && other < e), top = fmaxf(top, x);
        }
        weights[e] = expf(logits[e] - top), taken[e] = before < a.used;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < a.experts; e += blockDim.x) {
        int slot = 0;
        float sum = 0.0f;
#pragma unroll 8
        for (int other = 0; other < a.experts; ++other) {
            slot += taken[other] && other < e;
            if (taken[other] || !a.normalised) sum += weights[other];
        }
        if (taken[e] && slot < a.used) chosen.expert[slot] = e, chosen.weight[slot] = weights[e] / sum;
    }
    __syncthreads();
}

template <class Format, bool FAST>
struct Mixture {
    static constexpr bool AHEAD = true;
    const MixtureArgs& a;
    const Chosen& chosen;
    int pitch;     // chunks that begin() lays down
    int at[ROWS];  // of down: of an expert
    __device__ __forceinline__ void place(int group) {
        const int half = (a.outs + 1) / 2, low = a.down ? 0 : chosen.expert[group / half] * a.outs;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            at[r] = low + min(a.down ? ROWS * group + r : 2 * (group % half) + r / 2, a.outs - 1);
    }
    __device__ __forceinline__ void load(typename Format::Raw* into, int c) {
        const int slot = a.down ? c / a.m0.pitch : 0, low = a.down ? chosen.expert[slot] * a.outs : 0;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            into[r] = Format::load(a.down || r % 2 == 0 ? a.m0 : a.m1, low + at[r], c - slot * a.m0.pitch);
    }
    // Every warp asks for its share of what comes next.
    __device__ __forceinline__ void ahead() {
        if (!a.next || threadIdx.x % 32) return;
        const int warps = gridDim.x * blockDim.x / 32, pieces = (warps + a.used - 1) / a.used;
        const int n = threadIdx.x / 32 * gridDim.x + blockIdx.x, each = (a.next_bytes / 16 + pieces - 1) / pieces * 16;
        const int low = n / a.used * each, bytes = min(each, a.next_bytes - low);
        const int part = a.down ? n % a.used : chosen.expert[n % a.used];
        if (bytes > 0) ask_for(a.next + (long long)part * a.next_bytes + low, bytes);
    }
    __device__ __forceinline__ Activations begin() {
        const int cols = a.down ? a.used * a.m0.cols : a.m0.cols;
        float4 weight[BATCH];
        fetch_norm(a.norm, cols, weight);
        wait_for_previous();
        return prepare<Format, FAST, false>(a, cols, pitch, weight);
    }
    __device__ __forceinline__ Target target(int group) {
        Target t = {nullptr, 0.0f, 0.0f, make_float2(1.0f, 0.0f), false};
        const int r = threadIdx.x % 32 / 8;
        if (threadIdx.x % 8 || group == NOWHERE) return t;
        if (a.down) {
            const int row = ROWS * group + r;
            if (row >= a.outs) return t;
            t.to = a.out + row, t.residual = a.residual[row];
            if (a.bias0)
                for (int slot = 0; slot < a.used; ++slot)
                    t.bias += chosen.weight[slot] * a.bias0[chosen.expert[slot] * a.outs + row];
            return t;
        }
        const int half = (a.outs + 1) / 2, slot = group / half, row = 2 * (group % half) + r / 2;
        if (row >= a.outs) return t;
        const float* bias = r % 2 ? a.bias1 : a.bias0;
        if (bias) t.bias = bias[chosen.expert[slot] * a.outs + row];
        if (r % 2 == 0) t.to = a.out + slot * a.outs + row, t.residual = chosen.weight[slot];
        return t;
    }
    __device__ __forceinline__ float biased(const Target& t, float sum) { return sum + t.bias; }
    __device__ __forceinline__ void finish(const Target& t, float sum, float other) {
        if (!t.to) return;
        if (a.down) {
            *t.to = sum + t.residual;
            return;
        }
        float gate = sum, up = other, alpha = 1.0f;
        if (a.limit != 0.0f)
            gate = fminf(gate, a.limit), up = fmaxf(fminf(up, a.limit), -a.limit) + 1.0f, alpha = a.alpha;
        *t.to = t.residual * (gate / (1.0f + expf(-alpha * gate)) * up);
    }
};

// Down reads logits that the kernel before the last has written, which has ended: its first weights are on their way
// before the wait.
template <class Format, bool FAST>
static __device__ __forceinline__ void mixture(const MixtureArgs& a) {
    __shared__ Chosen chosen;
    if (!a.down) wait_for_previous();
    choose(a, chosen);
    Mixture<Format, FAST> stage = {a, chosen, a.down ? a.used * a.m0.pitch : a.m0.pitch, {}};
    stream<Format, FAST>(a, stage, a.down ? (a.outs + ROWS - 1) / ROWS : a.used * ((a.outs + 1) / 2), stage.pitch);
}

template <class Format>
static __device__ __forceinline__ void mixture_exact(const MixtureArgs& a) { mixture<Format, false>(a); }
template <class Format>
static __device__ __forceinline__ void mixture_fast(const MixtureArgs& a) { mixture<Format, true>(a); }

KERNELS_OF_VALUES(mixture_exact, MixtureArgs, MOST)
KERNELS_OF_BLOCKS(mixture_fast, MixtureArgs, MOST)
#undef RESIDENT
#define RESIDENT 2
KERNELS_OF_BLOCKS(mixture_exact, MixtureArgs, MOST_EXACT)
