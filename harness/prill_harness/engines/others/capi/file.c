/* A GGUF file of a Llama goes in; its sizes and weights, as float32, come out, or a refusal in one sentence. */
#include "engine.h"

struct reader {
    const uint8_t *at, *end;
    int bad;
};

static const uint8_t *bytes_of(struct reader *r, uint64_t count)
{
    if (r->bad || count > (uint64_t)(r->end - r->at)) {
        r->bad = 1;
        return NULL;
    }
    r->at += count;
    return r->at - count;
}

static uint64_t number(struct reader *r, int size)
{
    uint64_t value = 0;
    const uint8_t *from = bytes_of(r, (uint64_t)size);
    if (from)
        memcpy(&value, from, (size_t)size);
    return value;
}

struct text {
    const char *of;
    uint64_t length;
};

static struct text text_of(struct reader *r)
{
    uint64_t length = number(r, 8);
    return (struct text){(const char *)bytes_of(r, length), length};
}

static int is(struct text text, const char *wanted)
{
    return text.of && text.length == strlen(wanted) && !memcmp(text.of, wanted, text.length);
}

enum { T_STRING = 8, T_ARRAY = 9, T_FLOAT = 6 };
static const int sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

static uint64_t skipped(struct reader *r, uint32_t type)
{
    if (type == T_STRING)
        text_of(r);
    else if (type == T_ARRAY) {
        uint32_t of = (uint32_t)number(r, 4);
        uint64_t count = number(r, 8);
        r->bad |= of == T_ARRAY || of > 12;
        for (uint64_t n = 0; n < count && !r->bad; n++)
            skipped(r, of);
        return count;
    } else if (type > 12)
        r->bad = 1;
    else
        bytes_of(r, (uint64_t)sizes[type]);
    return 1;
}

static prill_code damaged(const char *what)
{
    return fail(PRILL_MODEL_LOAD_FAILED, "the file is damaged: %s", what);
}

static prill_code keys_of(struct reader *r, uint64_t count, struct model *m, uint32_t *alignment)
{
    uint32_t value_dim = 0;
    struct { const char *name; uint32_t type; void *to; } known[] = {
        {"llama.context_length", 4, &m->is.context_length}, {"llama.embedding_length", 4, &m->is.width},
        {"llama.block_count", 4, &m->is.n_layers}, {"llama.feed_forward_length", 4, &m->is.ffn},
        {"llama.attention.head_count", 4, &m->is.n_heads}, {"llama.attention.head_count_kv", 4, &m->is.n_kv_heads},
        {"llama.attention.layer_norm_rms_epsilon", 6, &m->is.norm_eps}, {"llama.rope.freq_base", 6, &m->is.rope_base},
        {"llama.rope.dimension_count", 4, &m->rope_dim}, {"llama.vocab_size", 4, &m->is.vocab_size},
        {"llama.attention.key_length", 4, &m->is.head_dim}, {"llama.attention.value_length", 4, &value_dim},
        {"general.alignment", 4, alignment}, {"tokenizer.ggml.eos_token_id", 4, &m->is.eos_id},
    };
    uint64_t tokens = 0;
    int named = 0;
    for (uint64_t n = 0; n < count; n++) {
        struct text key = text_of(r);
        uint32_t type = (uint32_t)number(r, 4);
        size_t at = 0;
        while (at < sizeof known / sizeof *known && !is(key, known[at].name))
            at++;
        if (r->bad)
            return damaged("a key runs past its end");
        if (is(key, "general.architecture")) {
            named = 1;
            if (type != T_STRING || !is(text_of(r), "llama"))
                return fail(PRILL_UNSUPPORTED_TYPE, "the architecture is not llama");
        } else if (at < sizeof known / sizeof *known) {
            if (type != known[at].type)
                return damaged("a number has the wrong type");
            uint32_t value = (uint32_t)number(r, 4);
            memcpy(known[at].to, &value, sizeof value);
        } else if (key.length > 6 && !memcmp(key.of, "llama.", 6))
            return fail(PRILL_UNSUPPORTED_TYPE, "%.*s is not known here", (int)(key.length & 127), key.of);
        else {
            uint64_t length = skipped(r, type);
            tokens = is(key, "tokenizer.ggml.tokens") ? length : tokens;
        }
        if (r->bad)
            return damaged("a value runs past its end, or has no known type");
    }
    if (!named)
        return damaged("it names no architecture");
    if (value_dim && value_dim != m->is.head_dim)
        return fail(PRILL_UNSUPPORTED_TYPE, "values of another size than keys are not known here");
    if (!m->is.vocab_size)
        m->is.vocab_size = (uint32_t)tokens;
    return tokens && tokens != m->is.vocab_size ? damaged("vocabulary and vocab_size differ") : PRILL_OK;
}

