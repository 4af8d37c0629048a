/* Times llama.cpp for `versions_bench.py --peer`, through its own C API.
 *
 *     cc -O2 ci/llama_cpp_bench.c -I LLAMA/include -I LLAMA/ggml/include -L LIBS -lllama -lggml -o llama_cpp_bench
 *     LD_LIBRARY_PATH=LIBS llama_cpp_bench LIBS MODEL PROMPT TOKENS
 *
 * LIBS holds the backends as shared libraries. Every layer lies on the first GPU, flash attention is on, the
 * cache is float16, the batch is one prompt. For each line on standard input: one prompt of PROMPT random ids,
 * then TOKENS single ids behind it, random too, so that no time goes into choosing them (as llama-bench does);
 * answers a line of JSON with the seconds of the prompt and of one token. Exit code 2: it could not be run. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "ggml-backend.h"
#include "llama.h"

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

static int failed(const char *what) {
    fprintf(stderr, "llama_cpp_bench: %s\n", what);
    return 2;
}

static uint32_t drawn(uint32_t *state, uint32_t below) {
    *state = *state * 1664525u + 1013904223u;
    return (uint32_t)(((uint64_t)*state * below) >> 32);
}

/* Decodes `count` ids behind what the cache holds and waits for the logits of the last. */
static int decoded(struct llama_context *context, llama_token *ids, int count) {
    if (llama_decode(context, llama_batch_get_one(ids, count))) return 0;
    llama_synchronize(context);
    return llama_get_logits_ith(context, -1) != NULL;
}

int main(int argc, char **argv) {
    if (argc != 5) return failed("expected LIBS MODEL PROMPT TOKENS");
    const int prompt = atoi(argv[3]), tokens = atoi(argv[4]);
    if (prompt < 1 || tokens < 1) return failed("PROMPT and TOKENS: expected 1 or more");
    ggml_backend_load_all_from_path(argv[1]);
    struct llama_model_params loading = llama_model_default_params();
    loading.n_gpu_layers = 999;
    struct llama_model *model = llama_model_load_from_file(argv[2], loading);
    if (!model) return failed("the model could not be loaded; its reason stands above");
    struct llama_context_params asked = llama_context_default_params();
    asked.n_ctx = (uint32_t)(prompt + tokens);
    asked.n_batch = asked.n_ubatch = (uint32_t)prompt;
    asked.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    struct llama_context *context = llama_init_from_model(model, asked);
    if (!context) return failed("no context could be made; its reason stands above");
    fprintf(stderr, "%s\n", llama_print_system_info());
    const uint32_t vocabulary = (uint32_t)llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_token *ids = malloc(sizeof *ids * (size_t)prompt);
    char line[64];
    for (int number = -2; number < 0 || fgets(line, sizeof line, stdin); number++) { /* two warm it up */
        uint32_t state = number < 0 ? (uint32_t)-number : (uint32_t)atoi(line);
        for (int at = 0; at < prompt; at++) ids[at] = (llama_token)drawn(&state, vocabulary);
        llama_memory_clear(llama_get_memory(context), true);
        const double began = seconds();
        if (!decoded(context, ids, prompt)) return failed("the prompt could not be decoded");
        const double between = seconds();
        for (int made = 0; made < tokens; made++) {
            llama_token next = (llama_token)drawn(&state, vocabulary);
            if (!decoded(context, &next, 1)) return failed("a token could not be decoded");
        }
        const double ended = seconds();
        if (number < 0) continue;
        printf("{\"prompt\": %.9f, \"decode\": %.9f}\n", between - began, (ended - between) / tokens);
        fflush(stdout);
    }
    llama_free(context);
    llama_model_free(model);
    return 0;
}
