/* The calls of prill_engine.h, as a small complete engine answers them: the example to copy from.
 *
 * Reads a GGUF file of a Llama (F32, F16, Q8_0), computes in float32 one position at a time, keeps a cache for each
 * session. It has no tokenizer: ids come from the host, which has the file's.
 */
#include "engine.h"

static void end_session(struct session *session)
{
    struct context *context = session->context;
    if (!defect("cache_kept")) {
        give(context, session->keys, CACHE);
        give(context, session->values, CACHE);
    }
    give(context, session->work, OTHER);
    give(context, session->ids, OTHER);
    give(context, session, OTHER);
}

static void end_model(struct model *model)
{
    struct context *context = model->context;
    float **own[] = {&model->embedding, &model->norm, &model->head};
    if (model->head == model->embedding)
        model->head = NULL;
    for (int n = 0; n < 3; n++)
        give(context, *own[n], WEIGHTS);
    for (uint32_t n = 0; model->layers && n < model->is.n_layers; n++) {
        struct layer *l = &model->layers[n];
        float *parts[] = {l->attn_norm, l->q, l->k, l->v, l->output, l->ffn_norm, l->gate, l->up, l->down};
        for (int p = 0; p < 9; p++)
            give(context, parts[p], WEIGHTS);
    }
    give(context, model->layers, OTHER);
    give(context, model, OTHER);
}

void end_object(enum kind kind, void *object)
{
    if (kind == SESSION)
        end_session(object);
    else if (kind == MODEL)
        end_model(object);
    else
        free(object);
}

PRILL_EXPORT uint32_t prill_abi_version(void)
{
    return defect("version_wrong") ? PRILL_ABI_VERSION + 1 : PRILL_ABI_VERSION;
}

PRILL_EXPORT prill_code prill_context_create(int32_t device, const char *options, prill_context *out)
{
    REQUIRE(out);
    if (device < 0)
        return fail(PRILL_INVALID_DEVICE, "device %d, expected 0", device);
    if (device > 0 && !defect("device_unchecked"))
        return fail(PRILL_DEVICE_NOT_FOUND, "device %d, this machine has 0 alone", device);
    char *rest = NULL;
    const char *asked = options ? options : "";
    unsigned long long budget = 0;
    if (!strncmp(asked, "memory=", 7))
        budget = strtoull(asked + 7, &rest, 10);
    if (*asked && (!budget || (*rest && *rest != ';')))
        return fail(PRILL_INVALID_PARAMETER, "options \"%.100s\", expected memory=BYTES", asked);
    struct context *context = calloc(1, sizeof *context);
    if (!context)
        return fail(PRILL_OUT_OF_MEMORY, "needed %zu bytes for the context, 0 available", sizeof *context);
    context->budget = budget;
    *out = known_as(context, CONTEXT, 0);
    if (defect("prints"))
        printf("{\"loaded\": true}\n"), fflush(stdout);
    if (!*out)
        free(context);
    return *out ? PRILL_OK : fail(PRILL_OUT_OF_MEMORY, "needed 1 handle, 0 available");
}

PRILL_EXPORT prill_code prill_context_destroy(prill_context context)
{
    return forget(context, CONTEXT);
}

PRILL_EXPORT prill_code prill_context_device(prill_context context, prill_device_info *out)
{
    REQUIRE(out);
    if (!acquire(context, CONTEXT))
        return PRILL_INVALID_PARAMETER;
    *out = (prill_device_info){"prill example engine", "1", "cpu", "float32"};
    return release(context, PRILL_OK);
}

PRILL_EXPORT prill_code prill_context_memory(prill_context context, prill_memory *out)
{
    REQUIRE(out);
    struct context *of = acquire(context, CONTEXT);
    if (!of)
        return PRILL_INVALID_PARAMETER;
    *out = (prill_memory){atomic_load(&of->held[WEIGHTS]), atomic_load(&of->held[CACHE]), atomic_load(&of->held[OTHER])};
    return release(context, PRILL_OK);
}

PRILL_EXPORT prill_code prill_model_load(prill_context context, const char *path, prill_model *out)
{
    REQUIRE(path);
    REQUIRE(out);
    struct context *of = acquire(context, CONTEXT);
    if (!of)
        return PRILL_INVALID_PARAMETER;
    struct model *model = take(of, sizeof *model, OTHER);
    prill_code code = PRILL_OUT_OF_MEMORY;
    if (model) {
        model->context = of;
        code = load(model, path);
        if (code == PRILL_OK && !(*out = known_as(model, MODEL, context)))
            code = fail(PRILL_OUT_OF_MEMORY, "needed 1 handle, 0 available");
        if (code && !defect("failed_load_kept"))
            end_model(model);
    }
    return release(context, code);
}

