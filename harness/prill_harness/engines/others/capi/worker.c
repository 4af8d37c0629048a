/* Lines of JSON go in; the calls of the example engine are made, and lines of JSON come out.
 *
 * The reference in C of the protocol that `exec:` speaks (channels/lines.py): link it with any engine that has
 * prill_engine.h. It offers `logits` and `generate`. Like the engine it has defects that can be switched on.
 */
#include "engine.h"

#include <ctype.h>
#include <signal.h>

static prill_context context;
static prill_model model;
static prill_model_info info;
static prill_device_info device;

/* --- reading JSON: values are found where they are, nothing is copied -------------------------------------------- */

static const char *blanks(const char *at)
{
    while (*at && strchr(" \t\r\n", *at))
        at++;
    return at;
}

/* Behind the value at `at`; NULL where it is broken off. */
static const char *behind(const char *at)
{
    int depth = 0;
    do {
        at = blanks(at);
        if (*at == '"') {
            for (at++; *at && *at != '"'; at++)
                at += *at == '\\' && at[1];
            at += *at == '"';
        } else if (*at && strchr("[{", *at))
            depth++, at++;
        else if (*at && strchr("]}", *at))
            depth--, at++;
        else if (*at && strchr(",:", *at) && depth)
            at++;
        else if (*at && !strchr(",:]}", *at))
            at += strcspn(at, ",:]}[{\" \t\r\n");
        else
            return NULL;
    } while (depth > 0);
    return at;
}

/* The value of a key of the object that is the line; NULL if it has none. */
static const char *value(const char *line, const char *key)
{
    const char *at = blanks(line);
    size_t length = strlen(key);
    if (*at++ != '{')
        return NULL;
    while (at && *(at = blanks(at)) == '"') {
        int found = !strncmp(at + 1, key, length) && at[length + 1] == '"';
        if (!(at = behind(at)) || *(at = blanks(at)) != ':')
            return NULL;
        at = blanks(at + 1);
        if (found)
            return at;
        if ((at = behind(at)) && *(at = blanks(at)) == ',')
            at++;
    }
    return NULL;
}

static int is_text(const char *at, const char *wanted)
{
    size_t length = strlen(wanted);
    return at && *at == '"' && !strncmp(at + 1, wanted, length) && at[length + 1] == '"';
}

static int is_true(const char *line, const char *key)
{
    const char *at = value(line, key);
    return at && !strncmp(at, "true", 4);
}

static double number_of(const char *line, const char *key, double otherwise)
{
    const char *at = value(line, key);
    return at && (isdigit((unsigned char)*at) || *at == '-') ? strtod(at, NULL) : otherwise;
}

/* A text without its quotes; escapes are taken for what JSON writes of plain paths. */
static char *text_of(const char *at)
{
    char *out = at && *at == '"' ? calloc(1, strlen(at)) : NULL, *to = out;
    for (at = at ? at + 1 : at; out && *at && *at != '"'; at++)
        if (*at == '\\' && at[1] == 'u') {
            unsigned code = 0;
            sscanf(at + 2, "%4x", &code);
            if (code >= 0x800)
                *to++ = (char)(0xe0 | code >> 12), *to++ = (char)(0x80 | (code >> 6 & 63));
            else if (code >= 0x80)
                *to++ = (char)(0xc0 | code >> 6);
            *to++ = (char)(code >= 0x80 ? 0x80 | (code & 63) : code);
            at += strnlen(at, 6) - 1;
        } else
            *to++ = *at == '\\' && at[1] ? *++at : *at;
    return out;
}

/* A list of ids; *count: how many, -1 if it is none. */
static int32_t *ids_of(const char *at, int64_t *count)
{
    int32_t *ids = at && *at == '[' ? calloc(strlen(at) / 2 + 1, sizeof *ids) : NULL;
    *count = ids ? 0 : -1;
    for (at = at ? blanks(at + 1) : at; ids && *at != ']'; at = blanks(at)) {
        char *end;
        long long id = strtoll(at, &end, 10);
        if (end == at || id < INT32_MIN || id > INT32_MAX) {
            *count = -1;
            break;
        }
        ids[(*count)++] = (int32_t)id;
        at = blanks(end);
        at += *at == ',';
    }
    return ids;
}

