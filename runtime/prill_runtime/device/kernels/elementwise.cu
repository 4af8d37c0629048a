// SwiGLU (Shazeer 2020), tanh GELU (Hendrycks and Gimpel 2016), sums, and rows copied out of wider ones.
#include "common.cuh"

struct ElementArgs {
    const float* x;
    const float* y;
    float* out;
    long long count;
    int width;      // of a row of `out`
    int pitch;      // of a row of `x`, in copy_rows
};

KERNEL(swiglu, ElementArgs, 256) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count) a.out[i] = a.x[i] / (1.0f + expf(-a.x[i])) * a.y[i];
}

KERNEL(gelu_tanh, ElementArgs, 256) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.count) return;
    const float x = a.x[i];
    a.out[i] = 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * (x * x * x))));
}

KERNEL(add, ElementArgs, 256) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count) a.out[i] = a.x[i] + a.y[i];
}

KERNEL(copy_rows, ElementArgs, 256) {  // the first `width` values of rows that are `pitch` apart
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count) a.out[i] = a.x[i / a.width * a.pitch + i % a.width];
}
