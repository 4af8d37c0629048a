// Products of tiles in half precision, summed in float32: what the tensor cores do, with a fallback on the host.
//
// A tile holds rows of 64 halves, 128 bytes each; the 16-byte piece p of row r lies at p ^ r % 8, so that eight rows
// of one piece touch every bank once. Tiles begin at multiples of 1024 bytes: this is the 128-byte swizzle that
// warpgroup products read by themselves. PRILL_WARPGROUP chooses them; else warps load fragments and multiply.
#pragma once

#include "formats.cuh"

#ifndef PRILL_WARPGROUP
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PRILL_WARPGROUP 1
#else
#define PRILL_WARPGROUP 0
#endif
#endif

#ifdef PRILL_EMU
typedef unsigned char* SharedAt;
static inline SharedAt shared_at(void* p) { return static_cast<SharedAt>(p); }
static inline unsigned char* aligned_1024(unsigned char* p) { return p + (-reinterpret_cast<uintptr_t>(p) & 1023); }
static inline void store_16(SharedAt to, uint4 v) { memcpy(to, &v, 16); }
static inline uint4 load_16(SharedAt from) {
    uint4 v;
    memcpy(&v, from, 16);
    return v;
}
static inline void store_8(SharedAt to, uint2 v) { memcpy(to, &v, 8); }
static inline void copy_16(SharedAt to, const void* from, int bytes) {
    memset(to, 0, 16);
    memcpy(to, from, bytes);
}
static inline void copies_end() {}
template <int N>
static inline void copies_wait() {}
static inline void stores_fence() {}
static inline unsigned pack_halves(float low, float high) {
    return float_to_half(low) | (unsigned)float_to_half(high) << 16;
}
static inline unsigned multiply_halves(unsigned a, unsigned b) {
    return pack_halves(half_to_float((uint16_t)a) * half_to_float((uint16_t)b),
                       half_to_float((uint16_t)(a >> 16)) * half_to_float((uint16_t)(b >> 16)));
}
static inline void load_fragments(unsigned* d, SharedAt at) {
    const int lane = threadIdx.x % 32;
    const emu::Given<SharedAt> rows(at);
    for (int j = 0; j < 4; ++j) memcpy(d + j, rows.by(8 * j + lane / 4) + lane % 4 * 4, 4);
}
static inline void load_fragments_across(unsigned* d, SharedAt at) {
    const int lane = threadIdx.x % 32;
    const emu::Given<SharedAt> rows(at);
    for (int j = 0; j < 4; ++j) {
        uint16_t both[2];
        for (int i = 0; i < 2; ++i) memcpy(both + i, rows.by(8 * j + lane % 4 * 2 + i) + lane / 4 * 2, 2);
        d[j] = both[0] | (unsigned)both[1] << 16;
    }
}
static inline float2 halves(unsigned both) {
    return {half_to_float((uint16_t)both), half_to_float((uint16_t)(both >> 16))};
}
static inline float dot(float2 a, float2 b) { return a.x * b.x + a.y * b.y; }
static inline float dot_halves(unsigned a, unsigned b) { return dot(halves(a), halves(b)); }
struct Fragments {
    float2 a[4], b[2];
};
static inline void multiply_fragments(float* d, const unsigned* a, const unsigned* b) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const emu::Given<Fragments> lanes({{halves(a[0]), halves(a[1]), halves(a[2]), halves(a[3])},
                                       {halves(b[0]), halves(b[1])}});
    for (int q = 0; q < 4; ++q) {
        const Fragments rows = lanes.by(4 * g + q), left = lanes.by(8 * t + q), right = lanes.by(8 * t + 4 + q);
        d[0] += dot(rows.a[0], left.b[0]) + dot(rows.a[2], left.b[1]);
        d[1] += dot(rows.a[0], right.b[0]) + dot(rows.a[2], right.b[1]);
        d[2] += dot(rows.a[1], left.b[0]) + dot(rows.a[3], left.b[1]);
        d[3] += dot(rows.a[1], right.b[0]) + dot(rows.a[3], right.b[1]);
    }
}
// What the tensor cores read: the pieces of a row exchanged by bits 7 to 9 of the address.
static inline unsigned swizzled_word(SharedAt tile, int row, int word) {
    uintptr_t at = reinterpret_cast<uintptr_t>(tile) + row * 128 + word * 4;
    unsigned value;
    memcpy(&value, reinterpret_cast<void*>(at ^ (at >> 7 & 7) << 4), 4);
    return value;
}
static inline void warpgroup_begin() {}
static inline void warpgroup_end() {}
static inline void warpgroup_wait() {}
static inline void hold(float&) {}
// d (64, N) += a (64, 16) times b (N, 16) transposed, as this thread holds it.
template <int N>
static inline void warpgroup_multiply(float* d, SharedAt a, SharedAt b) {
    const int thread = threadIdx.x % 128, g = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (int i = 0; i < N / 2; ++i) {
        const int row = g + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
        for (int w = 0; w < 8; ++w) d[i] += dot_halves(swizzled_word(a, row, w), swizzled_word(b, column, w));
    }
}
#else
typedef uint32_t SharedAt;
static __device__ __forceinline__ SharedAt shared_at(void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ unsigned char* aligned_1024(unsigned char* p) {
    return p + (-(unsigned)__cvta_generic_to_shared(p) & 1023u);
}
static __device__ __forceinline__ void store_16(SharedAt to, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
static __device__ __forceinline__ uint4 load_16(SharedAt from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}
static __device__ __forceinline__ void store_8(SharedAt to, uint2 v) {
    asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(to), "r"(v.x), "r"(v.y) : "memory");
}
// Copies `bytes` (16 or 0) without waiting and fills up with zeros.
static __device__ __forceinline__ void copy_16(SharedAt to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
static __device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
static __device__ __forceinline__ unsigned pack_halves(float low, float high) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
static __device__ __forceinline__ unsigned multiply_halves(unsigned a, unsigned b) {
    unsigned both;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
    return both;
}
static __device__ __forceinline__ void load_fragments(unsigned* d, SharedAt at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at) : "memory");
}
static __device__ __forceinline__ void load_fragments_across(unsigned* d, SharedAt at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at) : "memory");
}
static __device__ __forceinline__ void multiply_fragments(float* d, const unsigned* a, const unsigned* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#if PRILL_WARPGROUP
static __device__ __forceinline__ void stores_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
static __device__ __forceinline__ void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void warpgroup_end() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
static __device__ __forceinline__ void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
static __device__ __forceinline__ void hold(float& d) { asm volatile("" : "+f"(d)::"memory"); }
// Rows 128 bytes long, eight of them 1024 bytes, swizzled by 128 bytes.
static __device__ __forceinline__ uint64_t description(SharedAt tile) {
    return (uint64_t)((tile & 0x3FFFFu) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D32(i) D16(i), D16(i + 16)
#define P32                                                                                              \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
    "%27,%28,%29,%30,%31"
#define P64                                                                                                   \
    P32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
        "%57,%58,%59,%60,%61,%62,%63"
#define P128                                                                                                  \
    P64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
        "%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,"  \
        "%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// d (64, N) += a (64, 16) times b (N, 16) transposed, as this thread holds it.
template <int N>
static __device__ __forceinline__ void warpgroup_multiply(float* d, SharedAt a_tile, SharedAt b_tile) {
    const uint64_t a = description(a_tile), b = description(b_tile);
    if constexpr (N == 64)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" P32 "}, %32, %33, 1, 1, 1, 0, 0;"
                     : D32(0) : "l"(a), "l"(b));
    else if constexpr (N == 128)
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" P64 "}, %64, %65, 1, 1, 1, 0, 0;"
                     : D32(0), D32(32) : "l"(a), "l"(b));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" P128 "}, %128, %129, 1, 1, 1, 0, 0;"
                     : D32(0), D32(32), D32(64), D32(96) : "l"(a), "l"(b));
}
#else
static __device__ __forceinline__ void stores_fence() {}
#endif
#endif
