/* Numbers and bytes that callers give go in; objects that are alive, counted memory and one sentence come out. */
#include "engine.h"

int defect(const char *name)
{
    const char *on = getenv("PRILL_ENGINE_DEFECT");
    return on && !strcmp(on, name);
}

void crash(void)
{
    *(volatile int *)NULL = 0;
}

/* --- errors: a code, and one sentence for the thread ------------------------------------------------------------- */

static _Thread_local char own_sentence[512];
static char shared_sentence[512];
static atomic_int stuck;

static char *sentence(void)
{
    return defect("error_shared") ? shared_sentence : own_sentence;
}

prill_code fail(prill_code code, const char *format, ...)
{
    va_list rest;
    va_start(rest, format);
    vsnprintf(sentence(), sizeof own_sentence, format, rest);
    va_end(rest);
    if (defect("error_silent"))
        sentence()[0] = 0;
    atomic_store(&stuck, defect("error_sticks"));
    return defect("error_unknown") ? PRILL_UNKNOWN : code;
}

PRILL_EXPORT prill_code prill_last_error(char *out, uint64_t bytes, uint64_t *needed)
{
    const char *text = sentence();
    uint64_t whole = strlen(text) + 1;
    if (needed)
        *needed = whole;
    if (!out || !bytes)
        return bytes ? PRILL_INVALID_PARAMETER : PRILL_OK;
    uint64_t length = whole < bytes || defect("error_overruns") ? whole : bytes;
    memcpy(out, text, length - 1);
    out[length - 1] = 0;
    return PRILL_OK;
}

/* --- handles: numbers by which callers know objects --------------------------------------------------------------- */

static const char *const kinds[] = {"nothing", "a context", "a model", "a session"};

