// New keys and values (row, kv_head, dim) -> one sequence's cache, behind its committed positions.
#include "common.cuh"

struct AppendArgs {
    const Sequence* sequence;
    const float* k;  // (row, kv_head, dim), rows k_pitch apart
    const float* v;
    int rows;
    int kv_heads;
    int head_dim;
    int k_pitch;
    int v_pitch;
    int layer;
};

KERNEL(cache_append, AppendArgs, 256) {
    const int width = a.kv_heads * a.head_dim;
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= a.rows * width) return;
    const int row = n / width, head = n % width / a.head_dim, i = n % a.head_dim;
    const long long capacity = a.sequence->capacity, at = a.sequence->length + row;
    if (at >= capacity) return;  // a graph replayed past the end writes nothing
    const long long to = (((long long)a.layer * a.kv_heads + head) * capacity + at) * a.head_dim + i;
    a.sequence->keys[to] = a.k[(long long)row * a.k_pitch + n % width];
    a.sequence->values[to] = a.v[(long long)row * a.v_pitch + n % width];
}
