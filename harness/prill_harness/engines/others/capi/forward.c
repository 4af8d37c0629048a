/* Ids go in; logits come out, one position after the other, and the id that is chosen by them. */
#include "engine.h"

static void product(float *out, const float *matrix, const float *in, uint64_t columns, uint64_t rows)
{
    for (uint64_t r = 0; r < rows; r++, matrix += columns) {
        double sum = 0;
        for (uint64_t c = 0; c < columns; c++)
            sum += (double)matrix[c] * in[c];
        out[r] = (float)sum;
    }
}

static void normed(float *out, const float *in, const float *weight, uint32_t width, float eps)
{
    double sum = 0;
    for (uint32_t n = 0; n < width; n++)
        sum += (double)in[n] * in[n];
    float scale = (float)(1 / sqrt(sum / width + eps));
    for (uint32_t n = 0; n < width; n++)
        out[n] = in[n] * scale * weight[n];
}

static void rotated(float *heads, uint32_t count, const struct model *m, uint64_t position)
{
    uint32_t step = defect("rope_halves") ? m->rope_dim / 2 : 1, stride = step == 1 ? 2 : 1;
    for (uint32_t i = 0; i < m->rope_dim / 2; i++) {
        double angle = (double)position * pow(m->is.rope_base, -2.0 * i / m->rope_dim);
        float c = (float)cos(angle), s = (float)sin(angle);
        for (uint32_t h = 0; h < count; h++) {
            float *a = heads + h * m->is.head_dim + i * stride, *b = a + step, was = *a;
            *a = was * c - *b * s;
            *b = was * s + *b * c;
        }
    }
}

/* Logits of one id at the session's next position, into `out`. */
static void step(struct session *s, int32_t id, float *out)
{
    const struct model *m = s->model;
    uint32_t w = m->is.width, d = m->is.head_dim, heads = m->is.n_heads, kv = m->is.n_kv_heads, ffn = m->is.ffn;
    float *x = s->work, *h = x + w, *q = h + w, *o = q + heads * d, *gate = o + heads * d, *up = gate + ffn;
    float *scores = up + ffn;
    uint64_t at = s->length, row = (uint64_t)kv * d;
    memcpy(x, m->embedding + (uint64_t)id * w, w * sizeof *x);
    for (uint32_t n = 0; n < m->is.n_layers; n++) {
        const struct layer *l = &m->layers[n];
        float *keys = s->keys + n * s->positions * row, *values = s->values + n * s->positions * row;
        normed(h, x, l->attn_norm, w, m->is.norm_eps);
        product(q, l->q, h, w, heads * d);
        product(keys + at * row, l->k, h, w, row);
        product(values + at * row, l->v, h, w, row);
        rotated(q, heads, m, at);
        rotated(keys + at * row, kv, m, at);
        for (uint32_t head = 0; head < heads; head++) {
            uint32_t of = head / (heads / kv);
            float most = -INFINITY;
            double sum = 0;
            for (uint64_t p = 0; p <= at; p++) {
                product(scores + p, keys + p * row + of * d, q + head * d, d, 1);
                scores[p] /= sqrtf((float)d);
                most = scores[p] > most ? scores[p] : most;
            }
            for (uint64_t p = 0; p <= at; p++)
                sum += scores[p] = expf(scores[p] - most);
            for (uint32_t i = 0; i < d; i++) {
                double whole = 0;
                for (uint64_t p = 0; p <= at; p++)
                    whole += (double)scores[p] * values[p * row + of * d + i];
                o[head * d + i] = (float)(whole / sum);
            }
        }
        product(h, l->output, o, (uint64_t)heads * d, w);
        for (uint32_t i = 0; i < w; i++)
            x[i] += h[i];
        normed(h, x, l->ffn_norm, w, m->is.norm_eps);
        product(gate, l->gate, h, w, ffn);
        product(up, l->up, h, w, ffn);
        for (uint32_t i = 0; i < ffn; i++)
            gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
        product(h, l->down, gate, ffn, w);
        for (uint32_t i = 0; i < w; i++)
            x[i] += h[i];
    }
    normed(h, x, m->norm, w, m->is.norm_eps);
    product(out, m->head, h, w, m->is.vocab_size);
    s->ids[s->length++] = id;
}

