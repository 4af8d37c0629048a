// Gated and plain activations (Shazeer 2020; GELU: Hendrycks and Gimpel 2016), sums, multiples, values within a cap,
// and rows copied out of wider ones.
#include "common.cuh"

struct ElementArgs {
    const float* x;
    const float* y;
    float* out;
    long long count;
    int width;      // of a row of `out`
    int pitch;      // of a row of `x`, in copy_rows
};

struct NumberArgs {
    const float* x;
    const float* y;
    float* out;
    long long count;
    float by;     // a factor, a cap or a limit
    float alpha;  // in swiglu_clamped
};

KERNEL(swiglu, ElementArgs, 256) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count) a.out[i] = a.x[i] / (1.0f + expf(-a.x[i])) * a.y[i];
}

static __device__ __forceinline__ float gelu(float x) {
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * (x * x * x))));
}

KERNEL(gelu_tanh, ElementArgs, 256) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count) a.out[i] = gelu(a.x[i]);
}

KERNEL(geglu, ElementArgs, 256) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count) a.out[i] = gelu(a.x[i]) * a.y[i];
}

KERNEL(gelu_erf, ElementArgs, 256) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count) a.out[i] = 0.5f * a.x[i] * (1.0f + erff(a.x[i] * 0.7071067811865476f));
}

KERNEL(swiglu_clamped, NumberArgs, 256) {  // gpt-oss: the gate has no lower limit
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.count) return;
    const float gate = fminf(a.x[i], a.by), up = fmaxf(fminf(a.y[i], a.by), -a.by);
    a.out[i] = gate / (1.0f + expf(-a.alpha * gate)) * (up + 1.0f);
}

KERNEL(scale, NumberArgs, 256) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count) a.out[i] = a.x[i] * a.by;
}

KERNEL(softcap, NumberArgs, 256) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count) a.out[i] = a.by * tanhf(a.x[i] / a.by);
}

KERNEL(add, ElementArgs, 256) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count) a.out[i] = a.x[i] + a.y[i];
}

KERNEL(copy_rows, ElementArgs, 256) {  // the first `width` values of rows that are `pitch` apart
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count) a.out[i] = a.x[i / a.width * a.pitch + i % a.width];
}
