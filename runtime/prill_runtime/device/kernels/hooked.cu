// Dense stages of a decode step with every hook of fused.cuh: biases, LayerNorm, GELU, pairs half a head apart.
#define MOST 512
#define MOST_EXACT 256
#include "fused.cuh"

template <class Format>
static __device__ __forceinline__ void hooked_exact(const FusedArgs& a) { fused<Format, false, true>(a); }
template <class Format>
static __device__ __forceinline__ void hooked_fast(const FusedArgs& a) { fused<Format, true, true>(a); }

KERNELS_OF_VALUES(hooked_exact, FusedArgs, MOST)
KERNELS_OF_BLOCKS(hooked_fast, FusedArgs, MOST)
#undef RESIDENT
#define RESIDENT 2
KERNELS_OF_BLOCKS(hooked_exact, FusedArgs, MOST_EXACT)
