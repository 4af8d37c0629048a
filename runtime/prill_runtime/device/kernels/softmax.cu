// exp(x - max) / sum over rows; minus infinity gives 0, a row of nothing else NaN. One block a row.
#include "common.cuh"

struct SoftmaxArgs {
    const float* x;  // (row, width)
    float* out;      // (row, width)
    int width;
};

KERNEL(softmax, SoftmaxArgs, 256) {
    __shared__ float shared[32];
    const float* x = a.x + (long long)blockIdx.x * a.width;
    float* out = a.out + (long long)blockIdx.x * a.width;
    float top = minus_infinity(), sum = 0.0f;
    for (int i = threadIdx.x; i < a.width; i += blockDim.x) top = fmaxf(top, x[i]);
    top = block_max(top, shared);
    for (int i = threadIdx.x; i < a.width; i += blockDim.x) sum += expf(x[i] - top);
    sum = block_sum(sum, shared);
    for (int i = threadIdx.x; i < a.width; i += blockDim.x) out[i] = expf(x[i] - top) / sum;
}