static prill_code sane(struct model *m)
{
    prill_model_info *is = &m->is;
    if (!is->n_kv_heads)
        is->n_kv_heads = is->n_heads;
    if (!is->n_heads || is->n_heads > 4096 || is->n_heads % is->n_kv_heads)
        return damaged("the heads do not divide");
    if (!is->head_dim)
        is->head_dim = is->width / is->n_heads;
    if (!m->rope_dim)
        m->rope_dim = is->head_dim;
    uint32_t all[] = {is->vocab_size, is->n_layers, is->width, is->ffn, is->context_length, is->head_dim};
    for (size_t n = 0; n < sizeof all / sizeof *all; n++)
        if (!all[n] || all[n] > 1u << 24)
            return damaged("a size is 0 or far too large");
    if (is->n_layers > 4096 || m->rope_dim > is->head_dim || m->rope_dim % 2)
        return damaged("a size is out of its range");
    if (!(is->norm_eps > 0 && is->norm_eps < 1) || !(is->rope_base > 1 && isfinite(is->rope_base)))
        return damaged("epsilon or rope base is out of its range");
    if (is->eos_id < -1 || is->eos_id >= (int32_t)is->vocab_size)
        return damaged("the end's id is outside the vocabulary");
    return PRILL_OK;
}

struct tensor {
    struct text name;
    uint64_t dims[2], offset;
    uint32_t type;
    int used;
};

static float half(uint16_t bits)
{
    uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ffu, whole;
    float value;
    if (!exponent)
        return (sign ? -1.0f : 1.0f) * ldexpf((float)mantissa, -24);
    whole = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
    memcpy(&value, &whole, sizeof value);
    return value;
}

struct file {
    uint8_t *bytes;
    uint64_t size, data, count; /* data: where it begins */
    struct tensor *tensors;
};

static prill_code tensor_of(struct file *f, struct model *m, float **to, uint64_t columns, uint64_t rows,
                            const char *format, ...)
{
    char name[64];
    va_list rest;
    va_start(rest, format);
    vsnprintf(name, sizeof name, format, rest);
    va_end(rest);
    struct tensor *t = f->tensors;
    while (t < f->tensors + f->count && !is(t->name, name))
        t++;
    if (t == f->tensors + f->count)
        return fail(PRILL_MODEL_LOAD_FAILED, "the file is damaged: %s is missing", name);
    uint64_t values = columns * rows, blocks = values / 32;
    if (t->dims[0] != columns || t->dims[1] != rows)
        return fail(PRILL_MODEL_LOAD_FAILED, "the file is damaged: %s has another shape", name);
    if ((t->type != 0 && t->type != 1 && t->type != 8) || (t->type == 8 && columns % 32))
        return fail(PRILL_UNSUPPORTED_TYPE, "%s has type %u, known are F32, F16 and Q8_0", name, t->type);
    uint64_t bytes = t->type == 0 ? values * 4 : t->type == 1 ? values * 2 : blocks * 34, size = f->size - f->data;
    if ((t->offset > size || bytes > size - t->offset || t->offset % 4) && !defect("truncation_unchecked"))
        return fail(PRILL_MODEL_LOAD_FAILED, "the file is damaged: %s runs past its end", name);
    t->used = 1;
    const uint8_t *from = f->bytes + f->data + t->offset;
    float *into = *to = take(m->context, values * sizeof(float), WEIGHTS);
    if (!into)
        return PRILL_OUT_OF_MEMORY;
    if (t->type == 0)
        memcpy(into, from, bytes);
    for (uint64_t n = 0; t->type == 1 && n < values; n++)
        into[n] = half((uint16_t)(from[2 * n] | from[2 * n + 1] << 8));
    for (uint64_t n = 0; t->type == 8 && n < values; n++) {
        const uint8_t *block = from + n / 32 * 34;
        into[n] = half((uint16_t)(block[0] | block[1] << 8)) * (float)(int8_t)block[2 + n % 32];
    }
    return PRILL_OK;
}

