// A kernel and its launch shape go in; its effect on host memory comes out: blocks in turn, threads as fibers.
//
// A thread runs until it returns, meets a barrier, or a shuffle; then the next one runs. A barrier that not
// every thread of the block (or lane of the warp) reaches is reported, not waited for. PRILL_EMU_ORDER=reverse
// runs the threads of a block from last to first: a result that changes lacks a barrier. The blocks of a cluster
// run together, each with dynamic shared memory of its own; other shared memory they must not have.
//
// Nothing starts as zero: before a block runs, its shared memory and every other static of the kernels is filled
// with NaN (bytes 0xFF), and what it wrote behind its dynamic shared memory is reported. A lane that takes no part
// in a shuffle gives NaN. Local variables are filled by the compiler (flags in compile.py) with its bytes, 0xFE.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __device__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static

struct uint3 { unsigned x, y, z; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }

// The emulator's own variables: apart from the kernels' statics, which lie in the library's zeroed memory, all of it.
#define EMU_OWN __attribute__((section("emu_own"))) static

EMU_OWN uint3 threadIdx, blockIdx, blockDim, gridDim;
extern "C" {
extern unsigned char __bss_start[] __attribute__((visibility("hidden"))), _end[] __attribute__((visibility("hidden")));
}

namespace emu {

enum Wait { RUN, BLOCK, WARP, CLUSTER, DONE };
constexpr unsigned MAX_THREADS = 2048, MAX_CLUSTER = 8;  // threads of a cluster, and its blocks
constexpr size_t MOST_SHARED = 256 << 10, GUARD = 1024;  // bytes of dynamic shared memory of a block, and behind it
constexpr size_t MOST_GIVEN = 48;  // bytes that a lane gives to the others at once
constexpr int POISON = 0xFF;
#ifdef EMU_ASAN
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = (64 << 10) + 320;  // tops that share no cache set
#endif

struct Fiber {
#if defined(__x86_64__)
    void* sp;
#else
    ucontext_t context;
#endif
    uint3 index;
    unsigned rank;  // of its block in the cluster
    Wait wait;
    unsigned exchanges;
    unsigned waits;  // at barriers of the cluster
    void* fake;
};

struct Machine {
    alignas(128) unsigned char dynamic_shared[MAX_CLUSTER][MOST_SHARED + GUARD];
    unsigned char slots[2][MAX_THREADS][MOST_GIVEN];
    Fiber fibers[MAX_THREADS];
};

EMU_OWN char* stacks;
EMU_OWN unsigned char (*dynamic_shared)[MOST_SHARED + GUARD];
EMU_OWN unsigned char (*slots)[MAX_THREADS][MOST_GIVEN];
EMU_OWN Fiber* fibers;
EMU_OWN Fiber host;
EMU_OWN Fiber* current;
EMU_OWN void (*body)(const void*);
EMU_OWN const void* arguments;
EMU_OWN unsigned first_block;  // blockIdx.x of the cluster's first block
EMU_OWN unsigned members, arrivals;  // threads of the cluster, and how often they arrived at its barrier
EMU_OWN bool moved;                  // whether a thread ran
EMU_OWN Fiber* last;                 // of the warp that runs, in the order of its lanes
EMU_OWN int onward;                  // from a lane to the next

#if defined(__x86_64__)
__attribute__((naked, noinline)) static void swap(void**, void*) {
    asm("push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
}
#endif

static char* stack_of(const Fiber* f) { return stacks + (f - fibers) * STACK; }

static void jump(Fiber* from, Fiber* to, [[maybe_unused]] bool for_good = false) {
#ifdef EMU_ASAN
    EMU_OWN const void* host_bottom;
    EMU_OWN size_t host_size;
    EMU_OWN bool from_host;
    from_host = from == &host;
    const void* bottom = to == &host ? host_bottom : stack_of(to);
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from->fake, bottom, to == &host ? host_size : STACK);
#endif
#if defined(__x86_64__)
    swap(&from->sp, to->sp);
#else
    swapcontext(&from->context, &to->context);
#endif
#ifdef EMU_ASAN
    const void* old_bottom;
    size_t old_size;
    __sanitizer_finish_switch_fiber(from->fake, &old_bottom, &old_size);
    if (from_host) host_bottom = old_bottom, host_size = old_size;
#endif
}

static void enter(Fiber* f) {
    current = f;
    threadIdx = f->index;
    blockIdx.x = first_block + f->rank;
}

// From a lane that ended or waits to the next one of its warp that can run at once, else to the scheduler.
static void leave(Wait why) {
    Fiber *self = current, *next = self + onward;
    self->wait = why;
    if (self == last || next->wait != RUN) return jump(self, &host, why == DONE);
    enter(next);
    jump(self, next, why == DONE);
}

static void entry() {
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    body(arguments);
    leave(DONE);
    abort();
}

static void start(Fiber* f, uint3 index, unsigned rank) {
    f->index = index;
    f->rank = rank;
    f->wait = RUN;
    f->exchanges = f->waits = 0;
    f->fake = nullptr;
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(stack_of(f) + STACK - 4096, 4096);  // what the last thread's switch left behind
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack_of(f) + STACK);
    top[-2] = reinterpret_cast<void*>(entry);
    f->sp = top - 8;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = stack_of(f);
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = nullptr;
    makecontext(&f->context, entry, 0);
#endif
}

