/* A pretended engine goes under the probe; which known leak, on which path, amid which clean noise, is asked for.
 *
 * Every leak has a function of its own, so that a stack can name it. Pointers pass through a volatile so that
 * the compiler keeps blocks nobody reads.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum leak { NO_LEAK, LEAK_BLOCK, GROW_LIST, GROW_BUFFER, LEAK_MAPPING, LEAK_ARENA, LEAK_RAW, LEAK_DESCRIPTOR,
            LEAK_THREAD, FREE_TWICE };
enum noise { QUIET, CHURN, POOL, THREADS, RAGGED };

static void *volatile sink;
static uint64_t state = 88172645463325252ULL;

static uint32_t draw(uint32_t below)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 33) % below;
}

static void *block(size_t size)
{
    char *made = malloc(size);
    if (made)
        memset(made, 1, size);
    sink = made;
    return made;
}

/* --- leaks ----------------------------------------------------------------------------------------------- */

struct node { struct node *next; char body[]; };
static struct node *list;
static char *buffer;
static size_t buffer_size;

void control_leak_block(size_t size) { block(size); }

void control_grow_list(size_t size) /* reachable to the end, and of no use */
{
    struct node *made = block(sizeof *made + size);
    made->next = list;
    list = made;
}

void control_grow_buffer(size_t size) /* one block that only grows */
{
    buffer = realloc(buffer, buffer_size += size);
    sink = buffer;
}

void control_leak_mapping(size_t size)
{
    char *made = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *made = 1;
    sink = made;
}

static char *arena, *arena_end;

void control_leak_arena(size_t size) /* an allocator of its own, which takes 64 KiB from the system at a time */
{
    if (!arena || arena + size > arena_end) {
        arena = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        arena_end = arena + 65536;
    }
    memset(arena, 1, size);
    arena += size;
}

void control_leak_raw(size_t size) /* behind libc's back: only the process ledger can see it */
{
    char *made = (char *)syscall(SYS_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(made, 1, size);
    sink = made;
}

void control_leak_descriptor(void) { sink = (void *)(intptr_t)open("/dev/null", O_RDONLY); }

static void *sleeper(void *unused)
{
    (void)unused;
    for (;;)
        pause();
    return NULL;
}

void control_leak_thread(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, sleeper, NULL);
    pthread_detach(thread);
}

void control_free_twice(size_t size)
{
    void *volatile made = block(size);
    free(made);
    free(made);
}

static void plant(int leak, long size)
{
    switch (leak) {
    case LEAK_BLOCK: control_leak_block((size_t)size); break;
    case GROW_LIST: control_grow_list((size_t)size); break;
    case GROW_BUFFER: control_grow_buffer((size_t)size); break;
    case LEAK_MAPPING: control_leak_mapping((size_t)size); break;
    case LEAK_ARENA: control_leak_arena((size_t)size); break;
    case LEAK_RAW: control_leak_raw((size_t)size); break;
    case LEAK_DESCRIPTOR: control_leak_descriptor(); break;
    case LEAK_THREAD: control_leak_thread(); break;
    case FREE_TWICE: control_free_twice((size_t)size); break;
    default: break;
    }
}

/* --- clean noise ----------------------------------------------------------------------------------------- */

#define SLOTS 512
static void *slots[SLOTS];

static void churn(int ragged)
{
    for (int i = 0; i < SLOTS; i++)
        if (!slots[i] && !ragged)
            slots[i] = block(1 + draw(4096));
    for (int i = 0; i < 400; i++) {
        void *brief = block(1 + draw(2048));
        int at = (int)draw(SLOTS);
        free(slots[at]);
        slots[at] = ragged && draw(2) ? NULL : block(1 + draw(4096));
        free(brief);
    }
}

#define WORKERS 4
#define PARCELS 64
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static void *inbox[PARCELS], *outbox[PARCELS];
static int waiting, finished, leak_in_pool;
static long leak_size;

static void *worker(void *unused)
{
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (!waiting)
            pthread_cond_wait(&changed, &lock);
        int at = --waiting, leaks = leak_in_pool && !at;
        pthread_mutex_unlock(&lock);
        size_t size = 1 + (uintptr_t)inbox[at] % 700;
        free(inbox[at]); /* made by the caller's thread */
        outbox[at] = block(size);
        if (leaks)
            plant(leak_in_pool, leak_size);
        pthread_mutex_lock(&lock);
        finished++;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

static void pool(int leak, long size)
{
    static int started;
    pthread_mutex_lock(&lock);
    for (; started < WORKERS; started++) {
        pthread_t thread;
        pthread_create(&thread, NULL, worker, NULL);
    }
    for (int i = 0; i < PARCELS; i++)
        inbox[i] = block(1 + draw(3000));
    waiting = PARCELS, finished = 0, leak_in_pool = leak, leak_size = size;
    pthread_cond_broadcast(&changed);
    while (finished < PARCELS)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < PARCELS; i++)
        free(outbox[i]);
}

static void *brief(void *seed)
{
    for (int i = 0; i < 50; i++)
        free(block(1 + ((uintptr_t)seed * 37 + (uintptr_t)i * 101) % 5000));
    return NULL;
}

static void threads(void)
{
    pthread_t made[3];
    for (uintptr_t i = 0; i < 3; i++)
        pthread_create(&made[i], NULL, brief, (void *)(i + draw(100)));
    for (int i = 0; i < 3; i++)
        pthread_join(made[i], NULL);
}

/* One call: noise of a kind, and the leak when it is due. */
void control_work(int noise, int leak, long size)
{
    if (noise == CHURN || noise == RAGGED)
        churn(noise == RAGGED);
    if (noise == THREADS)
        threads();
    if (noise == POOL)
        pool(leak, size);
    else
        plant(leak, size);
}

void control_seed(unsigned long seed) { state = 88172645463325252ULL ^ (seed * 0x9E3779B97F4A7C15ULL); }

/* --- caches ---------------------------------------------------------------------------------------------- */

#define MOST 65536
static struct { long key; void *body; } kept[MOST];
static long kept_count, kept_bytes;

/* Look `key` up in a cache of `limit` entries; the oldest makes room. Bytes held now. */
long control_cache(long key, long limit, long size)
{
    long held = kept_count < limit ? kept_count : limit;
    for (long i = 0; i < held; i++)
        if (kept[i].key == key)
            return kept_bytes;
    long at = kept_count++ % limit;
    if (kept[at].body) {
        free(kept[at].body);
        kept_bytes -= size;
    }
    kept[at].key = key;
    kept[at].body = block((size_t)size);
    return kept_bytes += size;
}

/* --- load and unload ------------------------------------------------------------------------------------- */

#define TENSORS 6
struct model { void *tensors[TENSORS]; };

/* forgets: a failure of this allocation (from 1; 0: none, -1: any) leaves the earlier tensors behind. */
struct model *control_load(int forgets)
{
    struct model *made = calloc(1, sizeof *made);
    if (!made)
        return NULL;
    for (int i = 0; i < TENSORS; i++)
        if (!(made->tensors[i] = malloc((size_t)1000 << i))) {
            if (forgets != -1 && forgets != i + 2)
                while (i--)
                    free(made->tensors[i]);
            free(made);
            return NULL;
        }
    return made;
}

void control_unload(struct model *model, int forgets_one)
{
    for (int i = forgets_one; i < TENSORS; i++)
        free(model->tensors[i]);
    free(model);
}
