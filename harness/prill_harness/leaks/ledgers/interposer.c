/* Calls of the allocation families go in; exact live blocks and bytes by size class come out.
 *
 * Preloaded. Every call is passed on to the next allocator; what malloc_usable_size says of the block is added
 * to, or taken from, a shard of counters chosen by thread. No table of addresses, no lock, nothing on the heap:
 * correct through fork, and a block freed by another thread than its own balances in the sum of the shards.
 *
 * Anonymous and file mappings count by length; what libc maps for itself (heaps, thread stacks) is not seen
 * here and shows in the process ledger.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define LOCAL __thread __attribute__((tls_model("initial-exec")))
#define SHARDS 64
#define EXACT 64    /* classes of usable size 24, 40, ... 1032: one for each size malloc hands out */
#define DOUBLING 32 /* above: up to 2 KiB, 4 KiB, ... */
#define CLASSES (EXACT + DOUBLING)

struct count { atomic_long blocks, bytes; };
struct shard { struct count of[CLASSES]; } __attribute__((aligned(128)));

static struct shard shards[SHARDS];
static atomic_long mapped;
static atomic_uint threads_seen;
static LOCAL unsigned my_shard; /* 0: none yet; else shard + 1 */

/* --- whose code asks ------------------------------------------------------------------------------------- */

/* Executable ranges of loaded files. What lies in none of them (libc, the interpreter, this library) acts for its
 * caller, so the innermost frame that does lie in one decides whose an allocation, or a death, is. */
enum whose { NOBODY, LIBRARY, ENGINE };
#define CODES 1024
#define FRAMES 64
static struct { uintptr_t low, high; enum whose whose; } codes[CODES];
static int codes_count;
static LOCAL int looking;

/* Requests that a library promises to refuse with an error: a hash of its frames, innermost to where it was called. */
#define PROMISES 64
static uint64_t promised[PROMISES];
static int promised_count;
static atomic_int learning;

static enum whose whose_code(const void *frame)
{
    for (int n = 0; n < codes_count; n++)
        if ((uintptr_t)frame - codes[n].low < codes[n].high - codes[n].low)
            return codes[n].whose;
    return NOBODY;
}

/* Index of the frame that decides; -1 when all act for their callers. */
static int deciding(void *const *frames, int depth)
{
    for (int i = 0; i < depth; i++)
        if (whose_code(frames[i]) != NOBODY)
            return i;
    return -1;
}

static uint64_t hash_of(void *const *frames, int first, int depth)
{
    uint64_t hash = 14695981039346656037ULL;
    for (int i = first; i < depth && whose_code(frames[i]) == LIBRARY; i++)
        hash = (hash ^ (uintptr_t)frames[i]) * 1099511628211ULL;
    return hash;
}

static int promises(uint64_t hash)
{
    for (int n = 0; n < promised_count; n++)
        if (promised[n] == hash)
            return 1;
    return 0;
}

/* --- failing the Nth allocation ------------------------------------------------------------------------- */

static atomic_int fail_on;
static atomic_long fail_seen, fail_hits, spared_seen;
static long fail_nth;
static size_t fail_min;
static int fail_everywhere;
static LOCAL int fail_here;
static void *failed_at; /* the frame that asked for what was failed; NULL when all acted for their callers */

/* Whether the engine asks, or a library that promises to survive a refusal; *at: the frame that decides. */
static __attribute__((noinline)) int may_fail(void **at)
{
    void *frames[FRAMES];
    *at = NULL;
    if (!codes_count)
        return 1;
    looking = 1; /* what looking itself allocates is nobody's */
    int depth = backtrace(frames, FRAMES);
    looking = 0;
    int decides = deciding(frames, depth);
    if (decides < 0)
        return 1;
    *at = frames[decides];
    if (whose_code(*at) == ENGINE)
        return 1;
    uint64_t hash = hash_of(frames, decides, depth);
    if (atomic_load(&learning) && !promises(hash) && promised_count < PROMISES)
        promised[promised_count++] = hash;
    if (promises(hash))
        return 1;
    atomic_fetch_add(&spared_seen, 1);
    return 0;
}

static inline int fails(size_t size)
{
    void *at;
    if (__builtin_expect(!atomic_load_explicit(&fail_on, memory_order_relaxed), 1))
        return 0;
    if ((!fail_everywhere && !fail_here) || size < fail_min || looking || !may_fail(&at))
        return 0;
    if (atomic_fetch_add(&fail_seen, 1) + 1 != fail_nth)
        return 0;
    failed_at = at;
    atomic_fetch_add(&fail_hits, 1);
    errno = ENOMEM;
    return 1;
}

