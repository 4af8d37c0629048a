// One dense stage of a decode step in one launch: norm, mat-vec, and what follows it.
//
// Every block normalises the activations for itself and lays them into shared memory, as float32 (exact) or as
// int8 with a scale for every 32 (fast); then teams of warps stream groups of four rows. Loads of weights are DEPTH
// steps ahead, the first of them before the kernel waits for the one before it. What follows the product:
//   PLAIN    out[row] = sum + residual[row]
//   GATE_UP  rows of two matrices: out[row] = silu(gate) * up
//   QKV      rows of three matrices: q rotated, k rotated into the cache, v into the cache
// and, in kernels with HOOKS, which are files of their own so that those without have nothing of it:
//   GELU in the place of SiLU, and of one matrix without a gate; biases of every row; LayerNorm in the place of
//   RMSNorm; rotation of pairs that lie half a head apart
// Sums have a fixed order: runs are bit-equal. Who includes this defines MOST, the threads of a block.
#pragma once

#include "formats.cuh"

#define ROWS 4
#define DEPTH 2  // steps whose loads are in flight, at most
#define PLAIN 0
#define GATE_UP 1
#define QKV 2
#define NOWHERE (1 << 28)  // a group that no matrix has

struct FusedArgs {
    Matrix m0;
    Matrix m1;
    Matrix m2;
    const float* x;          // (in,)
    const float* norm;       // (in,) weight of an RMSNorm over x, or null
    const float* residual;   // (out,) or null
    float* out;              // (out,); may be the residual itself
    const Sequence* sequence;
    const float2* angles;    // (pair,) of the position
    float eps;
    int mode;
    int layer;
    int head_dim;
    int kv_heads;
    int pairs;
    int team_bits;           // a group of rows is shared by 2^team_bits warps
    int steps;               // of each of them, for one group: 32 chunks each
    int rounds;              // groups of a team, one after the other
    // Of kernels with HOOKS:
    const float* norm_bias;  // (in,) of a LayerNorm, null for an RMSNorm
    const float* bias0;      // (rows,) of each matrix, or null
    const float* bias1;
    const float* bias2;
    int neox;                // of QKV: pairs are (i, i + pairs), not (2i, 2i + 1)
    int gelu;                // of GATE_UP, or of PLAIN: the activation is GELU, 1 by tanh, 2 by erf
};

struct Activations {
    unsigned char* planes;  // 16 bytes of a chunk's activations each, plane after plane
    float* scale;           // of 32 values
    float* sum;             // of their quants
};

#define BATCH 4  // loads of activations in flight in one thread

static __device__ __forceinline__ float4 quad(const float* x, int i, int cols) {
    if (4 * i + 4 <= cols && cols % 4 == 0) return reinterpret_cast<const float4*>(x)[i];
    float v[4];
    for (int k = 0; k < 4; ++k) v[k] = 4 * i + k < cols ? x[4 * i + k] : 0.0f;
    return make_float4(v[0], v[1], v[2], v[3]);
}

// Four values as int8, eight neighbouring lanes a block of 32: every lane of the warp takes part.
template <class Format>
static __device__ __forceinline__ void quantise(const Activations& into, int i, bool inside, int pitch, float4 v) {
    float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
    for (int step = 4; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, step));
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    const int q[4] = {__float2int_rn(v.x * inverse), __float2int_rn(v.y * inverse), __float2int_rn(v.z * inverse),
                      __float2int_rn(v.w * inverse)};
    int sum = q[0] + q[1] + q[2] + q[3];
    for (int step = 4; step; step >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    if (!inside) return;
    const int block = i / 8, j = i % 8;
    const int chunk = Format::N == 16 ? 2 * block + j / 4 : block, plane = Format::N == 16 ? 0 : j / 4;
    const unsigned word = (unsigned)(q[0] & 255) | (unsigned)(q[1] & 255) << 8 | (unsigned)(q[2] & 255) << 16 |
                          (unsigned)q[3] << 24;
    reinterpret_cast<unsigned*>(into.planes)[(plane * pitch + chunk) * 4 + j % 4] = word;
    if (j == 0) into.scale[block] = most / 127.0f, into.sum[block] = (float)sum;
}

