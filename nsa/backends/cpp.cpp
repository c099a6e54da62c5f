// Forward attention of NSA's branches on a CPU, one token of one KV head at a time, its G query heads together.
//
// A token's heads share the keys they attend, so a panel of keys is a G x 64 product in registers, an online
// softmax in base 2 and a G x DV product. Nothing is masked but the ends of a range and nothing is gathered; a row
// depends on its own keys alone, not on its neighbours, the batch or the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

// Lanes of a register, and registers of keys (or channels) that fit beside TALL rows of accumulators.
#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, WIDE = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4, WIDE = 4;
#else
constexpr int LANES = 4, WIDE = 2;
#endif
constexpr int TALL = 4, PANEL = 64;
constexpr int TOKENS = 16;  // of one work item: a panel stays in the cache, and threads still share the work
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
constexpr float SLACK = 8.0f;
constexpr float LN_2 = 0.6931471805599453f;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

// Compilers fold a load into each product that uses it; loads are what these loops have none to spare of.
#if defined(__x86_64__)
inline void keep_in_register(Vec& x) { asm("" : "+v"(x)); }
#elif defined(__aarch64__)
inline void keep_in_register(Vec& x) { asm("" : "+w"(x)); }
#else
inline void keep_in_register(Vec&) {}
#endif

inline Vec load(const float* from) {
    Vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

inline Vec all(float x) { return x - Vec{}; }

inline Ints lane_numbers() {
    Ints lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    return lane;
}

// All lanes into one, by halves: the order of a sum is fixed.
template <typename Join>
inline float reduce(Vec x, Join join) {
    for (int width = LANES / 2; width; width /= 2) x = join(x, __builtin_shuffle(x, lane_numbers() + width));
    return x[0];
}

inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }
inline float largest(Vec x) { return reduce(x, larger); }
inline float sum(Vec x) {
    return reduce(x, [](Vec a, Vec b) { return a + b; });
}

inline bool any(Ints lanes) {
    uint64_t found = 0, words[sizeof lanes / 8];
    std::memcpy(words, &lanes, sizeof words);
    for (uint64_t word : words) found |= word;
    return found != 0;
}

// 2^x for x up to SLACK to 2e-7, relative; 0 from -127 down; NaN stays NaN. A polynomial over [-1/2, 1/2].
inline Vec exp2_of(Vec x) {
    x = x < -127.0f ? all(-127.0f) : x;
    const Vec whole = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    const Vec f = x - whole;
    Vec p = all(1.546973197e-4f);
    p = p * f + 1.340043217e-3f;
    p = p * f + 9.618025603e-3f;
    p = p * f + 5.550327214e-2f;
    p = p * f + 2.402265121e-1f;
    p = p * f + 6.931472067e-1f;
    p = p * f + 1.0f;
    const Ints exponent = (__builtin_convertvector(whole, Ints) + 127) << 23;
    Vec power;
    std::memcpy(&power, &exponent, sizeof power);
    return p * power;
}

// s[r][.] = q[r] . keys, R rows, N registers of keys of a transposed panel.
template <int R, int N>
void products(const float* q, const float* panel, int64_t dim, float* s) {
    Vec acc[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) acc[r][n] = Vec{};
    int64_t d = 0;
    do {
        Vec keys[N];
        for (int n = 0; n < N; ++n) {
            keys[n] = load(panel + d * PANEL + n * LANES);
            keep_in_register(keys[n]);
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) acc[r][n] += keys[n] * q[r * dim + d];
    } while (++d < dim);
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(s + r * PANEL + n * LANES, acc[r][n]);
}

// o[r][.] = o[r][.] * keep[r] + p[r] . values, R rows, N registers of channels; values lie `step` apart.
template <int R, int N>
void weigh(const float* p, const float* keep, const float* v, int64_t step, int first, int last, float* o,
           int64_t width) {
    Vec acc[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) acc[r][n] = Vec{};
    int j = first;
    do {
        Vec value[N];
        for (int n = 0; n < N; ++n) {
            value[n] = load(v + j * step + n * LANES);
            keep_in_register(value[n]);
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) acc[r][n] += value[n] * p[r * PANEL + j];
    } while (++j < last);
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
            float* to = o + r * width + n * LANES;
            store(to, load(to) * keep[r] + acc[r][n]);
        }
}