/* --- answers ------------------------------------------------------------------------------------------------------- */

static void quoted(const char *text)
{
    putchar('"');
    for (; *text; text++)
        if (*text == '"' || *text == '\\' || (unsigned char)*text < 32)
            printf("\\u%04x", (unsigned)(unsigned char)*text);
        else
            putchar(*text);
    putchar('"');
}

static void failed(long id, const char *kind, const char *sentence)
{
    printf("{\"id\": %ld, \"error\": {\"kind\": \"%s\", \"message\": ", defect("worker_wrong_id") ? id + 7 : id, kind);
    quoted(sentence);
    printf("}}\n");
}

static void failed_as(long id, prill_code code)
{
    static const char *const names[] = {
        "ok", "invalid_device", "out_of_memory", "model_load_failed", "inference_failed", "invalid_parameter",
        "kernel_launch_failed", "residency_violated", "device_not_found", "context_length_exceeded", "cancelled",
        "unsupported_type", "tokenizer", "not_a_number", "device_lost", "unknown"};
    char said[1024];
    prill_last_error(said, sizeof said, NULL);
    failed(id, names[code], said);
}

static void base64(const uint8_t *data, size_t length)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t n = 0; n < length; n += 3) {
        uint32_t three = (uint32_t)data[n] << 16 | (n + 1 < length ? data[n + 1] : 0u) << 8 |
                         (n + 2 < length ? data[n + 2] : 0u);
        putchar(digits[three >> 18]);
        putchar(digits[three >> 12 & 63]);
        putchar(n + 1 < length ? digits[three >> 6 & 63] : '=');
        putchar(n + 2 < length ? digits[three & 63] : '=');
    }
}

static void hello(long id, const char *line)
{
    char *path = text_of(value(line, "model"));
    prill_code code = PRILL_INVALID_PARAMETER;
    if (number_of(line, "protocol", 0) != 1 || !path)
        failed(id, "invalid_parameter", "expected protocol 1 and the path of a model");
    else if ((code = prill_context_create(0, NULL, &context)) || (code = prill_model_load(context, path, &model)) ||
             (code = prill_model_describe(model, &info)) || (code = prill_context_device(context, &device)))
        failed_as(id, code);
    else
        printf("{\"id\": %ld, \"result\": {\"name\": \"example worker\", \"version\": \"%s\", \"device\": \"%s\", "
               "\"arithmetic\": \"%s\", \"draws\": \"own\", \"calls\": [\"logits\", \"generate\"], \"config\": "
               "{\"vocab_size\": %u, \"n_layers\": %u, \"width\": %u, \"n_heads\": %u, \"n_kv_heads\": %u, \"head_dim\": "
               "%u, \"ffn\": %u, \"context_length\": %u, \"norm_eps\": %.17g, \"rope_base\": %.17g}}}\n",
               id, device.version, device.device, device.arithmetic, info.vocab_size, info.n_layers, info.width,
               info.n_heads, info.n_kv_heads, info.head_dim, info.ffn, info.context_length, (double)info.norm_eps,
               (double)info.rope_base);
    free(path);
}

static void logits(long id, const int32_t *ids, uint64_t count)
{
    prill_session session = 0;
    uint64_t floats = count * info.vocab_size;
    uint64_t positions = count < info.context_length ? count + !count : info.context_length;
    float *out = calloc(floats + 1, sizeof *out);
    prill_code code = prill_session_create(model, positions, &session);
    if (!out)
        failed(id, "out_of_memory", "needed room for the logits, none available");
    else if (code || (code = prill_session_logits(session, ids, count, out, floats)))
        failed_as(id, code);
    else {
        printf("{\"id\": %ld, \"result\": {\"dtype\": \"float32\", \"shape\": [%llu, %u], \"base64\": \"", id,
               (unsigned long long)count, info.vocab_size);
        base64((uint8_t *)out, floats * sizeof *out);
        printf("\"}}\n");
    }
    prill_session_free(session);
    free(out);
}

