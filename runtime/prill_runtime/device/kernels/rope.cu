// Rotary positions (Su et al. 2021): the cosines and sines of a step, then the rotation of every head.
//
// Angles are computed once a step. Pair i is (2i, 2i+1), or (i, i + dim/2) in the neox layout.
#include "common.cuh"

struct AnglesArgs {
    const int* positions;       // (row,)
    const double* frequencies;  // (pair,)
    float2* out;                // (row, pair): cosine and sine
    const double* late;         // in place of frequencies where the last row stands at `original` or later; or null
    int original;
    float scale;                // of cosine and sine
    int rows;
    int pairs;
};

KERNEL(rope_angles, AnglesArgs, 128) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous();
    if (i >= a.rows * a.pairs) return;
    const double* frequencies = a.late && a.positions[a.rows - 1] >= a.original ? a.late : a.frequencies;
    a.out[i] = turn_of(a.positions[i / a.pairs], frequencies[i % a.pairs], a.scale);
}

struct RopeArgs {
    const float* x;        // (row, head, head_dim), rows x_pitch apart
    const float2* angles;  // (row, pair)
    float* out;            // (row, head, head_dim)
    int rows;
    int heads;
    int head_dim;
    int pairs;
    int x_pitch;
    int neox;
};

KERNEL(rope, RopeArgs, 128) {
    const int lanes = a.head_dim - a.pairs;  // one thread a pair, and one a component that stays
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous();
    if (n >= (long long)a.rows * a.heads * lanes) return;
    const int i = (int)(n % lanes), head = (int)(n / lanes % a.heads), row = (int)(n / lanes / a.heads);
    const float* x = a.x + (long long)row * a.x_pitch + head * a.head_dim;
    float* out = a.out + ((long long)row * a.heads + head) * a.head_dim;
    if (i >= a.pairs) {
        out[i + a.pairs] = x[i + a.pairs];
        return;
    }
    const int first = a.neox ? i : 2 * i, second = a.neox ? i + a.pairs : 2 * i + 1;
    const float2 turn = a.angles[row * a.pairs + i];
    out[first] = x[first] * turn.x - x[second] * turn.y;
    out[second] = x[first] * turn.y + x[second] * turn.x;
}

// Rows times 1 + beta ln(1 + position / original), the quotient rounded down: late queries are sharper.
struct TemperArgs {
    const float* x;        // (row, width)
    const int* positions;  // (row,)
    float* out;            // (row, width)
    long long count;
    int width;
    int original;
    float beta;
};

KERNEL(temper, TemperArgs, 128) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous();
    if (i >= a.count) return;
    a.out[i] = a.x[i] * (1.0f + a.beta * logf(1.0f + (float)(a.positions[i / a.width] / a.original)));
}