using Products = void (*)(const float*, const float*, int64_t, float*);
using Weigh = void (*)(const float*, const float*, const float*, int64_t, int, int, float*, int64_t);

#define ROWS(f, n) {f<1, n>, f<2, n>, f<3, n>, f<4, n>}
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILES(f) {ROWS(f, 1), ROWS(f, 2), ROWS(f, 3), ROWS(f, 4)}
#else
#define TILES(f) {ROWS(f, 1), ROWS(f, 2)}
#endif
constexpr Products PRODUCTS[WIDE][TALL] = TILES(products);
constexpr Weigh WEIGH[WIDE][TALL] = TILES(weigh);

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

extern "C" {

// Filled in by Python, field for field. Strides in elements, over batch, token and head; channels are adjacent.
struct Call {
    const float *q, *k, *v;
    float *o, *lse;          // (B,T,HQ,DV), (B,T,HQ), contiguous
    float *panels, *values;  // scratch: (B*H, panels, D, 64), (B*H, panels, 64, DV rounded up to registers) or null
    const int32_t* blocks;   // (B,T,H,slots), contiguous
    int32_t* chosen;         // (B,T,H,slots), contiguous
    const int64_t* starts;   // position of the first query, by batch
    int64_t q_stride[3], k_stride[3], v_stride[3];
    int64_t batch, rows, kv_heads, group, keys, dim, value_dim;
    int64_t slots, window, block, compression_block, stride;
    int64_t initial, local, kv_len;
    float scale;
    int32_t threads;
};

int64_t nsa_lanes() { return LANES; }
}

namespace {

int64_t panels_of(const Call& c) { return (c.keys + PANEL - 1) / PANEL; }

// Which panels of each sequence and KV head some query attends: (B*H, panels).
struct Wanted {
    const int64_t count;
    std::vector<uint8_t> flags;

    explicit Wanted(const Call& c, bool every = true)
        : count(panels_of(c)), flags(c.batch * c.kv_heads * count, every) {}

    void add(int64_t head, int64_t first, int64_t last) {
        for (int64_t p = first / PANEL; p * PANEL < last && p < count; ++p) flags[head * count + p] = 1;
    }
};

// K by panels, transposed, and V by heads, both padded with zeros: what the products read in one stream.
void pack(const Call& c, const Wanted& wanted) {
    const int64_t count = wanted.count, width = round_up(c.value_dim, LANES);
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t item = 0; item < c.batch * c.kv_heads * count; ++item) {
        if (!wanted.flags[item]) continue;
        const int64_t head = item / count, first = item % count * PANEL;
        const int64_t b = head / c.kv_heads, h = head % c.kv_heads;
        const int64_t some = std::min<int64_t>(PANEL, c.keys - first);
        float* panel = c.panels + item * c.dim * PANEL;
        const float* k = c.k + b * c.k_stride[0] + first * c.k_stride[1] + h * c.k_stride[2];
        for (int64_t d = 0; d < c.dim; ++d) {
            for (int64_t j = 0; j < some; ++j) panel[d * PANEL + j] = k[j * c.k_stride[1] + d];
            for (int64_t j = some; j < PANEL; ++j) panel[d * PANEL + j] = 0.0f;
        }
        if (!c.values) continue;
        const float* v = c.v + b * c.v_stride[0] + first * c.v_stride[1] + h * c.v_stride[2];
        float* values = c.values + item * PANEL * width;
        for (int64_t j = 0; j < PANEL; ++j, values += width) {
            const int64_t filled = j < some ? c.value_dim : 0;
            std::copy_n(v + j * c.v_stride[1], filled, values);
            std::fill(values + filled, values + width, 0.0f);
        }
    }
}

// The queries of one token and KV head, in base 2.
void load_queries(const Call& c, int64_t b, int64_t t, int64_t h, float* q) {
    const float* from = c.q + b * c.q_stride[0] + t * c.q_stride[1] + h * c.group * c.q_stride[2];
    for (int64_t r = 0; r < c.group; ++r)
        for (int64_t d = 0; d < c.dim; ++d) q[r * c.dim + d] = from[r * c.q_stride[2] + d] * (c.scale / LN_2);
}

