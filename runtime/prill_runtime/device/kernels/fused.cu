// Dense stages of a decode step for models with RMSNorm, SiLU and gates, without biases.
#define MOST 512
#define MOST_EXACT 256
#include "fused.cuh"

template <class Format>
static __device__ __forceinline__ void fused_exact(const FusedArgs& a) { fused<Format, false, false>(a); }
template <class Format>
static __device__ __forceinline__ void fused_fast(const FusedArgs& a) { fused<Format, true, false>(a); }

KERNELS_OF_VALUES(fused_exact, FusedArgs, MOST)
KERNELS_OF_BLOCKS(fused_fast, FusedArgs, MOST)
#undef RESIDENT
#define RESIDENT 2
KERNELS_OF_BLOCKS(fused_exact, FusedArgs, MOST_EXACT)
