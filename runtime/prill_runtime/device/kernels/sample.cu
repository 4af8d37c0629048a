// A row of logits -> the id that sampler.py draws from it, with its logprob; then the sequence moves on.
//
// Nothing is sorted. Every filter, and the draw itself, asks the same question: in the order of the most probable
// first, the lowest id first on ties, with which id does the mass reach a target? A pass over the vocabulary adds up
// the masses of 2048 bins and finds the bin in which that happens; the next pass divides that bin, first by value,
// then by the bits of the value's order, then by the id; once it holds few ids, each counts the mass before its own.
// Top-k is that question with a mass of 1 each, top-p and the draw with exp((x - largest) / temperature).
//
// Masses are whole numbers of 2^-76, so that a sum is exact, whoever adds first: no order to keep, and two runs are
// equal bit for bit. sampler.py adds up in float64, n values with an error of n 2^-53 of the whole at most (1e-12 in
// practice) and has another exp: ids may differ only where a target falls that close to the border between two.
//
// One launch of sample_pass does one pass; the block that finishes last decides what the next one asks. A graph holds
// some of them, and sample_finish, a single block, does those that are still missing.
#include "sample.cuh"

struct Work {  // shared memory of a block
    union {
        unsigned parts[5][BINS];  // count, and four parts of 19 bits of the mass
        struct {
            Word keys[LISTED], high[LISTED], low[LISTED];
            double values[LISTED];
            int ids[LISTED];
        } list;
    };
    Mass scan[THREADS];
    Word least[THREADS / 32], most[THREADS / 32];
    unsigned arrived;
};

// Adds up a block's part of the vocabulary in its bins, or lists the ids of the group.
static __device__ void gather(const SampleArgs& a, const Sampler& s, Work& w, int low, int high) {
    const double penalty = a.params->penalty, temperature = a.params->temperature, min_p = a.params->min_p;
    Word least = ~0ull, most = 0;
    for (int chunk = low; chunk < high; chunk += CHUNK) {
        if (s.digit != LIST)
            for (int i = threadIdx.x; i < BINS; i += THREADS)
                for (int n = 0; n < 5; ++n) w.parts[n][i] = 0;
        __syncthreads();
        for (int i = chunk + threadIdx.x; i < min(chunk + CHUNK, high); i += THREADS) {
            const double v = value_of(a, penalty, i);
            if (!(v > -(double)INFINITY)) continue;
            const Word key = key_of(v);
            if (key > s.last_key || (key == s.last_key && i > s.last_id)) continue;
            if (s.bin >= 0 && bin_by_value(s, v) != s.bin) continue;
            if ((s.keyed && key >> s.shift != s.prefix) || i >> s.id_shift != s.id_prefix) continue;
            const double weight = weight_of(s, temperature, v);
            if (s.phase == DRAW && weight < min_p) continue;
            least = key < least ? key : least, most = key > most ? key : most;
            if (s.digit == LIST) {
                const unsigned at = atomicAdd(&a.state->listed, 1u);
                if (at < LISTED) a.values[at] = v, a.which[at] = i;
                continue;
            }
            const int bin = s.digit == BY_VALUE ? bin_by_value(s, v)
                          : s.digit == BY_KEY   ? (int)(key >> s.next_shift & (BINS - 1))
                                                : i >> s.next_shift & (BINS - 1);
            const Mass m = mass_of(weight);
            atomicAdd(&w.parts[0][bin], 1u);
            atomicAdd(&w.parts[1][bin], (unsigned)(m.high >> 19));
            if (s.phase == TOP_K) continue;
            atomicAdd(&w.parts[2][bin], (unsigned)m.high & 0x7FFFFu);
            atomicAdd(&w.parts[3][bin], (unsigned)(m.low >> 19));
            atomicAdd(&w.parts[4][bin], (unsigned)m.low & 0x7FFFFu);
        }
        __syncthreads();
        if (s.digit != LIST)
            for (int i = threadIdx.x; i < BINS; i += THREADS)
                if (w.parts[0][i]) {
                    atomicAdd(a.bins + 3 * i, ((Word)w.parts[1][i] << 19) + w.parts[2][i]);
                    if (s.phase != TOP_K) atomicAdd(a.bins + 3 * i + 1, ((Word)w.parts[3][i] << 19) + w.parts[4][i]);
                    atomicAdd(a.bins + 3 * i + 2, (Word)w.parts[0][i]);
                }
        __syncthreads();
    }
    for (int step = 16; step; step >>= 1) {
        const Word less = __shfl_xor_sync(0xFFFFFFFFu, least, step), more = __shfl_xor_sync(0xFFFFFFFFu, most, step);
        least = less < least ? less : least, most = more > most ? more : most;
    }
    if (threadIdx.x % 32 == 0) w.least[threadIdx.x / 32] = least, w.most[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int n = 1; n < THREADS / 32; ++n) {
            least = w.least[n] < least ? w.least[n] : least;
            most = w.most[n] > most ? w.most[n] : most;
        }
        atomicMin(&a.state->least, least);
        atomicMax(&a.state->most, most);
    }
}