// Logits of all rows against the registers [low, high) of a panel.
void logits(const Call& c, const float* q, const float* panel, int low, int high, float* s) {
    for (int64_t r = 0; r < c.group; r += TALL) {
        const int tall = static_cast<int>(std::min<int64_t>(TALL, c.group - r));
        for (int n = low; n < high; n += WIDE) {
            const int wide = std::min(WIDE, high - n);
            PRODUCTS[wide - 1][tall - 1](q + r * c.dim, panel + n * LANES, c.dim, s + r * PANEL + n * LANES);
        }
    }
}

// Lanes of register n outside the columns [first, last) become -inf.
void hide_ends(float* s, int64_t rows, int n, int first, int last) {
    const Ints column = lane_numbers() + n * LANES;
    const Ints hidden = (column < first) | (column >= last);
    for (int64_t r = 0; r < rows; ++r, s += PANEL) store(s + n * LANES, hidden ? all(NEG_INF) : load(s + n * LANES));
}

// One token's rows while it attends: maximum, sum and output of what has been seen.
struct Rows {
    const Call& c;
    const int64_t width;
    std::vector<float> q, s, o, top, total, keep;
    const float *panels = nullptr, *values = nullptr;
    int64_t step = 0;

    explicit Rows(const Call& call)
        : c(call), width(round_up(call.value_dim, LANES)), q(c.group * c.dim), s(c.group * PANEL),
          o(c.group * width), top(c.group), total(c.group * LANES), keep(c.group) {}

    void begin(int64_t b, int64_t t, int64_t h) {
        load_queries(c, b, t, h, q.data());
        std::fill(o.begin(), o.end(), 0.0f);
        std::fill(total.begin(), total.end(), 0.0f);
        std::fill(top.begin(), top.end(), NEG_INF);
        const int64_t first = (b * c.kv_heads + h) * panels_of(c);
        panels = c.panels + first * c.dim * PANEL;
        values = c.values ? c.values + first * PANEL * width : c.v + b * c.v_stride[0] + h * c.v_stride[2];
        step = c.values ? width : c.v_stride[1];
    }

    // Attend the keys [first, last).
    void attend(int64_t first, int64_t last) {
        if (first >= last) return;
        for (int64_t p = first / PANEL; p * PANEL < last; ++p)
            attend_panel(p, static_cast<int>(std::max<int64_t>(0, first - p * PANEL)),
                         static_cast<int>(std::min<int64_t>(PANEL, last - p * PANEL)));
    }

    void attend_panel(int64_t p, int first, int last) {
        const int low = first / LANES, high = (last + LANES - 1) / LANES;
        logits(c, q.data(), panels + p * c.dim * PANEL, low, high, s.data());
        if (first % LANES) hide_ends(s.data(), c.group, low, first, last);
        if (last % LANES) hide_ends(s.data(), c.group, high - 1, first, last);
        for (int64_t r = 0; r < c.group; ++r) soften(r, low, high);
        const float* v = values + p * PANEL * step;
        const int registers = static_cast<int>(width / LANES);
        for (int64_t r = 0; r < c.group; r += TALL) {
            const int tall = static_cast<int>(std::min<int64_t>(TALL, c.group - r));
            for (int n = 0; n < registers; n += WIDE)
                WEIGH[std::min(WIDE, registers - n) - 1][tall - 1](
                    s.data() + r * PANEL, keep.data() + r, v + n * LANES, step, first, last,
                    o.data() + r * width + n * LANES, width);
        }
    }

    // Logits to weights relative to the row's shift, which follows its maximum: only when a weight would pass
    // 2^SLACK does the shift move, and what was summed before shrinks by a factor.
    void soften(int64_t r, int low, int high) {
        float* row = s.data() + r * PANEL;
        Vec best = load(row + low * LANES);
        for (int n = low + 1; n < high; ++n) best = larger(load(row + n * LANES), best);
        keep[r] = 1.0f;
        if (any(best > top[r] + SLACK)) {
            const float highest = largest(best);
            keep[r] = std::exp2(top[r] - highest);
            top[r] = highest;
        }
        Vec part = {};
        for (int n = low; n < high; ++n) {
            const Vec p = exp2_of(load(row + n * LANES) - top[r]);
            store(row + n * LANES, p);
            part += p;
        }
        store(total.data() + r * LANES, load(total.data() + r * LANES) * keep[r] + part);
    }