// The first BATCH quads of the norm's weight for this thread: immutable, so they are fetched before the wait.
static __device__ __forceinline__ void fetch_norm(const float* norm, int cols, float4* weight) {
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
        const int i = threadIdx.x + k * blockDim.x;
        weight[k] = norm && 4 * i < cols ? quad(norm, i, cols) : make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    }
}

// Shared memory: planes, scales, sums. FAST holds a value in one byte, else in four. Of a.x are `cols` values, which
// are `pitch` chunks.
template <class Format, bool FAST, bool HOOKS, class Args>
static __device__ __forceinline__ Activations prepare(const Args& a, int cols, int pitch, const float4* weight) {
    __shared__ float shared[32];
    constexpr int planes = FAST ? Format::N / 16 : Format::N / 4;
    const int quads = FAST ? cols / 4 : pitch * planes;
    Activations into;
    into.planes = dynamic_shared_memory();
    into.scale = reinterpret_cast<float*>(into.planes + 16 * planes * pitch);
    into.sum = into.scale + cols / 32;
    float4 v[BATCH];
    float squares = 0.0f;
    for (int low = 0; low < quads; low += BATCH * blockDim.x) {
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            const int i = low + k * blockDim.x + threadIdx.x;
            v[k] = i < quads ? quad(a.x, i, cols) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        if (!a.norm) break;
#pragma unroll
        for (int k = 0; k < BATCH; ++k) squares += v[k].x * v[k].x + v[k].y * v[k].y + v[k].z * v[k].z + v[k].w * v[k].w;
    }
    float mean = 0.0f;
    if constexpr (HOOKS) if (a.norm_bias) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < quads; i += blockDim.x) {
            const float4 x = quad(a.x, i, cols);
            sum += x.x + x.y + x.z + x.w;
        }
        mean = block_sum(sum, shared) / cols, squares = 0.0f;
        for (int i = threadIdx.x; 4 * i < cols; i += blockDim.x) {
            const float4 x = quad(a.x, i, cols);
            squares += (x.x - mean) * (x.x - mean) + (x.y - mean) * (x.y - mean) + (x.z - mean) * (x.z - mean) +
                       (x.w - mean) * (x.w - mean);
        }
    }
    const bool again = a.norm && quads > BATCH * (int)blockDim.x;  // the first batch is no longer in registers
    const float scale = a.norm ? 1.0f / sqrtf(block_sum(squares, shared) / cols + a.eps) : 1.0f;
    for (int low = 0; low < quads; low += BATCH * blockDim.x) {
        if (low || again) {
#pragma unroll
            for (int k = 0; k < BATCH; ++k) {
                const int i = low + k * blockDim.x + threadIdx.x;
                v[k] = i < quads ? quad(a.x, i, cols) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            const int i = low + k * blockDim.x + threadIdx.x;
            if (a.norm) {
                const float4 w = low && i < quads ? quad(a.norm, i, cols) : weight[k];
                if constexpr (HOOKS) v[k].x -= mean, v[k].y -= mean, v[k].z -= mean, v[k].w -= mean;
                v[k].x = v[k].x * scale * w.x, v[k].y = v[k].y * scale * w.y;
                v[k].z = v[k].z * scale * w.z, v[k].w = v[k].w * scale * w.w;
                if constexpr (HOOKS) if (a.norm_bias && i < quads) {
                    const float4 b = quad(a.norm_bias, i, cols);
                    v[k].x += b.x, v[k].y += b.y, v[k].z += b.z, v[k].w += b.w;
                }
            }
            if (low + k * (int)blockDim.x >= quads) continue;  // the same for every thread
            if constexpr (FAST) quantise<Format>(into, i, i < quads, pitch, v[k]);
            else if (i < quads) reinterpret_cast<float4*>(into.planes)[i % planes * pitch + i / planes] = v[k];
        }
    }
    __syncthreads();
    return into;
}