/* Fail the `nth` allocation from now on of at least `least` bytes; of every thread, or of this one alone.
 * nth 0 fails none and only counts; below 0 what libraries ask for is what they promise to survive from now on. */
EXPORT void prill_leaks_fail(long nth, long least, int everywhere)
{
    fail_nth = nth;
    fail_min = (size_t)least;
    fail_everywhere = everywhere;
    fail_here = 1;
    failed_at = NULL;
    atomic_store(&fail_seen, 0);
    atomic_store(&fail_hits, 0);
    atomic_store(&spared_seen, 0);
    atomic_store(&learning, nth < 0);
    atomic_store(&fail_on, 1);
}

/* Code from `low` up to `high` is a library's or the engine's; 0 when there is no room. */
EXPORT int prill_leaks_code(unsigned long low, unsigned long high, int whose)
{
    void *frame[1];
    if (codes_count == CODES)
        return 0;
    backtrace(frame, 1); /* loads what it needs now, not inside an allocation */
    codes[codes_count].low = low;
    codes[codes_count].high = high;
    codes[codes_count].whose = (enum whose)whose;
    codes_count++;
    return 1;
}

/* Allocations of libraries that were spared since the last `prill_leaks_fail`. */
EXPORT long prill_leaks_spared(void)
{
    return atomic_load(&spared_seen);
}

/* Stop failing; how many allocations were candidates, negative when one of them was failed. */
EXPORT long prill_leaks_fail_end(void)
{
    atomic_store(&fail_on, 0);
    fail_here = 0;
    long seen = atomic_load(&fail_seen);
    return atomic_load(&fail_hits) ? -seen : seen;
}

static void said(char *out, size_t room, const void *frame)
{
    Dl_info about;
    if (!frame || !dladdr(frame, &about) || !about.dli_fname) {
        out[0] = 0;
        return;
    }
    const char *name = strrchr(about.dli_fname, '/');
    name = name ? name + 1 : about.dli_fname;
    const char *function = about.dli_sname ? about.dli_sname : "";
    snprintf(out, room, "%s%s%s+0x%lx", function, *function ? " in " : "", name,
             (unsigned long)((uintptr_t)frame - (uintptr_t)about.dli_fbase));
}

/* Where the failed allocation was asked for: function, file and offset; empty when by the interpreter. */
EXPORT void prill_leaks_failed_at(char *out, long room)
{
    said(out, (size_t)room, failed_at);
}

/* --- the last word of a process that dies of a failed allocation ------------------------------------------ */