// Bits from the highest in which two keys of a group differ.
static __device__ __forceinline__ int width_of(Word least, Word most) { return least == most ? 0 : 64 - __clzll(least ^ most); }

// Goes on with the ids of one bin, before which lies the mass `base`.
static __device__ void divide(const SampleArgs& a, const Sampler& s, int bin, Mass base, Word count) {
    Sampler* t = a.state;
    const Word least = load_shared_by_blocks(&t->least), most = load_shared_by_blocks(&t->most);
    const int width = width_of(least, most);
    int left = width;  // bits that the ids of the bin may still differ in
    if (s.digit == BY_VALUE) t->bin = bin;
    if (s.digit == BY_KEY) {
        t->keyed = 1, t->shift = s.next_shift, t->prefix = (least >> s.next_shift & ~(Word)(BINS - 1)) | (Word)bin;
        left = min(left, s.next_shift);
    }
    if (width == 0) t->keyed = 1, t->shift = 0, t->prefix = least;
    const int id_shift = s.digit == BY_ID ? s.next_shift : s.id_shift;
    if (s.digit == BY_ID) t->id_shift = id_shift, t->id_prefix = s.id_prefix << (s.id_shift - id_shift) | bin;
    t->digit = count <= LISTED ? LIST : left ? BY_KEY : BY_ID;
    t->next_shift = max(0, (left ? left : min(id_shift, 64 - __clzll((Word)(a.vocab - 1) | 1))) - DIGIT);
    t->base = base;
    t->least = ~0ull, t->most = 0, t->listed = 0;
}

// What follows from the bins of all blocks.
static __device__ void decide(const SampleArgs& a, Sampler& s, Work& w) {
    const int each = BINS / THREADS, first = threadIdx.x * each;
    Mass mine = {0, 0};
    for (int b = first; b < first + each; ++b)
        mine = carried(mine.high + load_shared_by_blocks(a.bins + 3 * b), mine.low + load_shared_by_blocks(a.bins + 3 * b + 1));
    Mass upto = mine;
    for (unsigned step = 1; step < THREADS; step <<= 1) {
        w.scan[threadIdx.x] = upto;
        __syncthreads();
        if (threadIdx.x >= step) {
            const Mass before = w.scan[threadIdx.x - step];
            upto = carried(upto.high + before.high, upto.low + before.low);
        }
        __syncthreads();
    }
    w.scan[threadIdx.x] = upto;
    __syncthreads();
    if (s.digit == BY_VALUE) {
        const double total = number_of(w.scan[THREADS - 1]);
        const Word at = (Word)(a.sequence->offset + a.sequence->length + 1);
        s.target = s.phase == TOP_K ? (double)a.params->top_k
                 : s.phase == TOP_P ? a.params->top_p * total
                                    : philox_uniform((Word)a.params->seed, at) * total;
        if (threadIdx.x == 0) a.state->target = s.target;
    }
    const Mass before = threadIdx.x ? w.scan[threadIdx.x - 1] : Mass{0, 0};
    Mass mass = carried(s.base.high + before.high, s.base.low + before.low);
    if (!reached(s, mass) && reached(s, carried(s.base.high + upto.high, s.base.low + upto.low)))
        for (int b = first; b < first + each; ++b) {
            const Word high = load_shared_by_blocks(a.bins + 3 * b), low = load_shared_by_blocks(a.bins + 3 * b + 1);
            const Mass then = carried(mass.high + high, mass.low + low);
            if (reached(s, then)) {
                divide(a, s, b, mass, load_shared_by_blocks(a.bins + 3 * b + 2));
                break;
            }
            mass = then;
        }
    for (int i = 3 * first; i < 3 * (first + each); ++i) a.bins[i] = 0;
}

