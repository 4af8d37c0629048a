// Rows of a table (vocab, width) for ids (row,) -> (row, width), or a whole matrix expanded.
//
// One thread a chunk. Ids lie in device memory, so that a captured graph feeds what the last step chose.
#include "formats.cuh"

struct EmbedArgs {
    Matrix table;
    const int* ids;  // (row,), or null: row r is row r of the table
    float* out;      // (row, width)
    int rows;
};

template <class Format>
static __device__ __forceinline__ void embed(const EmbedArgs& a) {
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous();
    if (n >= (long long)a.rows * a.table.pitch) return;
    const int row = (int)(n / a.table.pitch), c = (int)(n % a.table.pitch);
    float w[Format::N];
    Format::expand(Format::load(a.table, a.ids ? a.ids[row] : row, c), w);
    float* out = a.out + (long long)row * a.table.cols + c * Format::N;
#pragma unroll
    for (int i = 0; i < Format::N; ++i)
        if (c * Format::N + i < a.table.cols) out[i] = w[i];
}

KERNELS(embed, EmbedArgs, 256)
