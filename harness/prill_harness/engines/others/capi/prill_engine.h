/* prill_engine.h: the calls by which prill drives an inference engine that is a C library.
 *
 * Compiles as C11 and as C++17. Build the engine as a shared library that exports the fourteen functions below,
 * and judge it with `prill gate boundary --engine capi:./libmine.so`. engine.c beside this file is a small
 * complete engine to copy from.
 *
 * Rules that hold for every function:
 *  - It returns a code and never throws, exits, prints to the standard output, or crashes, whatever it is given.
 *  - When the code is not PRILL_OK, prill_last_error gives, in the same thread, one sentence that says why; what
 *    `out` points to is not to be read.
 *  - Handles are numbers, 0 is none. A handle that is 0, was never given, is of another kind, or was freed, also
 *    long ago, is PRILL_INVALID_PARAMETER. So is a null pointer, except where a comment allows it.
 *  - Freeing a model frees its sessions, destroying a context frees its models: their handles are dead from then on.
 *  - Handles may be used from every thread. Calls on different sessions may run at once. A call on a session, or a
 *    free of it or of what it belongs to, while a call on it runs elsewhere is PRILL_INVALID_PARAMETER.
 *  - After an error everything is as before the call, and the next call works; only PRILL_DEVICE_LOST needs a new
 *    process. PRILL_OUT_OF_MEMORY alone may be tried again later; its sentence says how many bytes were needed and
 *    how many were available, as in "needed 4096 bytes for the cache, 1024 available".
 *  - Buffers are the caller's. Lengths are elements, not bytes, unless their name says bytes.
 */
#ifndef PRILL_ENGINE_H
#define PRILL_ENGINE_H

#include <stdint.h>

#define PRILL_ABI_VERSION 1u

#if defined(__GNUC__)
#define PRILL_EXPORT __attribute__((visibility("default")))
#else
#define PRILL_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t prill_code;
enum {
    PRILL_OK = 0,
    PRILL_INVALID_DEVICE = 1,          /* a device number that cannot be one */
    PRILL_OUT_OF_MEMORY = 2,           /* the only one to try again */
    PRILL_MODEL_LOAD_FAILED = 3,       /* no such file, or a file that is damaged or contradicts itself */
    PRILL_INFERENCE_FAILED = 4,
    PRILL_INVALID_PARAMETER = 5,
    PRILL_KERNEL_LAUNCH_FAILED = 6,
    PRILL_RESIDENCY_VIOLATED = 7,      /* weights or cache are not where they have to be */
    PRILL_DEVICE_NOT_FOUND = 8,        /* a device number that this machine does not have */
    PRILL_CONTEXT_LENGTH_EXCEEDED = 9, /* more positions than the session or the model holds */
    PRILL_CANCELLED = 10,
    PRILL_UNSUPPORTED_TYPE = 11,       /* a sound file of an architecture, tensor or type that is not implemented */
    PRILL_TOKENIZER = 12,
    PRILL_NOT_A_NUMBER = 13,           /* finite input gave NaN or infinity */
    PRILL_DEVICE_LOST = 14,            /* a new process is needed */
    PRILL_UNKNOWN = 15
};

typedef uint64_t prill_context;
typedef uint64_t prill_model;
typedef uint64_t prill_session;

/* Texts end with a zero byte. */
typedef struct {
    char name[64];
    char version[32];
    char device[32];
    char arithmetic[16]; /* "float64", "float32", "half", "int8" or "unknown" */
} prill_device_info;

typedef struct {
    uint32_t vocab_size, n_layers, width, n_heads, n_kv_heads, head_dim, ffn, context_length;
    float norm_eps, rope_base;
    int32_t eos_id; /* -1: none */
} prill_model_info;

typedef struct {
    float temperature;        /* 0: the most probable id */
    int32_t top_k;            /* 0: all */
    float top_p;              /* 1: all */
    float min_p;              /* 0: all */
    float repetition_penalty; /* 1: none; over all ids of the session */
    uint64_t seed;            /* one seed gives one text */
} prill_sampling;

/* Bytes that the context holds now. */
typedef struct {
    uint64_t weights, cache, other;
} prill_memory;

/* PRILL_ABI_VERSION of the header that the library was built with; asked first, before anything else. */
PRILL_EXPORT uint32_t prill_abi_version(void);

/* options: NAME=VALUE pairs separated by ';', null or empty for none. Every engine knows memory=BYTES, which bounds
 * what the context may hold; an unknown name is PRILL_INVALID_PARAMETER. */
PRILL_EXPORT prill_code prill_context_create(int32_t device, const char *options, prill_context *out);
PRILL_EXPORT prill_code prill_context_destroy(prill_context context);
PRILL_EXPORT prill_code prill_context_device(prill_context context, prill_device_info *out);
PRILL_EXPORT prill_code prill_context_memory(prill_context context, prill_memory *out);

PRILL_EXPORT prill_code prill_model_load(prill_context context, const char *path, prill_model *out);
PRILL_EXPORT prill_code prill_model_describe(prill_model model, prill_model_info *out);
PRILL_EXPORT prill_code prill_model_free(prill_model model);

/* An empty sequence of at most `positions` positions; 0, or more than the model's context length, is
 * PRILL_INVALID_PARAMETER. */
PRILL_EXPORT prill_code prill_session_create(prill_model model, uint64_t positions, prill_session *out);

/* Append `count` ids (at least 1) and write count * vocab_size logits: row i predicts the id after ids[i].
 * `room`: how many floats `out` holds; fewer are PRILL_INVALID_PARAMETER, and nothing is appended. */
PRILL_EXPORT prill_code prill_session_logits(prill_session session, const int32_t *ids, uint64_t count, float *out,
                                             uint64_t room);

/* Append `count` ids (at least 1) and choose the id after them, which is not appended. logprob (may be null): the
 * natural logarithm of its probability by the raw logits, before temperature and penalty. */
PRILL_EXPORT prill_code prill_session_next(prill_session session, const int32_t *ids, uint64_t count,
                                           const prill_sampling *sampling, int32_t *id, float *logprob);

/* The call that runs on the session, or else its next one, returns PRILL_CANCELLED and appends nothing; the one after
 * that works. May be called while another thread works with the session. */
PRILL_EXPORT prill_code prill_session_cancel(prill_session session);
PRILL_EXPORT prill_code prill_session_free(prill_session session);

/* The sentence of the last call that failed in this thread; empty when none did. At most `bytes` bytes are written,
 * the last of them zero; `out` may be null when `bytes` is 0. needed (may be null): the bytes of the whole sentence
 * with its zero. Changes nothing. */
PRILL_EXPORT prill_code prill_last_error(char *out, uint64_t bytes, uint64_t *needed);

#ifdef __cplusplus
}
#endif
#endif