    // A row that saw no key is 0, its lse -inf.
    void end(int64_t b, int64_t t, int64_t h) {
        const int64_t first = ((b * c.rows + t) * c.kv_heads + h) * c.group;
        for (int64_t r = 0; r < c.group; ++r) {
            const float all_weights = sum(load(total.data() + r * LANES));
            const bool empty = all_weights == 0.0f;
            const float part = empty ? 0.0f : 1.0f / all_weights;
            for (int64_t d = 0; d < c.value_dim; ++d) c.o[(first + r) * c.value_dim + d] = o[r * width + d] * part;
            c.lse[first + r] = empty ? NEG_INF : top[r] * LN_2 + std::log(all_weights);
        }
    }
};

// Every token of every KV head, in items of TOKENS, the last and longest first.
template <typename State, typename Each>
void for_tokens(const Call& c, Each each) {
    const int64_t spans = (c.rows + TOKENS - 1) / TOKENS, heads = c.batch * c.kv_heads;
#pragma omp parallel num_threads(c.threads)
    {
        State state(c);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < spans * heads; ++item) {
            const int64_t span = spans - 1 - item / heads, b = item % heads / c.kv_heads, h = item % c.kv_heads;
            for (int64_t t = span * TOKENS; t < std::min(c.rows, (span + 1) * TOKENS); ++t)
                each(state, b, t, h, c.starts[b] + t);
        }
    }
}

int64_t visible_blocks(const Call& c, int64_t position) {
    const int64_t past = position - c.compression_block + 1;
    return past < 0 ? 0 : std::min(past / c.stride + 1, c.keys);
}

template <typename Ranges>
void attend_ranges(const Call& c, const Wanted& wanted, Ranges ranges) {
    pack(c, wanted);
    for_tokens<Rows>(c, [&](Rows& rows, int64_t b, int64_t t, int64_t h, int64_t position) {
        rows.begin(b, t, h);
        ranges(rows, b, t, h, position);
        rows.end(b, t, h);
    });
}

// Scores and top-n of one token: weights of the compressed blocks, summed over the heads; then eq. 9; then ranks.
struct Ranking {
    const Call& c;
    std::vector<float> q, s, weights, p;
    std::vector<uint64_t> ranks;
    std::vector<int64_t> lags, counts;

    explicit Ranking(const Call& call)
        : c(call), q(c.group * c.dim), s(c.group * PANEL), weights(c.group * panels_of(c) * PANEL),
          p(panels_of(c) * PANEL + 1) {
        const int64_t per_block = c.block / c.stride, per_compressed = c.compression_block / c.stride;
        for (int64_t m = 1 - per_compressed; m < per_block; ++m) {
            lags.push_back(m);
            counts.push_back(std::min({m + per_compressed, per_block - m, per_block, per_compressed}));
        }
    }

    void choose(int64_t b, int64_t t, int64_t h, int64_t position) {
        int32_t* to = c.chosen + ((b * c.rows + t) * c.kv_heads + h) * c.slots;
        const int64_t existing = std::min(position / c.block, (c.kv_len - 1) / c.block) + 1;
        int64_t taken = std::min(existing, c.slots);
        if (existing <= c.slots) {
            for (int64_t j = 0; j < existing; ++j) to[j] = static_cast<int32_t>(j);
        } else {
            weigh_compressed(b, t, h, visible_blocks(c, position));
            rank(existing, position / c.block);
            std::nth_element(ranks.begin(), ranks.begin() + (taken - 1), ranks.end(), std::greater<uint64_t>());
            for (int64_t j = 0; j < taken; ++j) to[j] = static_cast<int32_t>(~static_cast<uint32_t>(ranks[j]));
            std::sort(to, to + taken);
        }
        std::fill(to + taken, to + c.slots, -1);
    }

    void weigh_compressed(int64_t b, int64_t t, int64_t h, int64_t visible) {
        load_queries(c, b, t, h, q.data());
        const int64_t some = (visible + PANEL - 1) / PANEL, width = panels_of(c) * PANEL;
        const float* panels = c.panels + (b * c.kv_heads + h) * panels_of(c) * c.dim * PANEL;
        for (int64_t i = 0; i < some; ++i) {
            const int last = static_cast<int>(std::min<int64_t>(PANEL, visible - i * PANEL));
            const int high = (last + LANES - 1) / LANES;
            logits(c, q.data(), panels + i * c.dim * PANEL, 0, high, s.data());
            hide_ends(s.data(), c.group, high - 1, 0, last);
            for (int64_t r = 0; r < c.group; ++r)
                std::copy_n(s.data() + r * PANEL, high * LANES, weights.data() + r * width + i * PANEL);
        }
        const int64_t registers = (visible + LANES - 1) / LANES;
        std::fill(p.begin(), p.end(), 0.0f);
        for (int64_t r = 0; r < c.group && visible; ++r) add_softmax(weights.data() + r * width, registers);
    }