static const int DEADLY[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
#define DEADLIES (sizeof DEADLY / sizeof *DEADLY)
static struct sigaction before[DEADLIES];

static void died(int number)
{
    static const char *const whose[] = {"interpreter", "library", "engine"};
    void *frames[FRAMES];
    char where[512], line[640];
    for (size_t n = 0; n < DEADLIES; n++)
        sigaction(DEADLY[n], &before[n], NULL);
    if (atomic_load(&fail_hits)) {
        looking = 1;
        int depth = backtrace(frames, FRAMES);
        int decides = deciding(frames, depth);
        said(where, sizeof where, decides < 0 ? failed_at : frames[decides]);
        int length = snprintf(line, sizeof line, "prill: died in %s %s\n",
                              whose[decides < 0 ? NOBODY : whose_code(frames[decides])], where);
        if (write(STDERR_FILENO, line, (size_t)length) < 0)
            _exit(128 + number);
    }
    raise(number); /* to whoever listened before */
}

/* From now on a deadly signal after a failed allocation is preceded by a line on standard error. */
EXPORT void prill_leaks_last_word(void)
{
    struct sigaction ours = {.sa_handler = died, .sa_flags = SA_NODEFER | SA_ONSTACK};
    for (size_t n = 0; n < DEADLIES; n++)
        sigaction(DEADLY[n], &ours, &before[n]);
}

/* --- counting ------------------------------------------------------------------------------------------- */

static inline int class_of(size_t usable)
{
    if (usable <= 8 + 16 * (size_t)EXACT)
        return usable <= 24 ? 0 : (int)((usable - 9) / 16);
    size_t above = (usable - 1) >> 11; /* 0 for up to 2 KiB */
    int doubling = above ? 64 - __builtin_clzl(above) : 0;
    return EXACT + (doubling < DOUBLING ? doubling : DOUBLING - 1);
}

static inline struct shard *shard(void)
{
    if (__builtin_expect(!my_shard, 0))
        my_shard = 1 + atomic_fetch_add(&threads_seen, 1) % SHARDS;
    return &shards[my_shard - 1];
}

static inline void add(long blocks, size_t usable)
{
    struct count *c = &shard()->of[class_of(usable)];
    atomic_fetch_add_explicit(&c->blocks, blocks, memory_order_relaxed);
    atomic_fetch_add_explicit(&c->bytes, blocks * (long)usable, memory_order_relaxed);
}

static inline void *counted(void *block)
{
    if (block)
        add(1, malloc_usable_size(block));
    return block;
}

/* --- the next allocator --------------------------------------------------------------------------------- */

static void *(*next_malloc)(size_t);
static void *(*next_calloc)(size_t, size_t);
static void *(*next_realloc)(void *, size_t);
static void (*next_free)(void *);
static void *(*next_memalign)(size_t, size_t);
static void *(*next_aligned_alloc)(size_t, size_t);
static int (*next_posix_memalign)(void **, size_t, size_t);

/* dlsym may itself allocate: served from here, zeroed, never given back. */
static char bootstrap[16384] __attribute__((aligned(16)));
static atomic_size_t bootstrap_used;
static atomic_int resolved;
static LOCAL int resolving;

static int from_bootstrap(const void *block)
{
    return (uintptr_t)block - (uintptr_t)bootstrap < sizeof bootstrap;
}

static void *bootstrap_take(size_t size)
{
    size_t need = ((size + 15) & ~(size_t)15) + 16; /* the length lies in front */
    size_t at = atomic_fetch_add(&bootstrap_used, need);
    if (at + need > sizeof bootstrap)
        abort();
    *(size_t *)(bootstrap + at) = size;
    return bootstrap + at + 16;
}

static __attribute__((noinline)) void resolve(void)
{
    resolving = 1; /* two threads may do this at once: both find the same functions */
    next_calloc = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "calloc");
    next_realloc = (void *(*)(void *, size_t))dlsym(RTLD_NEXT, "realloc");
    next_free = (void (*)(void *))dlsym(RTLD_NEXT, "free");
    next_memalign = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "memalign");
    next_aligned_alloc = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
    next_posix_memalign = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    next_malloc = (void *(*)(size_t))dlsym(RTLD_NEXT, "malloc");
    atomic_store_explicit(&resolved, 1, memory_order_release);
    resolving = 0;
}

static inline int ready(void)
{
    if (__builtin_expect(atomic_load_explicit(&resolved, memory_order_acquire), 1))
        return 1;
    if (resolving)
        return 0;
    resolve();
    return 1;
}

/* --- the families --------------------------------------------------------------------------------------- */

EXPORT void *malloc(size_t size)
{
    if (!ready())
        return bootstrap_take(size);
    return fails(size) ? NULL : counted(next_malloc(size));
}

EXPORT void *calloc(size_t count, size_t size)
{
    if (!ready())
        return bootstrap_take(count * size);
    size_t whole;
    if (__builtin_mul_overflow(count, size, &whole))
        whole = SIZE_MAX;
    return fails(whole) ? NULL : counted(next_calloc(count, size));
}

EXPORT void free(void *block)
{
    if (!block || from_bootstrap(block) || !ready())
        return;
    add(-1, malloc_usable_size(block));
    next_free(block);
}

EXPORT void *realloc(void *block, size_t size)
{
    if (!block)
        return malloc(size);
    if (from_bootstrap(block)) {
        size_t before = *(size_t *)((char *)block - 16);
        void *moved = malloc(size);
        return moved ? memcpy(moved, block, before < size ? before : size) : NULL;
    }
    if (!ready() || (size && fails(size)))
        return NULL;
    size_t before = malloc_usable_size(block);
    void *moved = next_realloc(block, size);
    if (moved || !size)
        add(-1, before);
    return counted(moved);
}

EXPORT void *reallocarray(void *block, size_t count, size_t size)
{
    size_t whole;
    if (__builtin_mul_overflow(count, size, &whole)) {
        errno = ENOMEM;
        return NULL;
    }
    return realloc(block, whole);
}

EXPORT void *memalign(size_t alignment, size_t size)
{
    return !ready() || fails(size) ? NULL : counted(next_memalign(alignment, size));
}

EXPORT void *aligned_alloc(size_t alignment, size_t size)
{
    return !ready() || fails(size) ? NULL : counted(next_aligned_alloc(alignment, size));
}