// The row of q, k or v in place `at`: places of a pair are neighbours, whatever its rows are.
template <bool HOOKS>
static __device__ __forceinline__ int row_in(const FusedArgs& a, int at) {
    if (!HOOKS || !a.neox) return at;
    const int i = at % a.head_dim;
    return i < 2 * a.pairs ? at - i + i % 2 * a.pairs + i / 2 : at;
}

// The matrix and row that output row r of a group comes from, in the order of places.
static __device__ __forceinline__ const Matrix& source(const FusedArgs& a, int group, int r, int* row) {
    if (a.mode == GATE_UP) {
        *row = min(2 * group + r / 2, a.m0.rows - 1);
        return r % 2 ? a.m1 : a.m0;
    }
    int at = ROWS * group + r;
    const Matrix* m = &a.m0;
    if (a.mode == QKV && at >= m->rows) {
        at -= m->rows, m = &a.m1;
        if (at >= m->rows) at -= m->rows, m = &a.m2;
    }
    *row = min(at, m->rows - 1);
    return *m;
}

template <class Format, bool FAST>
static __device__ __forceinline__ void accumulate(const typename Format::Raw* raw, const Activations& x, int c, int pitch,
                                                  float* total) {
    constexpr int planes = FAST ? Format::N / 16 : Format::N / 4;
    if constexpr (FAST) {
        int words[Format::N / 4];
#pragma unroll
        for (int p = 0; p < planes; ++p) {
            const int4 four = reinterpret_cast<const int4*>(x.planes)[p * pitch + c];
            words[4 * p] = four.x, words[4 * p + 1] = four.y, words[4 * p + 2] = four.z, words[4 * p + 3] = four.w;
        }
        const int block = Format::N == 16 ? c / 2 : c;
        const float scale = x.scale[block], sum = x.sum[block];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) total[r] += scale * Format::dot(raw[r], words, sum);
    } else {
        float v[Format::N];
#pragma unroll
        for (int p = 0; p < planes; ++p) {
            const float4 four = reinterpret_cast<const float4*>(x.planes)[p * pitch + c];
            v[4 * p] = four.x, v[4 * p + 1] = four.y, v[4 * p + 2] = four.z, v[4 * p + 3] = four.w;
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float w[Format::N];
            Format::expand(raw[r], w);
#pragma unroll
            for (int i = 0; i < Format::N; ++i) total[r] += w[i] * v[i];
        }
    }
}

// What a lane adds to its sum and where it puts it: loads that start before the sum is there.
struct Target {
    float* to;       // null: nowhere
    float bias;
    float residual;
    float2 turn;     // cosine and sine, in rows that are rotated
    bool rotate;
};

