/* Inside the example engine: its objects, and what its files have of one another.
 *
 * What a checker of engines has to find can be switched on, one at a time: PRILL_ENGINE_DEFECT=NAME, for every
 * `defect("NAME")` in these files.
 */
#ifndef EXAMPLE_ENGINE_H
#define EXAMPLE_ENGINE_H

#define _GNU_SOURCE
#include "prill_engine.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum purpose { WEIGHTS, CACHE, OTHER, PURPOSES };

struct context {
    uint64_t budget; /* 0: none */
    atomic_ullong held[PURPOSES];
};

struct layer {
    float *attn_norm, *q, *k, *v, *output, *ffn_norm, *gate, *up, *down;
};

struct model {
    struct context *context;
    prill_model_info is;
    uint32_t rope_dim;
    float *embedding, *norm, *head; /* head may be the embedding */
    struct layer *layers;
};

struct session {
    struct model *model;
    struct context *context;
    uint64_t positions, length;
    float *keys, *values; /* (layer, position, kv head, head_dim) */
    float *work;
    int32_t *ids;
    atomic_int cancelled;
};

struct choice {
    double weight;
    int32_t id;
};

enum kind { NOTHING, CONTEXT, MODEL, SESSION };

/* objects.c */
int defect(const char *name);
void crash(void);
prill_code fail(prill_code code, const char *format, ...);
void *acquire(uint64_t handle, enum kind kind); /* NULL: no such handle, or it is at work; `release` ends it */
prill_code release(uint64_t handle, prill_code code);
uint64_t known_as(void *object, enum kind kind, uint64_t parent); /* 0: all numbers are taken */
prill_code forget(uint64_t handle, enum kind kind);
void *take(struct context *context, uint64_t bytes, enum purpose purpose); /* zeroed, 16 bytes aligned; or NULL */
void give(struct context *context, void *block, enum purpose purpose);

/* calls.c */
void end_object(enum kind kind, void *object);

/* file.c */
prill_code load(struct model *model, const char *path);

/* forward.c */
prill_code fed(struct session *s, const int32_t *ids, uint64_t count, float *out, uint64_t stride);
int32_t chosen(struct session *s, const float *logits, const prill_sampling *how, struct choice *all);

#define REQUIRE(pointer) \
    do { \
        if (!(pointer)) { \
            if (defect("null_buffer_crashes")) \
                crash(); \
            return fail(PRILL_INVALID_PARAMETER, "%s: " #pointer " is null", __func__); \
        } \
    } while (0)

#endif