EXPORT int posix_memalign(void **out, size_t alignment, size_t size)
{
    if (!ready() || fails(size))
        return ENOMEM;
    int code = next_posix_memalign(out, alignment, size);
    if (!code)
        counted(*out);
    return code;
}

EXPORT void *valloc(size_t size)
{
    return memalign((size_t)sysconf(_SC_PAGESIZE), size);
}

EXPORT void *pvalloc(size_t size)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return memalign(page, (size + page - 1) & ~(page - 1));
}

/* --- mappings: by length; a mapping put over another one (MAP_FIXED) adds nothing ------------------------ */

static long pages(size_t length)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (long)((length + page - 1) & ~(page - 1));
}

EXPORT void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
    if (fails(length))
        return MAP_FAILED;
    void *made = (void *)syscall(SYS_mmap, at, length, protection, flags, fd, offset);
    if (made != MAP_FAILED && !(flags & MAP_FIXED))
        atomic_fetch_add(&mapped, pages(length));
    return made;
}

EXPORT void *mmap64(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
    return mmap(at, length, protection, flags, fd, offset);
}

EXPORT int munmap(void *at, size_t length)
{
    int code = (int)syscall(SYS_munmap, at, length);
    if (!code)
        atomic_fetch_sub(&mapped, pages(length));
    return code;
}

EXPORT void *mremap(void *at, size_t before, size_t after, int flags, ...)
{
    void *target = NULL;
    if (flags & MREMAP_FIXED) {
        va_list rest;
        va_start(rest, flags);
        target = va_arg(rest, void *);
        va_end(rest);
    }
    if (after > before && fails(after))
        return MAP_FAILED;
    void *made = (void *)syscall(SYS_mremap, at, before, after, flags, target);
    if (made != MAP_FAILED)
        atomic_fetch_add(&mapped, pages(after) - pages(before));
    return made;
}

/* --- readings: none of them allocates -------------------------------------------------------------------- */

EXPORT int prill_leaks_classes(void)
{
    return CLASSES;
}

/* Largest usable size of a class; 0 for the last, which has no end. */
EXPORT long prill_leaks_class_size(int class)
{
    if (class < EXACT)
        return 24 + 16L * class;
    return class == CLASSES - 1 ? 0 : 2048L << (class - EXACT);
}

/* out: blocks of each class, then bytes of each class, then mapped bytes. */
EXPORT void prill_leaks_read(long *out)
{
    memset(out, 0, 2 * CLASSES * sizeof *out);
    for (int s = 0; s < SHARDS; s++)
        for (int c = 0; c < CLASSES; c++) {
            out[c] += atomic_load_explicit(&shards[s].of[c].blocks, memory_order_relaxed);
            out[CLASSES + c] += atomic_load_explicit(&shards[s].of[c].bytes, memory_order_relaxed);
        }
    out[2 * CLASSES] = atomic_load(&mapped);
}

static long field(const char *text, const char *name)
{
    const char *at = strstr(text, name);
    return at ? strtol(at + strlen(name), NULL, 10) : 0;
}

/* out: anonymous resident bytes, swapped bytes, threads, descriptors. */
EXPORT void prill_leaks_process(long *out)
{
    char text[8192];
    memset(out, 0, 4 * sizeof *out);
    int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        ssize_t length = read(fd, text, sizeof text - 1);
        close(fd);
        text[length > 0 ? length : 0] = 0;
        out[0] = 1024 * field(text, "\nRssAnon:");
        out[1] = 1024 * field(text, "\nVmSwap:");
        out[2] = field(text, "\nThreads:");
    }
    fd = open("/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return;
    long length;
    while ((length = syscall(SYS_getdents64, fd, text, sizeof text)) > 0)
        for (long at = 0; at < length; at += *(unsigned short *)(text + at + 16))
            out[3]++;
    close(fd);
    out[3] -= 3; /* ".", ".." and the folder itself */
}

/* --- the known leak every run plants to show that it can see ---------------------------------------------- */

#define PLANTS 4096
static void *volatile planted[PLANTS];
static int plants;

/* Take a block and keep it; its usable size, 0 when there was none. */
EXPORT long prill_leaks_plant(long size)
{
    if (plants == PLANTS)
        return 0;
    char *block = malloc((size_t)size);
    if (!block)
        return 0;
    memset(block, 0x5a, (size_t)size);
    planted[plants++] = block;
    return (long)malloc_usable_size(block);
}

EXPORT void prill_leaks_unplant(void)
{
    while (plants)
        free(planted[--plants]);
}
