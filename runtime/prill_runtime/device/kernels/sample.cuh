// What a draw keeps between its passes, and how a logit is ordered and weighed (sample.cu).
#pragma once
#include "common.cuh"

#define THREADS 256
#define BINS 2048
#define DIGIT 11      // bits that tell bins apart
#define LISTED 512    // so many ids are listed one by one
#define CHUNK 4096    // ids of a block whose masses fit a bin's 32-bit parts
#define MOST_PASSES 64

typedef unsigned long long Word;

enum Phase { TOP_K, TOP_P, DRAW, DONE };
enum Digit { BY_VALUE, BY_KEY, BY_ID, LIST };

struct Sampling {
    double temperature;  // above 0
    double top_p;
    double min_p;
    double penalty;
    long long seed;      // the bits of an unsigned number
    int top_k;           // 0: off
    int masks;           // whether a logit of -inf is a mask; else the row is refused
};

struct Mass { Word high, low; };  // high 2^-38 + low 2^-76; low below 2^38

struct Sampler {
    double top, scale;            // the largest value; bins for a difference of 1 from it
    double raw_top, raw_sum;      // of the logits as they came, for the logprob
    double target;                // mass that the current phase looks for
    Mass base;                    // mass before the group of ids that is being divided
    Word prefix, last_key;        // keys of the group, shifted; the last key that a filter left
    Word least, most;             // keys that a pass saw in the group
    int last_id;                  // the last id with the last key
    int phase, digit, bin, keyed, shift, next_shift, id_shift, id_prefix;
    int result;                   // an id, or one of Wrong
    unsigned arrived, listed;
};

struct SampleArgs {
    const float* logits;        // (vocab,)
    unsigned char* seen;        // (vocab,): 1 for ids of the text so far; read when there is a penalty
    const Sampling* params;
    Sampler* state;
    unsigned long long* bins;   // (2048, 3): high and low part of the mass, count
    double* values;             // (512,): what was listed
    int* which;                 // (512,)
    double* partial;            // (part, 8)
    Sequence* sequence;
    int* position;              // the next position, for embeddings and angles
    int* ids;                   // (ring,)
    double* logprobs;           // (ring,)
    int vocab;
    int ring;
};

static_assert(sizeof(Sampling) == 48 && sizeof(Sampler) <= 256, "as sampling.py has them");

static __device__ __forceinline__ double largest(double x, double y) { return y > x ? y : x; }

// The logit of an id in float64, with the penalty; 0 for -0.
static __device__ __forceinline__ double value_of(const SampleArgs& a, double penalty, int i) {
    double v = a.logits[i];
    if (penalty != 1.0 && a.seen[i]) v = v > 0.0 ? v / penalty : __dmul_rn(v, penalty);
    return v == 0.0 ? 0.0 : v;
}

// Smaller for larger values.
static __device__ __forceinline__ Word key_of(double v) {
    const Word bits = (Word)__double_as_longlong(v);
    return bits >> 63 ? bits : ~(bits | 1ull << 63);
}

static __device__ __forceinline__ Mass mass_of(double weight) {
    const double scaled = weight * 274877906944.0;  // 2^38
    const Word high = (Word)scaled;
    return {high, (Word)((scaled - (double)high) * 274877906944.0)};
}

static __device__ __forceinline__ Mass carried(Word high, Word low) { return {high + (low >> 38), low & ((1ull << 38) - 1)}; }

static __device__ __forceinline__ double number_of(Mass m) {
    return (double)m.high * 0x1p-38 + (double)m.low * 0x1p-76;
}

static __device__ __forceinline__ bool reached(const Sampler& s, Mass m) {
    const double mass = number_of(m);
    return mass > 0.0 && (s.phase == DRAW ? mass > s.target : mass >= s.target);
}

static __device__ __forceinline__ double weight_of(const Sampler& s, double temperature, double v) {
    return s.phase == TOP_K ? 1.0 : exp((v - s.top) / temperature);
}

static __device__ __forceinline__ int bin_by_value(const Sampler& s, double v) {
    const double at = (s.top - v) * s.scale;
    return at < BINS - 1 ? (int)at : BINS - 1;
}

// Philox4x32-10 (Salmon et al., SC 2011), as philox.py: a fraction of 53 bits from a seed and a position.
static __device__ double philox_uniform(Word seed, Word position) {
    unsigned c0 = (unsigned)position, c1 = (unsigned)(position >> 32), c2 = 0, c3 = 0;
    unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const Word p0 = (Word)0xD2511F53u * c0, p1 = (Word)0xCD9E8D57u * c2;
        const unsigned n0 = (unsigned)(p1 >> 32) ^ c1 ^ k0, n2 = (unsigned)(p0 >> 32) ^ c3 ^ k1;
        c0 = n0, c1 = (unsigned)p1, c2 = n2, c3 = (unsigned)p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return (double)((Word)(c0 >> 5) << 26 | c1 >> 6) * 0x1p-53;
}

static __device__ void begin_phase(Sampler* s, int phase) {
    s->phase = phase;
    s->digit = BY_VALUE;
    s->base = {0, 0};
    s->bin = -1, s->keyed = 0, s->shift = 0, s->prefix = 0, s->id_shift = 31, s->id_prefix = 0;
    s->least = ~0ull, s->most = 0, s->listed = 0;
}

// The phase has found its id: what is left of the filters, or the draw.
static __device__ void resolve(const SampleArgs& a, int phase, double value, int id) {
    Sampler* s = a.state;
    if (phase == DRAW || (phase == TOP_K && a.params->top_k == 1)) {
        s->result = id;
        s->phase = DONE;
        return;
    }
    s->last_key = key_of(value), s->last_id = id;
    begin_phase(s, phase == TOP_K && a.params->top_p < 1.0 ? TOP_P : DRAW);
}
