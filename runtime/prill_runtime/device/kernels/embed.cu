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

// Weights `c * Format::N` and on of a row of the table, to `out` (width,).
template <class Format>
static __device__ __forceinline__ void embed_chunk(const Matrix& table, int row, int c, float* out) {
    float w[Format::N];
    Format::expand(Format::load(table, row, c), w);
#pragma unroll
    for (int i = 0; i < Format::N; ++i)
        if (c * Format::N + i < table.cols) out[c * Format::N + i] = w[i];
}

template <class Format>
static __device__ __forceinline__ void embed(const EmbedArgs& a) {
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous();
    if (n >= (long long)a.rows * a.table.pitch) return;
    const int row = (int)(n / a.table.pitch), c = (int)(n % a.table.pitch);
    embed_chunk<Format>(a.table, a.ids ? a.ids[row] : row, c, a.out + (long long)row * a.table.cols);
}

KERNELS(embed, EmbedArgs, 256)

// The first launch of a decode step: the row of one id, and, in the last block, the angles of its position.
struct BeginArgs {
    Matrix table;
    const int* id;
    float* out;                 // (width,)
    const int* position;
    const double* frequencies;  // (pair,)
    float2* angles;             // (pair,): cosine and sine
    int pairs;
    float scale;                // of cosine and sine
};

template <class Format>
static __device__ __forceinline__ void begin(const BeginArgs& a) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous();
    if (blockIdx.x + 1 < gridDim.x) {
        if (c < a.table.pitch) embed_chunk<Format>(a.table, *a.id, c, a.out);
        return;
    }
    for (int i = threadIdx.x; i < a.pairs; i += blockDim.x)
        a.angles[i] = turn_of(*a.position, a.frequencies[i], a.scale);
}

KERNELS(begin, BeginArgs, 256)

// The row of another table onto what begin wrote: learned positions.
struct AddRowArgs {
    Matrix table;
    const int* id;
    float* out;  // (width,)
};

template <class Format>
static __device__ __forceinline__ void add_row(const AddRowArgs& a) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous();
    if (c >= a.table.pitch) return;
    float w[Format::N];
    Format::expand(Format::load(a.table, *a.id, c), w);
#pragma unroll
    for (int i = 0; i < Format::N; ++i)
        if (c * Format::N + i < a.table.cols) a.out[c * Format::N + i] += w[i];
}

KERNELS(add_row, AddRowArgs, 256)