// Lane 8r of the warp finishes row r of the group.
template <bool HOOKS>
static __device__ __forceinline__ Target target(const FusedArgs& a, int group) {
    Target t = {nullptr, 0.0f, 0.0f, make_float2(1.0f, 0.0f), false};
    const int r = threadIdx.x % 32 / 8, at = ROWS * group + r;
    if (threadIdx.x % 8) return t;
    if (a.mode == GATE_UP) {
        const int row = 2 * group + r / 2;
        if (r % 2 == 0 && row < a.m0.rows) t.to = a.out + row;
        if constexpr (HOOKS) {
            const float* bias = r % 2 ? a.bias1 : a.bias0;
            if (bias && row < a.m0.rows) t.bias = bias[row];
        }
    } else if (a.mode == PLAIN) {
        if (at >= a.m0.rows) return t;
        t.to = a.out + at;
        if constexpr (HOOKS) if (a.bias0) t.bias = a.bias0[at];
        if (a.residual) t.residual = a.residual[at];
    } else {
        const int q_rows = a.m0.rows, k_rows = a.m1.rows;
        const bool is_v = at >= q_rows + k_rows;
        const int low = at < q_rows ? 0 : q_rows + (is_v ? k_rows : 0);  // rows before this matrix's
        if (at >= a.m0.rows + a.m1.rows + a.m2.rows) return t;
        const int row = row_in<HOOKS>(a, at - low);
        if constexpr (HOOKS) {
            const float* bias = at < q_rows ? a.bias0 : is_v ? a.bias2 : a.bias1;
            if (bias) t.bias = bias[row];
        }
        const int i = row % a.head_dim, pair = (at - low) % a.head_dim / 2;
        t.rotate = !is_v && pair < a.pairs;
        if (t.rotate) t.turn = a.angles[pair];
        t.to = a.out + row;
        if (at >= q_rows) {
            const Sequence& s = *a.sequence;
            const long long place = ((long long)a.layer * a.kv_heads + row / a.head_dim) * s.capacity + s.length;
            t.to = s.length < s.capacity ? (is_v ? s.values : s.keys) + place * a.head_dim + i : nullptr;
        }
    }
    return t;
}

// Lane 8r holds the sum of row r of the group; `other` is the sum of the row beside it.
template <bool HOOKS>
static __device__ __forceinline__ void finish(const FusedArgs& a, const Target& t, float sum, float other) {
    if (!t.to) return;
    if constexpr (HOOKS) if (a.gelu) {
        const float curve = a.gelu == 2 ? erff(sum * 0.7071067811865476f)
                                        : tanhf(0.7978845608028654f * (sum + 0.044715f * (sum * sum * sum)));
        const float gate = 0.5f * sum * (1.0f + curve);
        *t.to = a.mode == GATE_UP ? gate * other : gate;
        return;
    }
    if (a.mode == GATE_UP) *t.to = sum / (1.0f + expf(-sum)) * other;
    else if (a.mode == PLAIN) *t.to = sum + t.residual;
    else if (!t.rotate) *t.to = sum;
    else *t.to = threadIdx.x / 8 % 2 ? other * t.turn.y + sum * t.turn.x : sum * t.turn.x - other * t.turn.y;
}

