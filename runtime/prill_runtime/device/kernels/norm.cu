// RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016) of rows; one block a row.
#include "common.cuh"

struct NormArgs {
    const float* x;         // (row, width)
    const float* weight;    // (width,)
    const float* bias;      // (width,), LayerNorm alone
    const float* residual;  // (row, width) to which it is added, RMSNorm alone, or null; may be out
    float* out;             // (row, width)
    int width;
    float eps;
};

KERNEL(rms_norm, NormArgs, 256) {
    __shared__ float shared[32];
    const float* x = a.x + (long long)blockIdx.x * a.width;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < a.width; i += blockDim.x) squares += x[i] * x[i];
    const float root = sqrtf(block_sum(squares, shared) / a.width + a.eps);
    float* out = a.out + (long long)blockIdx.x * a.width;
    const float* residual = a.residual ? a.residual + (long long)blockIdx.x * a.width : nullptr;
    for (int i = threadIdx.x; i < a.width; i += blockDim.x) {
        const float y = x[i] / root * a.weight[i];
        out[i] = residual ? residual[i] + y : y;
    }
}

KERNEL(layer_norm, NormArgs, 256) {
    __shared__ float shared[32];
    const float* x = a.x + (long long)blockIdx.x * a.width;
    float sum = 0.0f, squares = 0.0f;
    for (int i = threadIdx.x; i < a.width; i += blockDim.x) sum += x[i];
    const float mean = block_sum(sum, shared) / a.width;
    for (int i = threadIdx.x; i < a.width; i += blockDim.x) squares += (x[i] - mean) * (x[i] - mean);
    const float root = sqrtf(block_sum(squares, shared) / a.width + a.eps);
    float* out = a.out + (long long)blockIdx.x * a.width;
    for (int i = threadIdx.x; i < a.width; i += blockDim.x) out[i] = (x[i] - mean) / root * a.weight[i] + a.bias[i];
}