    void add_softmax(float* row, int64_t registers) {
        Vec best = load(row);
        for (int64_t n = 1; n < registers; ++n) {
            const Vec x = load(row + n * LANES);
            best = x > best ? x : best;
        }
        const float highest = largest(best);
        Vec part = {};
        for (int64_t n = 0; n < registers; ++n) {
            const Vec weight = exp2_of(load(row + n * LANES) - highest);
            store(row + n * LANES, weight);
            part += weight;
        }
        const float share = 1.0f / sum(part);
        for (int64_t n = 0; n < registers; ++n)
            store(p.data() + n * LANES, load(p.data() + n * LANES) + load(row + n * LANES) * share);
    }

    // Sortable ranks: the bits of a score, which is not negative, above the complement of the block's number.
    void rank(int64_t existing, int64_t own) {
        ranks.resize(existing);
        for (int64_t j = 0; j < existing; ++j) {
            float score = 0.0f;
            for (size_t m = 0; m < lags.size(); ++m) {
                const int64_t i = j * (c.block / c.stride) + lags[m];
                if (i >= 0 && i < c.keys) score += static_cast<float>(counts[m]) * p[i];
            }
            if (j < c.initial || j > own - c.local) score = std::numeric_limits<float>::infinity();
            uint32_t bits;
            std::memcpy(&bits, &score, sizeof bits);
            ranks[j] = static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(j));
        }
    }
};

}  // namespace

extern "C" {

void nsa_compressed(const Call* c) {
    attend_ranges(*c, Wanted(*c), [c](Rows& rows, int64_t, int64_t, int64_t, int64_t position) {
        rows.attend(0, visible_blocks(*c, position));
    });
}

void nsa_sliding(const Call* c) {
    Wanted wanted(*c, false);
    for (int64_t head = 0; head < c->batch * c->kv_heads; ++head) {
        const int64_t start = c->starts[head / c->kv_heads];
        wanted.add(head, std::max<int64_t>(0, start - c->window + 1), std::min(start + c->rows, c->keys));
    }
    attend_ranges(*c, wanted, [c](Rows& rows, int64_t, int64_t, int64_t, int64_t position) {
        rows.attend(std::max<int64_t>(0, position - c->window + 1), std::min(position + 1, c->keys));
    });
}

void nsa_selected(const Call* c) {
    // Many queries want nearly every panel; a few want theirs, out of a cache that may be long.
    const bool every = c->rows * c->slots * c->block >= c->keys;
    Wanted wanted(*c, every);
    for (int64_t i = 0; !every && i < c->batch * c->rows * c->kv_heads * c->slots; ++i) {
        const int64_t token_head = i / c->slots, key = c->blocks[i] * c->block;
        const int64_t head = token_head / (c->rows * c->kv_heads) * c->kv_heads + token_head % c->kv_heads;
        if (key >= 0) wanted.add(head, key, std::min(key + c->block, c->keys));
    }
    attend_ranges(*c, wanted, [c](Rows& rows, int64_t b, int64_t t, int64_t h, int64_t position) {
        const int32_t* from = c->blocks + ((b * c->rows + t) * c->kv_heads + h) * c->slots;
        thread_local std::vector<int32_t> list;
        list.assign(from, from + c->slots);
        std::sort(list.begin(), list.end());
        const int64_t end = std::min(position + 1, c->keys);
        int64_t first = 0, last = 0;  // a run of adjacent blocks
        for (const int32_t block : list) {
            const int64_t key = block * c->block;
            if (block < 0 || key < last) continue;
            if (key > last) {
                rows.attend(first, std::min(last, end));
                first = key;
            }
            last = key + c->block;
        }
        rows.attend(first, std::min(last, end));
    });
}

void nsa_select(const Call* c) {
    pack(*c, Wanted(*c));
    for_tokens<Ranking>(*c, [](Ranking& ranking, int64_t b, int64_t t, int64_t h, int64_t position) {
        ranking.choose(b, t, h, position);
    });
}
}