// The rows of all groups: a team of warps shares a group, each takes every team-th step of 32 chunks; its first warp
// adds them up. DEPTH steps are on their way, each in registers of its own. A stage says
//   place(group)       which rows the next loads are of
//   load(raw, c)       chunk c of each of them
//   begin()            waits, and lays down the activations
//   target(group), biased(target, sum), finish(target, sum, sum of the row beside it)
//   AHEAD, ahead()     whether it asks for what the next launch reads, and does so: its own loads are on their way
template <class Format, bool FAST, class Stage, class Args>
static __device__ __forceinline__ void stream(const Args& a, Stage& stage, int groups, int pitch) {
    __shared__ float sums[2][MOST / 32][ROWS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = 1 << a.team_bits;
    const int member = warp & (team - 1), stride = (blockDim.x / 32 >> a.team_bits) * gridDim.x;
    const int first = (warp >> a.team_bits) * gridDim.x + blockIdx.x;
    constexpr int depth = FAST || Format::N <= 8 ? DEPTH : 1;  // as the registers allow: blocks expanded take many
    typename Format::Raw raw[depth][ROWS] = {};
    int ahead_group = first, ahead_step = 0;  // the next loads to issue
    auto fetch = [&](typename Format::Raw* into) {
        if (ahead_group >= groups) return;
        stage.load(into, min(((ahead_step << a.team_bits) + member) * 32 + lane, pitch - 1));
        if (++ahead_step < a.steps) return;
        ahead_step = 0, ahead_group += stride;
        stage.place(min(ahead_group, groups - 1));
    };
    stage.place(min(ahead_group, groups - 1));
#pragma unroll
    for (int d = 0; d < depth; ++d) fetch(raw[d]);
    const Activations x = stage.begin();
    int round = 0, step = 0;
    float total[ROWS] = {};
    Target goal = stage.target(first < groups && member == 0 ? first : NOWHERE);
    auto take = [&](typename Format::Raw* from) {
        const int c = ((step << a.team_bits) + member) * 32 + lane;
        if constexpr (Stage::AHEAD) if (step == 0 && round + 1 == a.rounds) stage.ahead();
        if (c < pitch) accumulate<Format, FAST>(from, x, c, pitch, total);
        fetch(from);
        if (++step < a.steps) return;
        if (round + 1 == a.rounds) let_next_start();
        float sum = four_sums(total);
        if (team > 1) {
            float (*both)[ROWS] = sums[round % 2];
            if (lane % 8 == 0) both[warp][lane / 8] = sum;
            __syncthreads();
            sum = both[warp - member][lane / 8];
#pragma unroll 4
            for (int w = 1; w < team; ++w) sum += both[warp - member + w][lane / 8];
        }
        sum = stage.biased(goal, sum);
        const float other = __shfl_xor_sync(0xFFFFFFFFu, sum, 8);
        stage.finish(goal, sum, other);
        step = 0, ++round;
        const int group = first + round * stride;
        goal = stage.target(group < groups && member == 0 ? group : NOWHERE);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) total[r] = 0.0f;
    };
    while (true) {  // written out: a step's registers must not move while its loads are under way
        take(raw[0]);
        if (round == a.rounds) return;
        if constexpr (depth > 1) {
            take(raw[1]);
            if (round == a.rounds) return;
        }
    }
}

template <class Format, bool FAST, bool HOOKS>
struct Product {
    static constexpr bool AHEAD = false;
    const FusedArgs& a;
    const Matrix* m[ROWS];
    int at[ROWS];
    __device__ __forceinline__ void place(int group) {
        if constexpr (HOOKS) if (a.mode == QKV) return place_in_head(group);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) m[r] = &source(a, group, r, &at[r]);
    }
    // A group is of one head, whose size is a multiple of ROWS: one division for all of its rows.
    __device__ __forceinline__ void place_in_head(int group) {
        int row;
        const Matrix* from = &source(a, group, 0, &row);
        const int i = a.neox ? row % a.head_dim : 2 * a.pairs;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            m[r] = from, at[r] = i + r < 2 * a.pairs ? row + (i + r) % 2 * a.pairs + (i + r) / 2 - i : row + r;
    }
    __device__ __forceinline__ void load(typename Format::Raw* into, int c) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) into[r] = Format::load(*m[r], at[r], c);
    }
    __device__ __forceinline__ Activations begin() {
        float4 weight[BATCH];
        fetch_norm(a.norm, a.m0.cols, weight);
        wait_for_previous();
        return prepare<Format, FAST, HOOKS>(a, a.m0.cols, a.m0.pitch, weight);
    }
    __device__ __forceinline__ Target target(int group) { return ::target<HOOKS>(a, group); }
    __device__ __forceinline__ float biased(const Target& t, float sum) { return HOOKS ? sum + t.bias : sum; }
    __device__ __forceinline__ void finish(const Target& t, float sum, float other) {
        ::finish<HOOKS>(a, t, sum, other);
    }
};

template <class Format, bool FAST, bool HOOKS>
static __device__ __forceinline__ void fused(const FusedArgs& a) {
    const int rows = a.mode == QKV ? a.m0.rows + a.m1.rows + a.m2.rows : a.m0.rows;
    Product<Format, FAST, HOOKS> stage = {a, {}, {}};
    stream<Format, FAST>(a, stage, a.mode == GATE_UP ? (rows + 1) / 2 : (rows + ROWS - 1) / ROWS, a.m0.pitch);
}