static void resume(Fiber* f) {
    enter(f);
    jump(&host, f);
}

static bool have_arrived(const Fiber* f) { return arrivals >= f->waits * members; }

// Runs lanes [low, high) until each is done or at a barrier of the block; false: some wait for lanes that do not come.
static bool run_warp(unsigned low, unsigned high, bool reverse) {
    last = fibers + (reverse ? low : high - 1), onward = reverse ? -1 : 1;
    while (true) {
        unsigned stands[DONE + 1] = {}, late = 0;
        for (unsigned i = 0; i < high - low; ++i) {
            Fiber* f = fibers + (reverse ? high - 1 - i : low + i);
            if (f->wait == CLUSTER && have_arrived(f)) f->wait = RUN;
            if (f->wait == RUN) moved = true, resume(f);
            ++stands[f->wait];
        }
        for (unsigned t = low; t < high && stands[CLUSTER]; ++t)
            late += fibers[t].wait == CLUSTER && have_arrived(fibers + t);
        if (late) continue;  // the last of the cluster to arrive was a later lane
        if (!stands[WARP]) return true;
        if (stands[BLOCK] || stands[CLUSTER]) return false;
        for (unsigned t = low; t < high; ++t)
            if (fibers[t].wait == WARP) fibers[t].wait = RUN;
    }
}

static unsigned waiting(unsigned low, unsigned high, Wait why) {
    unsigned count = 0;
    for (unsigned t = low; t < high; ++t) count += fibers[t].wait == why;
    return count;
}

static bool run_cluster(unsigned blocks, unsigned threads, bool reverse) {
    for (unsigned t = 0; t < threads; ++t) {
        unsigned x = t % blockDim.x, y = t / blockDim.x % blockDim.y, z = t / blockDim.x / blockDim.y;
        for (unsigned b = 0; b < blocks; ++b) start(fibers + b * threads + t, {x, y, z}, b);
    }
    const unsigned warps = (threads + 31) / 32;
    members = blocks * threads, arrivals = 0;
    while (true) {
        moved = false;
        for (unsigned n = 0; n < blocks; ++n) {
            const unsigned first = (reverse ? blocks - 1 - n : n) * threads, end = first + threads;
            for (unsigned i = 0; i < warps; ++i) {
                const unsigned low = first + (reverse ? warps - 1 - i : i) * 32;
                if (!run_warp(low, low + 32 < end ? low + 32 : end, reverse)) return false;
            }
            if (waiting(first, end, BLOCK) != threads) continue;
            for (unsigned t = first; t < end; ++t) fibers[t].wait = RUN;
        }
        if (!moved) return waiting(0, members, DONE) == members;
    }
}