// What follows from a list of all that is left: each id adds up what comes before it, itself included.
static __device__ void choose(const SampleArgs& a, const Sampler& s, Work& w) {
    const int count = min((int)load_shared_by_blocks(&a.state->listed), LISTED);
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const double v = load_shared_by_blocks(a.values + i);
        const Mass m = mass_of(weight_of(s, a.params->temperature, v));
        w.list.keys[i] = key_of(v), w.list.values[i] = v, w.list.ids[i] = load_shared_by_blocks(a.which + i);
        w.list.high[i] = m.high, w.list.low[i] = m.low;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const Word key = w.list.keys[i];
        const int id = w.list.ids[i];
        Word high = s.base.high, low = s.base.low;
        for (int j = 0; j < count; ++j)
            if (w.list.keys[j] < key || (w.list.keys[j] == key && w.list.ids[j] < id)) high += w.list.high[j], low += w.list.low[j];
        if (!reached(s, carried(high, low)) && reached(s, carried(high + w.list.high[i], low + w.list.low[i])))
            resolve(a, s.phase, w.list.values[i], id);
    }
}

// One pass over a block's part of the vocabulary; the block that is last says what comes next.
static __device__ void pass(const SampleArgs& a, Work& w, int low, int high) {
    Sampler s = *a.state;
    if (s.phase == DONE) return;
    gather(a, s, w, low, high);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) w.arrived = atomicAdd(&a.state->arrived, 1u);
    __syncthreads();
    if (w.arrived != gridDim.x - 1) return;
    __threadfence();
    if (threadIdx.x == 0) a.state->arrived = 0;
    if (s.digit == LIST) choose(a, s, w);
    else decide(a, s, w);
}