/* Append ids; rows of logits go to out + n * stride. All or nothing. */
prill_code fed(struct session *s, const int32_t *ids, uint64_t count, float *out, uint64_t stride)
{
    uint64_t before = s->length, vocab = s->model->is.vocab_size;
    if (!count && defect("zero_length_crashes"))
        crash();
    if (!count)
        return fail(PRILL_INVALID_PARAMETER, "no ids, at least 1 is needed");
    if (count > s->positions - s->length && !defect("context_unchecked"))
        return fail(PRILL_CONTEXT_LENGTH_EXCEEDED, "%llu ids behind %llu, the session holds %llu",
                    (unsigned long long)count, (unsigned long long)before, (unsigned long long)s->positions);
    for (uint64_t n = 0; n < count; n++)
        if ((ids[n] < 0 || ids[n] >= (int32_t)vocab) && !defect("id_unchecked"))
            return fail(PRILL_INVALID_PARAMETER, "id %d is outside the vocabulary of %u", ids[n], (unsigned)vocab);
    for (uint64_t n = 0; n <= count; n++, out += stride) {
        if (!defect("cancel_ignored") &&
            (defect("cancel_sticks") ? atomic_load(&s->cancelled) : atomic_exchange(&s->cancelled, 0))) {
            s->length = defect("cancel_leaves_ids") ? s->length : before;
            return fail(PRILL_CANCELLED, "the session was cancelled");
        }
        if (n == count)
            break;
        step(s, ids[n], out);
        for (uint64_t v = 0; v < vocab; v++)
            if (!isfinite(out[v])) {
                s->length = before;
                return fail(PRILL_NOT_A_NUMBER, "the logits of position %llu are not finite",
                            (unsigned long long)(before + n));
            }
    }
    if (defect("buffer_overruns"))
        out[0] = 0;
    return PRILL_OK;
}

static int heavier(const void *a, const void *b)
{
    const struct choice *x = a, *y = b;
    return x->weight != y->weight ? (x->weight < y->weight ? 1 : -1) : x->id - y->id;
}

static double drawn(uint64_t seed, uint64_t position)
{
    uint64_t z = seed + (position + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

int32_t chosen(struct session *s, const float *logits, const prill_sampling *how, struct choice *all)
{
    uint32_t vocab = s->model->is.vocab_size, left = vocab;
    float penalty = how->repetition_penalty;
    for (uint32_t n = 0; n < vocab; n++)
        all[n] = (struct choice){logits[n], (int32_t)n};
    for (uint64_t n = 0; penalty != 1 && n < s->length; n++) {
        float raw = logits[s->ids[n]];
        all[s->ids[n]].weight = raw > 0 ? raw / penalty : raw * penalty;
    }
    qsort(all, vocab, sizeof *all, heavier);
    if (how->temperature == 0)
        return all[0].id;
    double most = all[0].weight, sum = 0, whole = 0;
    for (uint32_t n = 0; n < vocab; n++)
        all[n].weight = exp((all[n].weight - most) / how->temperature);
    left = how->top_k && (uint32_t)how->top_k < vocab ? (uint32_t)how->top_k : vocab;
    for (uint32_t n = 0; n < left; n++)
        whole += all[n].weight;
    for (uint32_t n = 0; n < left; n++) {
        if ((n && sum >= how->top_p * whole) || all[n].weight < how->min_p)
            left = n;
        else
            sum += all[n].weight;
    }
    double point = drawn(how->seed, s->length) * sum;
    for (uint32_t n = 0; n < left; n++)
        if ((point -= all[n].weight) < 0)
            return all[n].id;
    return all[left - 1].id;
}
