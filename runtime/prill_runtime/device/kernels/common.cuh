// What every kernel shares: the target's dialect, reductions in a fixed order, and the structs of arguments.
//
// Every kernel takes one struct, whose fields Python fills by name; the layout is read from these sources.
// KERNEL(name, Args, threads) declares one, KERNELS(prefix, Args, threads) one for each weight format,
// CLUSTER_KERNEL(name, Args, threads, blocks) one whose blocks run in clusters of so many.
#pragma once

#ifdef PRILL_EMU
#include "emu.h"
#else
#include <cuda_fp16.h>
#include <stdint.h>
#define RESIDENT 1  // blocks that a multiprocessor holds at least; a kernel file may define it anew
#define KERNEL(name, Args, threads) \
    extern "C" __global__ void __launch_bounds__(threads, RESIDENT) name(const __grid_constant__ Args a)
#define CLUSTER_KERNEL(name, Args, threads, blocks) \
    extern "C" __global__ void __cluster_dims__(blocks) __launch_bounds__(threads, RESIDENT) \
        name(const __grid_constant__ Args a)
static __device__ __forceinline__ float half_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
static __device__ __forceinline__ uint16_t float_to_half(float f) { return __half_as_ushort(__float2half_rn(f)); }
static __device__ __forceinline__ int dp4a(int a, int b, int c) { return __dp4a(a, b, c); }
// Four of the eight bytes of `low` and `high`: nibble i of the selectors says which one is byte i; with its upper bit
// set, that byte is filled with the sign of the chosen one. The selectors' upper half does not count.
static __device__ __forceinline__ unsigned pick_bytes(unsigned low, unsigned high, unsigned selectors) {
    unsigned out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selectors));
    return out;
}
// Weights are read once: they do not stay in the first-level cache.
static __device__ __forceinline__ uint4 load_once(const uint4* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
// For kernels that overlap (programmatic dependent launch). Do not read what an earlier kernel wrote before the wait,
// which returns at once in a kernel launched without overlap. Each kernel triggers the next launch only after its own
// wait, so at most two kernels run at a time: all but the immediate predecessor have finished.
static __device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
static __device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }
// Prefetches global memory into L2; `p` and `bytes` are multiples of 16.
static __device__ __forceinline__ void ask_for(const void* p, unsigned bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(p), "r"(bytes) : "memory");
}
template <class T>
static __device__ __forceinline__ T load_shared_by_blocks(const T* p) { return __ldcg(p); }
// Starts an asynchronous copy of 16 bytes from global to shared memory; copies_done() waits for the thread's copies.
static __device__ __forceinline__ void copy_piece(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :: "r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
}
static __device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// A barrier of all threads of a cluster in two halves; what was written before the first is seen after the second.
static __device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
static __device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// The same place in the dynamic shared memory of another block of the cluster.
template <class T>
static __device__ __forceinline__ T* in_block(T* p, unsigned rank) {
    T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
    return there;
}
extern __shared__ __align__(128) unsigned char prill_dynamic_shared[];
#define dynamic_shared_memory() (prill_dynamic_shared)
#endif

#define INFINITY_BITS 0x7F800000u

static __device__ __forceinline__ float bf16_to_float(uint16_t b) { return __uint_as_float((unsigned)b << 16); }
static __device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000u); }

// Sum over the lanes of a warp, the same bits in every lane.
template <class T>
static __device__ __forceinline__ T warp_sum(T value) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
    return value;
}

static __device__ __forceinline__ float warp_max(float value) {
    for (int step = 16; step; step >>= 1) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, step));
    return value;
}

// Lane 8r of the warp gets the sum of total[r] over all lanes, r below 4; six shuffles for the four of them.
static __device__ __forceinline__ float four_sums(const float* total) {
    const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
    float first = upper ? total[2] : total[0], second = upper ? total[3] : total[1];
    first += __shfl_xor_sync(0xFFFFFFFFu, upper ? total[0] : total[2], 16);
    second += __shfl_xor_sync(0xFFFFFFFFu, upper ? total[1] : total[3], 16);
    float sum = odd ? second : first;
    sum += __shfl_xor_sync(0xFFFFFFFFu, odd ? first : second, 8);
    for (int step = 4; step; step >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    return sum;
}

// Sum over a block of whole warps, at most 32 of them; `shared` holds one value per warp.
template <class T>
static __device__ __forceinline__ T block_sum(T value, T* shared) {
    value = warp_sum(value);
    const unsigned warps = blockDim.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < warps ? shared[threadIdx.x % 32] : T(0));
}

static __device__ __forceinline__ float block_max(float value, float* shared) {
    value = warp_max(value);
    const unsigned warps = blockDim.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    float top = shared[0];
    for (unsigned w = 1; w < warps; ++w) top = fmaxf(top, shared[w]);
    return top;
}

// Cosine and sine of a position's angle, times `scale`; in float64 from a frequency the host made: float32 has none
// for a late one.
static __device__ __forceinline__ float2 turn_of(int position, double frequency, float scale) {
    const double angle = position * frequency;
    return make_float2((float)cos(angle) * scale, (float)sin(angle) * scale);
}

// What lies in the place of an id that was not chosen.
enum Wrong { NOT_FINITE = -1, ALL_MASKED = -2, UNDECIDED = -3, REFUSED = -4 };  // REFUSED - 2 id, 1 less for NaN

// One sequence: where its cache lies and where it stands; kept in device memory, advanced by the last kernel.
struct Sequence {
    float* keys;      // (layer, kv_head, capacity, dim)
    float* values;
    int capacity;
    int length;       // committed positions
    int offset;       // position of row 0
    int token;        // the id to feed next
    int step;         // tokens chosen since the sequence was armed
};