static prill_code table_of(struct file *f, struct model *m)
{
    struct reader r = {f->bytes, f->bytes + f->size, 0};
    uint32_t alignment = 32, magic = (uint32_t)number(&r, 4), version = (uint32_t)number(&r, 4);
    uint64_t keys;
    prill_code code;
    if (magic != 0x46554747u || version < 2 || version > 3)
        return damaged("it is no GGUF of version 2 or 3");
    f->count = number(&r, 8);
    keys = number(&r, 8);
    if (r.bad || f->count > f->size / 24 || keys > f->size / 12)
        return damaged("it counts more than it holds");
    m->is.eos_id = -1;
    if ((code = keys_of(&r, keys, m, &alignment)) || (code = sane(m)))
        return code;
    if (!alignment || alignment > 1u << 20 || alignment & (alignment - 1))
        return damaged("the alignment is no power of two");
    if (!(f->tensors = take(m->context, f->count * sizeof *f->tensors + 1, OTHER)))
        return PRILL_OUT_OF_MEMORY;
    for (uint64_t n = 0; n < f->count; n++) {
        struct tensor *t = &f->tensors[n];
        t->name = text_of(&r);
        uint32_t dims = (uint32_t)number(&r, 4);
        if (r.bad || !dims || dims > 2)
            return damaged("a tensor has another number of dimensions than 1 or 2");
        t->dims[0] = number(&r, 8);
        t->dims[1] = dims == 2 ? number(&r, 8) : 1;
        t->type = (uint32_t)number(&r, 4);
        t->offset = number(&r, 8);
    }
    f->data = ((uint64_t)(r.at - f->bytes) + alignment - 1) / alignment * alignment;
    return r.bad || f->data > f->size ? damaged("the table of tensors runs past its end") : PRILL_OK;
}

static prill_code weights_of(struct file *f, struct model *m)
{
    prill_code c;
    uint64_t w = m->is.width, q = (uint64_t)m->is.n_heads * m->is.head_dim, ffn = m->is.ffn, vocab = m->is.vocab_size;
    uint64_t kv = (uint64_t)m->is.n_kv_heads * m->is.head_dim;
    int tied = 1;
    for (uint64_t n = 0; n < f->count; n++)
        tied &= !is(f->tensors[n].name, "output.weight");
    if (!(m->layers = take(m->context, m->is.n_layers * sizeof *m->layers, OTHER)))
        return PRILL_OUT_OF_MEMORY;
    if ((c = tensor_of(f, m, &m->embedding, w, vocab, "token_embd.weight")) ||
        (c = tensor_of(f, m, &m->norm, w, 1, "output_norm.weight")) ||
        (!tied && (c = tensor_of(f, m, &m->head, w, vocab, "output.weight"))))
        return c;
    m->head = tied ? m->embedding : m->head;
    for (uint32_t n = 0; n < m->is.n_layers; n++) {
        struct layer *l = &m->layers[n];
        if ((c = tensor_of(f, m, &l->attn_norm, w, 1, "blk.%u.attn_norm.weight", n)) ||
            (c = tensor_of(f, m, &l->q, w, q, "blk.%u.attn_q.weight", n)) ||
            (c = tensor_of(f, m, &l->k, w, kv, "blk.%u.attn_k.weight", n)) ||
            (c = tensor_of(f, m, &l->v, w, kv, "blk.%u.attn_v.weight", n)) ||
            (c = tensor_of(f, m, &l->output, q, w, "blk.%u.attn_output.weight", n)) ||
            (c = tensor_of(f, m, &l->ffn_norm, w, 1, "blk.%u.ffn_norm.weight", n)) ||
            (c = tensor_of(f, m, &l->gate, w, ffn, "blk.%u.ffn_gate.weight", n)) ||
            (c = tensor_of(f, m, &l->up, w, ffn, "blk.%u.ffn_up.weight", n)) ||
            (c = tensor_of(f, m, &l->down, ffn, w, "blk.%u.ffn_down.weight", n)))
            return c;
    }
    for (uint64_t n = 0; n < f->count; n++)
        if (!f->tensors[n].used)
            return fail(PRILL_UNSUPPORTED_TYPE, "a tensor is there that is not known here, or twice");
    return PRILL_OK;
}

static prill_code read_file(struct file *f, struct context *context, const char *path)
{
    struct stat about;
    int from = open(path, O_RDONLY | O_CLOEXEC);
    if (from < 0 || fstat(from, &about) || !S_ISREG(about.st_mode)) {
        prill_code code = fail(PRILL_MODEL_LOAD_FAILED, "%.200s: %s", path, from < 0 ? strerror(errno) : "no file");
        if (from >= 0)
            close(from);
        return code;
    }
    f->size = (uint64_t)about.st_size;
    f->bytes = take(context, f->size + 1, OTHER);
    uint64_t got = 0;
    ssize_t more = 1;
    while (f->bytes && got < f->size && (more = read(from, f->bytes + got, f->size - got)) > 0)
        got += (uint64_t)more;
    close(from);
    if (!f->bytes)
        return PRILL_OUT_OF_MEMORY;
    return got < f->size ? damaged("it cannot be read to its end") : PRILL_OK;
}

prill_code load(struct model *model, const char *path)
{
    struct file file = {0};
    prill_code code = read_file(&file, model->context, path);
    if (code == PRILL_OK && (code = table_of(&file, model)) == PRILL_OK)
        code = weights_of(&file, model);
    give(model->context, file.tensors, OTHER);
    give(model->context, file.bytes, OTHER);
    return code;
}