/* Tell a token; whether to go on. */
static int told(long id, int32_t token, float logprob)
{
    char *line = NULL;
    size_t room = 0;
    printf("{\"id\": %ld, \"token\": %d, \"logprob\": %.9g}\n", id, token, (double)logprob);
    if (defect("worker_dies"))
        fflush(stdout), raise(SIGKILL);
    if (defect("worker_exits"))
        fflush(stdout), exit(3);
    if (defect("worker_garbage"))
        printf("progress: 1 token\n");
    fflush(stdout);
    while (defect("worker_hangs"))
        pause();
    while (defect("worker_floods"))
        printf("0123456789abcdef");
    int go = getline(&line, &room, stdin) > 0 && is_true(line, "go");
    free(line);
    return go;
}

static void generate(long id, const char *line, const int32_t *ids, uint64_t count)
{
    double most = number_of(line, "max_tokens", -1);
    const char *stop = value(line, "stop");
    if (most < 0 || most > 1e9) {
        failed(id, "invalid_parameter", "max_tokens, expected 0 to 1000000000");
        return;
    }
    if (stop && (*stop != '[' || *blanks(stop + 1) != ']')) {
        failed(id, "missing_capability", "this worker has no texts, so no strings to stop at");
        return;
    }
    prill_sampling how = {
        .temperature = (float)number_of(line, "temperature", 0), .top_k = (int32_t)number_of(line, "top_k", 0),
        .top_p = (float)number_of(line, "top_p", 1), .min_p = (float)number_of(line, "min_p", 0),
        .repetition_penalty = (float)number_of(line, "repetition_penalty", 1)};
    const char *seed = value(line, "seed"), *reason = "length";
    how.seed = seed ? strtoull(seed, NULL, 10) : 0;
    uint64_t wanted = (uint64_t)most, room = info.context_length, written = 0, fed = count;
    int32_t *made = calloc(room + 2, sizeof *made), end = -1;
    float *logprobs = calloc(room + 2, sizeof *logprobs);
    prill_session session = 0;
    prill_code code = prill_session_create(model, room, &session);
    if (!made || !logprobs)
        code = PRILL_OUT_OF_MEMORY;
    while (!code && (written < wanted || !count)) {
        if (written && count + written > room) {
            reason = "context";
            break;
        }
        code = prill_session_next(session, written ? &made[written - 1] : ids, fed, &how, &made[written],
                                  &logprobs[written]);
        fed = 1;
        if (code)
            break;
        if (made[written] == info.eos_id && !is_true(line, "ignore_eos")) {
            end = made[written];
            reason = "eos";
            break;
        }
        written++;
        if (is_true(line, "stream") && !told(id, made[written - 1], logprobs[written - 1])) {
            reason = "cancelled";
            break;
        }
    }
    if (defect("worker_leaks"))
        memset(malloc(32768), 1, 32768);
    if (code)
        failed_as(id, code);
    else {
        printf("{\"id\": %ld, \"result\": {\"finish_reason\": \"%s\", \"end_id\": ", id, reason);
        printf(end < 0 ? "null, \"ids\": [" : "%d, \"ids\": [", end);
        for (uint64_t n = 0; n < written; n++)
            printf(n ? ", %d" : "%d", made[n]);
        printf("], \"logprobs\": [");
        for (uint64_t n = 0; n < written; n++)
            printf(n ? ", %.9g" : "%.9g", (double)logprobs[n]);
        printf("]}}\n");
    }
    prill_session_free(session);
    free(made);
    free(logprobs);
}

static void answer(const char *line)
{
    long id = (long)number_of(line, "id", -1);
    const char *call = value(line, "call");
    int64_t count;
    if (is_text(call, "hello")) {
        hello(id, line);
        return;
    }
    if (!model) {
        failed(id, "invalid_parameter", "a call before hello");
        return;
    }
    int32_t *ids = ids_of(value(line, "ids"), &count);
    if (count < 0 && defect("worker_dies_of_bad_ids"))
        crash();
    if (!is_text(call, "logits") && !is_text(call, "generate"))
        failed(id, "missing_capability", "no such call");
    else if (count < 0)
        failed(id, "invalid_parameter", "ids, expected a list of numbers of 32 bits");
    else if (is_text(call, "logits"))
        logits(id, ids, (uint64_t)count);
    else
        generate(id, line, ids, (uint64_t)count);
    free(ids);
}

int main(void)
{
    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, stdin) > 0) {
        answer(line);
        fflush(stdout);
    }
    free(line);
    prill_context_destroy(context);
    return 0;
}