// Memory for the machine and the threads' stacks, once.
static bool begun() {
    if (stacks) return true;
    const size_t own = (sizeof(Machine) + 4095) & ~size_t(4095);
    void* mapped =
        mmap(nullptr, own + STACK * MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return false;
    Machine* machine = static_cast<Machine*>(mapped);
    dynamic_shared = machine->dynamic_shared, slots = machine->slots, fibers = machine->fibers;
    stacks = static_cast<char*>(mapped) + own;
    return true;
}

// All statics of the kernels: static shared memory, and whatever else they would carry from block to block.
#ifdef EMU_ASAN
__attribute__((no_sanitize_address)) static void poison_statics() {
    for (volatile unsigned char* p = __bss_start; p < _end; ++p) *p = POISON;  // gaps between them included
}
#else
static void poison_statics() { memset(__bss_start, POISON, _end - __bss_start); }
#endif

static bool kept_within(const unsigned char* behind) {
    for (size_t i = 0; i < GUARD; ++i)
        if (behind[i] != POISON) return false;
    return true;
}

// shape: grid x y z, block x y z, bytes of dynamic shared memory, reverse order. 0; 1: a barrier not everybody
// reaches; 2: bad shape; 3: written behind dynamic shared memory.
static int run(void (*kernel)(const void*), const void* args, const unsigned* shape, unsigned most, unsigned cluster) {
    gridDim = {shape[0], shape[1], shape[2]};
    blockDim = {shape[3], shape[4], shape[5]};
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    if (!threads || threads > most || cluster * threads > MAX_THREADS || shape[6] > MOST_SHARED) return 2;
    if (cluster > 1 && (threads % 32 || gridDim.x % cluster)) return 2;
    if (!begun()) return 2;
    body = kernel;
    arguments = args;
    for (unsigned z = 0; z < gridDim.z; ++z)
        for (unsigned y = 0; y < gridDim.y; ++y)
            for (unsigned x = 0; x < gridDim.x; x += cluster) {
                blockIdx = {first_block = x, y, z};
                poison_statics();
                for (unsigned b = 0; b < cluster; ++b) memset(dynamic_shared[b], POISON, shape[6] + GUARD);
                if (!run_cluster(cluster, threads, shape[7] != 0)) return 1;
                for (unsigned b = 0; b < cluster; ++b)
                    if (!kept_within(dynamic_shared[b] + shape[6])) return 3;
            }
    return 0;
}

// What each lane of the warp gave to one exchange: all of it can be read until this lane gives the next time.
template <class T>
class Given {
  public:
    explicit Given(const T& value) {
        static_assert(sizeof(T) <= MOST_GIVEN, "a lane gives less at once");
        memcpy(slots[current->exchanges++ % 2][current - fibers], &value, sizeof value);
        leave(WARP);
    }
    T by(unsigned lane) const {
        const unsigned self = static_cast<unsigned>(current - fibers), giver = self - self % 32 + lane;
        T got;
        // Nobody there, or gone before this exchange.
        if (giver >= members || fibers[giver].exchanges < current->exchanges) memset(&got, POISON, sizeof got);
        else memcpy(&got, slots[(current->exchanges - 1) % 2][giver], sizeof got);
        return got;
    }
};

template <class T>
static T exchange(T value, unsigned (*source)(unsigned, unsigned), unsigned by) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    const Given<T> given(value);
    const unsigned from = source(static_cast<unsigned>(current - fibers) % 32, by);
    return from < 32 ? given.by(from) : value;
}

}  // namespace emu

