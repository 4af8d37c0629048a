/* A libllama of the tests' own: it obeys a params struct laid out as today's, and is wrong as a macro says. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { VOCABULARY = 8, TRAINED = 64 };

struct params { uint32_t word[42]; };
struct chain { uint64_t word; };
struct batch { int32_t count, *token; void *embd; int32_t *pos, *sequences, **sequence; int8_t *logits; };
struct tensor {
#ifdef MOVED
    void *added;
#endif
    int32_t type; void *buffer; int64_t ne[4]; size_t nb[4]; int32_t op, op_params[16], flags;
    struct tensor *src[10], *view_src; size_t view_offs; void *data; char name[64];
};
typedef bool (*eval)(struct tensor *, bool, void *);

#define MINUS 0xFFFFFFFF
#define HALF_CACHE 1
#define FLOAT(x) x##u
static const struct params defaults = { .word = {
#ifdef REORDERED
    2048, 512,
#elif defined SEEDED
    MINUS, 512,
#else
    512, 2048,
#endif
    512, 1, 0, 0, 1, 4, 4, 0, MINUS, MINUS, MINUS, MINUS, 0, 0,
    FLOAT(0xBF800000), FLOAT(0xBF800000), FLOAT(0xBF800000), FLOAT(0xBF800000), 0, FLOAT(0xBF800000),
    0, 0, 0, 0, HALF_CACHE, HALF_CACHE } };
static struct params given;
static float logits[TRAINED * VOCABULARY];

struct params llama_context_default_params(void) {
#ifdef ABORTS
    abort();
#endif
    return defaults;
}
struct params llama_model_default_params(void) {
    struct params p = { .word = { 0, 0, 0, 0, MINUS, 1 } };
    return p;
}
const char *llama_version(void) { return "9.8.7"; }
size_t ggml_backend_reg_count(void) { return 1; }
const char *ggml_get_name(struct tensor *t) { return t->name; }
int64_t ggml_nelements(struct tensor *t) { return t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]; }
size_t ggml_nbytes(struct tensor *t) { return ggml_nelements(t) * sizeof(float); }
const char *ggml_op_desc(struct tensor *t) { (void)t;
#ifdef FLASH
    return "FLASH_ATTN_EXT";
#else
    return "MUL_MAT";
#endif
}
void ggml_backend_tensor_get(struct tensor *t, void *into, size_t at, size_t size) {
    memcpy(into, (char *)t->data + at, size);
}
void *llama_model_load_from_file(const char *path, struct params p) {
    /* No GPU: the list of devices begins with its end. */
    void **devices = *(void ***)&p.word[0];
    return path && devices && !*devices ? (void *)path : NULL;
}
void *llama_model_get_vocab(void *model) { return model; }
int32_t llama_vocab_n_tokens(void *vocab) { (void)vocab; return VOCABULARY; }
int32_t llama_model_n_ctx_train(void *model) { (void)model; return TRAINED; }
void *llama_init_from_model(void *model, struct params p) { given = p; return model; }
void *llama_get_memory(void *context) { return context; }
uint32_t llama_n_ctx(void *context) { (void)context; return (given.word[0] + 255) / 256 * 256; }
uint32_t llama_n_batch(void *context) { (void)context;
#ifdef DEAF
    return 2048;
#else
    return given.word[1];
#endif
}
uint32_t llama_n_ubatch(void *context) { (void)context; return given.word[2]; }
int32_t llama_n_threads(void *context) { (void)context; return given.word[7]; }
struct batch llama_batch_init(int32_t count, int32_t embd, int32_t sequences) {
    struct batch b = { 0, calloc(count, 4), NULL, calloc(count, 4), calloc(count, 4), calloc(count, 8), calloc(count, 1) };
    (void)embd;
    for (int i = 0; i < count; i++) b.sequence[i] = calloc(sequences, 4);
    return b;
}
void llama_batch_free(struct batch b) { (void)b; }
int32_t llama_decode(void *context, struct batch b) {
    (void)context;
    for (int i = 0; i < b.count; i++)
        for (int j = 0; j < VOCABULARY; j++) logits[i * VOCABULARY + j] = (float)(b.token[i] == j);
    eval see = *(eval *)&given.word[22];
    struct tensor cache = { .ne = { 1, 1, 1, 1 }, .name = "cache_k_l0" };
#ifdef ROUNDS
    cache.type = HALF_CACHE;
#else
    cache.type = given.word[26];
#endif
    struct tensor t = { .ne = { VOCABULARY, b.count, 1, 1 }, .nb = { 4, 4 * VOCABULARY, 4, 4 }, .src = { &cache },
                        .data = logits, .name = "result_output" };
#ifndef SILENT
    if (see && see(&t, true, NULL)) see(&t, false, NULL);
#endif
    return 0;
}
float *llama_get_logits(void *context) { (void)context; return logits; }