#define SLOTS 4096
static struct slot {
    enum kind kind;
    uint32_t generation;
    int busy; /* calls that run with it now */
    void *object;
    uint64_t parent;
} slots[SLOTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* The slot of a handle of this kind; NULL and the reason in the sentence. The lock is held. */
static struct slot *slot_of(uint64_t handle, enum kind kind)
{
    uint64_t index = (handle & 0xffffffffu) - 1;
    if (!handle && defect("null_handle_crashes"))
        crash();
    if (index < SLOTS && defect("handle_unchecked") && slots[index].object)
        return &slots[index];
    if (index >= SLOTS && handle && defect("handle_dereferenced"))
        return (struct slot *)(uintptr_t)handle + ((struct slot *)(uintptr_t)handle)->busy;
    if (index >= SLOTS || slots[index].kind != kind || slots[index].generation != handle >> 32) {
        fail(PRILL_INVALID_PARAMETER, "%llu is no handle of %s that is alive", (unsigned long long)handle, kinds[kind]);
        return NULL;
    }
    return &slots[index];
}

/* The object of a handle for one call; `release` ends it. */
void *acquire(uint64_t handle, enum kind kind)
{
    static _Thread_local int known;
    if (atomic_load(&stuck)) {
        fail(PRILL_UNKNOWN, "the call before failed");
        return NULL;
    }
    if (defect("thread_bound")) {
        known |= kind == CONTEXT;
        if (!known)
            crash();
    }
    pthread_mutex_lock(&lock);
    struct slot *slot = slot_of(handle, kind);
    if (slot && kind == SESSION && slot->busy && !defect("busy_unchecked")) {
        fail(PRILL_INVALID_PARAMETER, "the session is at work in another call");
        slot = NULL;
    }
    void *object = slot ? slot->object : NULL;
    if (slot)
        slot->busy++;
    pthread_mutex_unlock(&lock);
    return object;
}

prill_code release(uint64_t handle, prill_code code)
{
    pthread_mutex_lock(&lock);
    slots[((handle & 0xffffffffu) - 1) % SLOTS].busy--;
    pthread_mutex_unlock(&lock);
    return code;
}

/* What an object is known by; 0 when all numbers are taken. */
uint64_t known_as(void *object, enum kind kind, uint64_t parent)
{
    uint64_t handle = 0;
    pthread_mutex_lock(&lock);
    for (uint64_t n = 0; n < SLOTS && !handle; n++)
        if (slots[n].kind == NOTHING) {
            slots[n].generation += slots[n].generation == 0;
            slots[n] = (struct slot){kind, slots[n].generation, 0, object, parent};
            handle = (uint64_t)slots[n].generation << 32 | (n + 1);
        }
    pthread_mutex_unlock(&lock);
    return handle;
}

static int below(uint64_t handle, const struct slot *slot)
{
    while (slot->kind != NOTHING && slot->parent) {
        if (slot->parent == handle)
            return 1;
        slot = &slots[(slot->parent & 0xffffffffu) - 1];
    }
    return 0;
}

/* Free what a handle stands for, and what belongs to it before that. */
prill_code forget(uint64_t handle, enum kind kind)
{
    pthread_mutex_lock(&lock);
    struct slot *slot = slot_of(handle, kind);
    prill_code code = slot ? PRILL_OK : defect("error_unknown") ? PRILL_UNKNOWN : PRILL_INVALID_PARAMETER;
    for (int n = 0; slot && code == PRILL_OK && n < SLOTS; n++)
        if (slots[n].kind && slots[n].busy && (&slots[n] == slot || below(handle, &slots[n])))
            code = fail(PRILL_INVALID_PARAMETER, "%s is at work in another call", kinds[slots[n].kind]);
    for (int want = SESSION; slot && code == PRILL_OK && want >= (int)kind; want--)
        for (int n = 0; n < SLOTS; n++) {
            struct slot *each = &slots[n];
            int inside = (int)each->kind == want && below(handle, each) && !defect("children_survive");
            if (!inside && !(each == slot && want == (int)kind))
                continue;
            end_object((enum kind)want, each->object);
            each->kind = NOTHING;
            each->generation++;
            if (!defect("handle_unchecked"))
                each->object = NULL;
        }
    pthread_mutex_unlock(&lock);
    return code;
}

/* --- memory: counted, bounded, every refusal with its figures ------------------------------------------------------ */

static const char *const purposes[] = {"the weights", "the cache", "the file and work space"};

void *take(struct context *context, uint64_t bytes, enum purpose purpose)
{
    uint64_t held = 0, whole;
    for (int n = 0; n < PURPOSES; n++)
        held += atomic_load(&context->held[n]);
    uint64_t left = context->budget > held ? context->budget - held : 0;
    if (!context->budget)
        left = (uint64_t)sysconf(_SC_AVPHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    char *block = NULL;
    if (!__builtin_add_overflow(bytes, 16, &whole) && (!context->budget || bytes <= left))
        block = calloc(1, whole);
    if (!block && defect("allocation_unchecked"))
        crash();
    if (!block) {
        if (defect("memory_unspoken"))
            fail(PRILL_OUT_OF_MEMORY, "no memory");
        else
            fail(PRILL_OUT_OF_MEMORY, "needed %llu bytes for %s, %llu available", (unsigned long long)bytes,
                 purposes[purpose], (unsigned long long)left);
        return NULL;
    }
    memcpy(block, &bytes, sizeof bytes);
    atomic_fetch_add(&context->held[purpose], bytes);
    return block + 16;
}

void give(struct context *context, void *block, enum purpose purpose)
{
    if (!block)
        return;
    uint64_t bytes;
    char *whole = (char *)block - 16;
    memcpy(&bytes, whole, sizeof bytes);
    if (!defect("memory_constant"))
        atomic_fetch_sub(&context->held[purpose], bytes);
    free(whole);
}

/* Here, because a session at work in another thread may be cancelled, but not freed meanwhile. */
PRILL_EXPORT prill_code prill_session_cancel(prill_session session)
{
    pthread_mutex_lock(&lock);
    struct slot *slot = slot_of(session, SESSION);
    if (slot)
        atomic_store(&((struct session *)slot->object)->cancelled, 1);
    pthread_mutex_unlock(&lock);
    return slot ? PRILL_OK : PRILL_INVALID_PARAMETER;
}