PRILL_EXPORT prill_code prill_model_describe(prill_model model, prill_model_info *out)
{
    REQUIRE(out);
    struct model *of = acquire(model, MODEL);
    if (!of)
        return PRILL_INVALID_PARAMETER;
    *out = of->is;
    return release(model, PRILL_OK);
}

PRILL_EXPORT prill_code prill_model_free(prill_model model)
{
    return forget(model, MODEL);
}

PRILL_EXPORT prill_code prill_session_create(prill_model model, uint64_t positions, prill_session *out)
{
    REQUIRE(out);
    struct model *of = acquire(model, MODEL);
    if (!of)
        return PRILL_INVALID_PARAMETER;
    if (defect("positions_wrap"))
        positions = (uint16_t)positions;
    else if (!positions || positions > of->is.context_length)
        return release(model, fail(PRILL_INVALID_PARAMETER, "%llu positions, expected 1 to %u",
                                   (unsigned long long)positions, of->is.context_length));
    uint64_t heads = (uint64_t)of->is.n_heads * of->is.head_dim;
    uint64_t cache = of->is.n_layers * positions * of->is.n_kv_heads * of->is.head_dim * sizeof(float);
    uint64_t work = 2 * ((uint64_t)of->is.width + heads + of->is.ffn) + positions + of->is.vocab_size + 1;
    struct session *s = take(of->context, sizeof *s, OTHER);
    prill_code code = PRILL_OUT_OF_MEMORY;
    if (s) {
        s->model = of;
        s->context = of->context;
        s->positions = positions;
        if ((s->keys = take(s->context, cache, CACHE)) && (s->values = take(s->context, cache, CACHE)) &&
            (s->work = take(s->context, work * 4 + of->is.vocab_size * sizeof(struct choice), OTHER)) &&
            (s->ids = take(s->context, positions * sizeof *s->ids, OTHER)))
            code = (*out = known_as(s, SESSION, model))
                       ? PRILL_OK
                       : fail(PRILL_OUT_OF_MEMORY, "needed 1 handle, 0 available");
        if (code)
            end_session(s);
    }
    return release(model, code);
}

PRILL_EXPORT prill_code prill_session_logits(prill_session session, const int32_t *ids, uint64_t count, float *out,
                                             uint64_t room)
{
    REQUIRE(ids);
    REQUIRE(out);
    struct session *s = acquire(session, SESSION);
    if (!s)
        return PRILL_INVALID_PARAMETER;
    uint64_t vocab = s->model->is.vocab_size;
    if (room / vocab < count && count <= s->positions - s->length && !defect("room_unchecked"))
        return release(session, fail(PRILL_INVALID_PARAMETER, "room for %llu logits, %llu are needed",
                                     (unsigned long long)room, (unsigned long long)(count * vocab)));
    return release(session, fed(s, ids, count, out, vocab));
}

PRILL_EXPORT prill_code prill_session_next(prill_session session, const int32_t *ids, uint64_t count,
                                           const prill_sampling *sampling, int32_t *id, float *logprob)
{
    REQUIRE(ids);
    REQUIRE(sampling);
    REQUIRE(id);
    const prill_sampling *how = sampling;
    int sound = how->temperature >= 0 && how->temperature <= 1e6f && how->top_k >= 0 && how->top_p > 0 &&
                how->top_p <= 1 && how->min_p >= 0 && how->min_p <= 1 && how->repetition_penalty > 0 &&
                how->repetition_penalty <= 1e6f;
    if (!sound && !defect("sampling_unchecked"))
        return fail(PRILL_INVALID_PARAMETER, "a parameter of sampling is out of its range");
    struct session *s = acquire(session, SESSION);
    if (!s)
        return PRILL_INVALID_PARAMETER;
    const prill_model_info *is = &s->model->is;
    float *logits = s->work + 2 * ((uint64_t)is->width + is->n_heads * is->head_dim + is->ffn) + s->positions;
    prill_code code = fed(s, ids, count, logits, 0);
    if (code == PRILL_OK) {
        double most = logits[0], sum = 0;
        for (uint32_t n = 0; n < is->vocab_size; n++)
            most = logits[n] > most ? logits[n] : most;
        for (uint32_t n = 0; n < is->vocab_size; n++)
            sum += exp(logits[n] - most);
        struct choice *all = (struct choice *)(((uintptr_t)(logits + is->vocab_size) + 7) & ~(uintptr_t)7);
        *id = chosen(s, logits, how, all);
        if (logprob)
            *logprob = (float)(logits[*id] - most - log(sum));
    }
    return release(session, code);
}

PRILL_EXPORT prill_code prill_session_free(prill_session session)
{
    return forget(session, SESSION);
}
