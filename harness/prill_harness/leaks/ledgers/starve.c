/* Of the allocations of an engine's processes one fails: the one that a shared file says.
 *
 * Preloaded. PRILL_STARVE names a file of five counters, which whoever started the process reads and writes:
 * processes that are here, allocations of at least `least` bytes, how many are left until one fails (0: none
 * does), how many failed, and `least`. An interpreter's own small blocks are left alone: failing them would
 * test the interpreter.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define PYTHON_LEAST 4096

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static struct { atomic_llong here, seen, left, failed, least; } *shared;

__attribute__((constructor)) static void begin(void)
{
    const char *name = getenv("PRILL_STARVE");
    int file = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    void *at = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file >= 0)
        close(file);
    if (at == MAP_FAILED)
        return;
    shared = at;
    if (dlsym(RTLD_DEFAULT, "Py_IsInitialized"))
        atomic_store(&shared->least, PYTHON_LEAST);
    atomic_fetch_add(&shared->here, 1);
}

static int fails(size_t bytes)
{
    if (!shared || bytes < (size_t)atomic_load(&shared->least))
        return 0;
    atomic_fetch_add(&shared->seen, 1);
    if (atomic_load(&shared->left) <= 0 || atomic_fetch_sub(&shared->left, 1) != 1)
        return 0;
    atomic_fetch_add(&shared->failed, 1);
    errno = ENOMEM;
    return 1;
}

EXPORT void *malloc(size_t bytes) { return fails(bytes) ? NULL : __libc_malloc(bytes); }

EXPORT void *calloc(size_t count, size_t bytes)
{
    size_t whole;
    if (__builtin_mul_overflow(count, bytes, &whole))
        whole = (size_t)-1;
    return fails(whole) ? NULL : __libc_calloc(count, bytes);
}

EXPORT void *realloc(void *block, size_t bytes) { return fails(bytes) ? NULL : __libc_realloc(block, bytes); }

EXPORT void *memalign(size_t alignment, size_t bytes)
{
    return fails(bytes) ? NULL : __libc_memalign(alignment, bytes);
}

EXPORT void *aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }

EXPORT int posix_memalign(void **out, size_t alignment, size_t bytes)
{
    void *block = memalign(alignment, bytes);
    if (block)
        *out = block;
    return block ? 0 : ENOMEM;
}