static inline void __syncthreads() { emu::leave(emu::BLOCK); }
static inline void __syncwarp(unsigned = 0xFFFFFFFFu) { emu::leave(emu::WARP); }
static inline void __threadfence() {}
template <class T>
static T __shfl_xor_sync(unsigned, T value, int mask) {
    return emu::exchange(value, [](unsigned lane, unsigned by) { return lane ^ by; }, mask);
}
template <class T>
static T __shfl_down_sync(unsigned, T value, int by) {
    return emu::exchange(value, [](unsigned lane, unsigned n) { return lane + n; }, by);
}
template <class T>
static T __shfl_sync(unsigned, T value, int from) {
    return emu::exchange(value, [](unsigned, unsigned lane) { return lane % 32; }, from);
}
static inline unsigned atomicAdd(unsigned* at, unsigned by) {
    unsigned was = *at;
    *at += by;
    return was;
}
static inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long by) {
    unsigned long long was = *at;
    *at += by;
    return was;
}
static inline void atomicMin(unsigned long long* at, unsigned long long value) { *at = value < *at ? value : *at; }
static inline void atomicMax(unsigned long long* at, unsigned long long value) { *at = value > *at ? value : *at; }
static inline int __clzll(long long bits) { return __builtin_clzll(static_cast<unsigned long long>(bits)); }
static inline double __dmul_rn(double x, double y) { return x * y; }
static inline long long __double_as_longlong(double d) {
    long long bits;
    memcpy(&bits, &d, 8);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline unsigned __float_as_uint(float f) {
    unsigned bits;
    memcpy(&bits, &f, 4);
    return bits;
}
static inline int __float2int_rn(float f) { return static_cast<int>(nearbyintf(f)); }
static inline float half_to_float(uint16_t h) {
    // Exponent and mantissa moved into place, then scaled by 2^112: denormals come out right by themselves.
    const float scaled = __uint_as_float((h & 0x7FFFu) << 13) * __uint_as_float(0x77800000u);
    const unsigned special = (h & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;
    return __uint_as_float(__float_as_uint(scaled) | special | (h & 0x8000u) << 16);
}
static inline uint16_t float_to_half(float f) {
    const unsigned bits = __float_as_uint(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude >= 0x7F800000u) return sign | 0x7C00u | (magnitude > 0x7F800000u ? 0x200u : 0u);
    if (magnitude >= 0x477FF000u) return sign | 0x7C00u;
    if (magnitude < 0x38800000u)  // a denormal half: adding 1/2 leaves its bits, rounded to even, at the bottom
        return sign | static_cast<uint16_t>(__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000u);
    return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13);
}
static inline int dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
    return c;
}
static inline unsigned pick_bytes(unsigned low, unsigned high, unsigned selectors) {
    const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned selector = selectors >> 4 * i & 15u, byte = static_cast<unsigned>(bytes >> 8 * (selector & 7u)) & 255u;
        out |= (selector < 8 ? byte : byte >> 7 ? 255u : 0u) << 8 * i;
    }
    return out;
}
static inline uint4 load_once(const uint4* p) { return *p; }
static inline void ask_for(const void* p, unsigned bytes) { (void)*(static_cast<const volatile char*>(p) + bytes - 1); }
static inline void wait_for_previous() {}
static inline void let_next_start() {}
template <class T>
static T load_shared_by_blocks(const T* p) { return *p; }
static inline void copy_piece(void* shared, const void* global) { memcpy(shared, global, 16); }
static inline void copies_done() {}
static inline void cluster_arrive() { ++emu::arrivals; }
static inline void cluster_wait() {
    ++emu::current->waits;
    if (!emu::have_arrived(emu::current)) emu::leave(emu::CLUSTER);
}
template <class T>
static T* in_block(T* p, unsigned rank) {
    const auto* mine = emu::dynamic_shared[emu::current->rank];
    return reinterpret_cast<T*>(emu::dynamic_shared[rank] + (reinterpret_cast<const unsigned char*>(p) - mine));
}
#define dynamic_shared_memory() (emu::dynamic_shared[emu::current->rank])
#define KERNEL(name, Args, threads) CLUSTER_KERNEL(name, Args, threads, 1)
#define CLUSTER_KERNEL(name, Args, threads, blocks)                                                         \
    static void name(const Args& a);                                                                        \
    extern "C" int emu_##name(const void* p, const unsigned* shape) {                                       \
        return emu::run([](const void* q) { name(*static_cast<const Args*>(q)); }, p, shape, threads, blocks); \
    }                                                                                                       \
    static void name(const Args& a)