// The largest values, the normaliser of the logprob, and whether every logit is a number; the first question.
KERNEL(sample_begin, SampleArgs, 256) {
    __shared__ double tops[THREADS / 32];
    __shared__ unsigned arrived;
    const auto most = [&](double v) {
        for (int step = 16; step; step >>= 1) v = largest(v, __shfl_xor_sync(0xFFFFFFFFu, v, step));
        __syncthreads();
        if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = v;
        __syncthreads();
        v = tops[0];
        for (int n = 1; n < THREADS / 32; ++n) v = largest(v, tops[n]);
        return v;
    };
    const double none = -(double)INFINITY, penalty = a.params->penalty;
    const int each = (a.vocab + gridDim.x - 1) / gridDim.x, low = blockIdx.x * each, high = min(low + each, a.vocab);
    double raw = none, top = none, bottom = none, sum = 0.0, finite = 0.0, odd = 0.0, first = none;
    for (int i = low + threadIdx.x; i < high; i += THREADS) {
        const float x = a.logits[i];
        const double v = value_of(a, penalty, i);
        raw = largest(raw, (double)x), top = largest(top, v);
        odd += (__float_as_uint(x) & INFINITY_BITS) == INFINITY_BITS;
        if (v > none && v < -none) bottom = largest(bottom, -v), finite += 1.0;
        else if (!(v == none)) first = largest(first, -(2.0 * i + (v != v)));
    }
    raw = most(raw);
    if (raw > none)
        for (int i = low + threadIdx.x; i < high; i += THREADS) sum += exp((double)a.logits[i] - raw);
    top = most(top), bottom = most(bottom), first = most(first);
    sum = block_sum(sum, tops), finite = block_sum(finite, tops), odd = block_sum(odd, tops);
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < 3 * BINS; i += gridDim.x * THREADS) a.bins[i] = 0;
    if (threadIdx.x == 0) {
        double* out = a.partial + 8 * blockIdx.x;
        out[0] = raw, out[1] = sum, out[2] = top, out[3] = bottom, out[4] = finite, out[5] = odd, out[6] = first;
        __threadfence();
        arrived = atomicAdd(&a.state->arrived, 1u);
    }
    __syncthreads();
    if (arrived != gridDim.x - 1) return;
    __threadfence();
    const bool mine = threadIdx.x < gridDim.x;
    const double* part = a.partial + 8 * threadIdx.x;
    const auto load = [&](int field) { return load_shared_by_blocks(part + field); };
    const double raw_part = mine ? load(0) : none, raw_top = most(raw_part);
    const double raw_sum = block_sum(raw_part > none ? load(1) * exp(raw_part - raw_top) : 0.0, tops);
    top = most(mine ? load(2) : none), bottom = -most(mine ? load(3) : none);
    finite = block_sum(mine ? load(4) : 0.0, tops), odd = block_sum(mine ? load(5) : 0.0, tops);
    first = -most(mine ? load(6) : none);
    if (threadIdx.x) return;
    const Sampling& p = *a.params;
    Sampler* s = a.state;
    s->arrived = 0;
    s->raw_top = raw_top, s->raw_sum = raw_sum, s->top = top;
    // Ids far below the largest share the last bin: their mass is next to nothing. Any scale gives the same id.
    const double reach = 64.0 * largest(p.temperature, 1.0), span = reach < top - bottom ? reach : top - bottom;
    s->scale = span > 0.0 ? (BINS - 1) / span : 0.0;
    s->last_key = ~0ull, s->last_id = a.vocab;
    s->result = UNDECIDED;
    const bool cut = p.top_k > 0 && p.top_k < finite;
    begin_phase(s, cut ? TOP_K : p.top_p < 1.0 ? TOP_P : DRAW);
    if (odd > 0.0 && !p.masks) s->result = NOT_FINITE;
    else if (first < 2.0 * a.vocab) s->result = REFUSED - (int)first;
    else if (finite == 0.0) s->result = ALL_MASKED;
    if (s->result != UNDECIDED) s->phase = DONE;
}

KERNEL(sample_pass, SampleArgs, 256) {
    __shared__ Work w;
    const int each = (a.vocab + gridDim.x - 1) / gridDim.x, low = blockIdx.x * each;
    pass(a, w, low, min(low + each, a.vocab));
}

// One block: whatever passes are still missing; then id and logprob go into the ring that the host reads, and token
// and length are set for the next replay.
KERNEL(sample_finish, SampleArgs, 256) {
    __shared__ Work w;
    for (int n = 0; n < MOST_PASSES && a.state->phase != DONE; ++n) {
        __syncthreads();
        pass(a, w, 0, a.vocab);
        __threadfence();
        __syncthreads();
    }
    if (threadIdx.x) return;
    const Sampler& state = *a.state;
    Sequence& s = *a.sequence;
    const int result = state.result, id = result < 0 ? 0 : result;  // after a refused row, keep the next replay's lookup in range
    a.ids[s.step % a.ring] = result;
    a.logprobs[s.step % a.ring] = (double)a.logits[id] - state.raw_top - log(state.raw_sum);
    a.seen[id] = 1;
    s.token = id;
    s.step += 1;
    s.length += 1;
    *a.position = s.offset + s.length;
}
