// What a text tower does between its matrix products, in bfloat16: each function goes over memory once.
//
// Values are read as bfloat16, computed in float32 and rounded back (to nearest, ties to even). Rows lie one after the
// other; `threads` share them in fixed parts, so that equal input on equally many threads gives equal output, bit for
// bit. Gradients of biases and scales are added up per thread in `partial` [threads, ...], zero at first, for the
// caller to sum.
//
// Dropout keeps no mask: whether a value is kept is a hash of its index and the seed, asked again going backward.
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#define SIMD _Pragma("omp simd")
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

INLINE float as_float(uint32_t bits) {
    union { uint32_t bits; float value; } u = {.bits = bits};
    return u.value;
}

INLINE uint32_t as_bits(float value) {
    union { float value; uint32_t bits; } u = {.value = value};
    return u.bits;
}

INLINE float widen(bf16 x) { return as_float((uint32_t)x << 16); }

INLINE bf16 narrow(float x) {
    uint32_t bits = as_bits(x);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Which values dropout keeps: those whose hash reaches `least`, divided by the share that is kept.
typedef struct {
    uint32_t start, stride, least;
    float scale;
} Dropout;

INLINE Dropout dropout(uint64_t seed, double p) {
    Dropout d = {(uint32_t)seed, (uint32_t)(seed >> 32) | 1, (uint32_t)(p * 4294967296.0), (float)(1 / (1 - p))};
    return d;
}

INLINE float factor(const Dropout d, uint32_t index) {
    uint32_t x = d.start + index * d.stride;
    x = (x ^ (x >> 16)) * 0x7feb352dU;  // "lowbias32" of C. Wellons' Prospecting for Hash Functions
    x = (x ^ (x >> 15)) * 0x846ca68bU;
    return (x ^ (x >> 16)) >= d.least ? d.scale : 0.0f;
}

// exp with a relative error of some 1e-7, for x that is not above 88 (Cody and Waite's reduction, a Taylor polynomial).
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.0f + r * (1.0f + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    return y * as_float((uint32_t)((int32_t)n + 127) << 23);
}

// The normal distribution: Φ(x) to 1e-7 (Abramowitz and Stegun, 7.1.26) and e^(−x²/2), for GELU x Φ(x).
INLINE float normal(float x, float *bell) {
    float a = fabsf(x);
    float t = 1.0f / (1.0f + 0.23164190f * a);
    float e = exponential(-0.5f * x * x);
    float poly = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    float tail = 0.5f * poly * e;
    *bell = e;
    return x < 0 ? tail : 1.0f - tail;
}

// out = gelu(x + bias), slope = gelu'(x + bias), all [rows, width], bias [width]; out may be x.
void gelu(long threads, long rows, long width, const bf16 *x, const float *bias, bf16 *out, bf16 *slope) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const bf16 *xs = x + r * width;
        bf16 *outs = out + r * width, *slopes = slope + r * width;
        SIMD for (long c = 0; c < width; c++) {
            float bell, v = widen(xs[c]) + bias[c];
            float share = normal(v, &bell);
            outs[c] = narrow(v * share);
            slopes[c] = narrow(share + v * 0.39894228f * bell);
        }
    }
}

// to_x = to_out · slope; partial [threads, width] the bias's.
void gelu_backward(long threads, long rows, long width, const bf16 *to_out, const bf16 *slope, bf16 *to_x,
                   float *partial) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++) {
        float *to_bias = partial + omp_get_thread_num() * width;
        const bf16 *gs = to_out + r * width, *slopes = slope + r * width;
        bf16 *to = to_x + r * width;
        SIMD for (long c = 0; c < width; c++) {
            float g = widen(gs[c]) * widen(slopes[c]);
            to[c] = narrow(g);
            to_bias[c] += g;
        }
    }
}

// out = dropout(x), both [count]; going backward the same, from to_out to to_x.
void drop_values(long threads, long count, const bf16 *x, uint64_t seed, double p, bf16 *out) {
    const Dropout d = dropout(seed, p);
    _Pragma("omp parallel for simd schedule(static) num_threads(threads)") for (long i = 0; i < count; i++)
        out[i] = narrow(widen(x[i]) * factor(d, (uint32_t)i));
}

// The mean of a row, and one by its standard deviation (returned).
INLINE float moments(const bf16 *row, long width, float eps, float *mean) {
    float total = 0, squares = 0;
    _Pragma("omp simd reduction(+ : total)") for (long c = 0; c < width; c++) total += widen(row[c]);
    float middle = *mean = total / width;
    _Pragma("omp simd reduction(+ : squares)") for (long c = 0; c < width; c++) {
        float v = widen(row[c]) - middle;
        squares += v * v;
    }
    return 1.0f / sqrtf(squares / width + eps);
}

// sum = x + dropout(y + bias); out = LayerNorm(sum) · gamma + beta.
void add_norm(long threads, long rows, long width, const bf16 *x, const bf16 *y, const float *bias, const float *gamma,
              const float *beta, double eps, uint64_t seed, double p, bf16 *sum, bf16 *out) {
    const Dropout d = dropout(seed, p);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const bf16 *xs = x + r * width, *ys = y + r * width;
        bf16 *sums = sum + r * width, *outs = out + r * width;
        if (p > 0) {
            SIMD for (long c = 0; c < width; c++)
                sums[c] = narrow(widen(xs[c]) + (widen(ys[c]) + bias[c]) * factor(d, (uint32_t)(r * width + c)));
        } else {
            SIMD for (long c = 0; c < width; c++) sums[c] = narrow(widen(xs[c]) + widen(ys[c]) + bias[c]);
        }
        float mean, rate = moments(sums, width, (float)eps, &mean);
        SIMD for (long c = 0; c < width; c++)
            outs[c] = narrow((widen(sums[c]) - mean) * rate * gamma[c] + beta[c]);
    }
}

// to_x and to_y from to_out and add_norm's sum; partial [threads, 3, width]: gamma's, beta's and the bias's.
void add_norm_backward(long threads, long rows, long width, const bf16 *to_out, const bf16 *sum, const float *gamma,
                       double eps, uint64_t seed, double p, bf16 *to_x, bf16 *to_y, float *partial) {
    const Dropout d = dropout(seed, p);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++) {
        float *to_gamma = partial + omp_get_thread_num() * 3 * width;
        float *to_beta = to_gamma + width, *to_bias = to_beta + width;
        const bf16 *gs = to_out + r * width, *sums = sum + r * width;
        float along_one = 0, along_norm = 0;
        float mean, rate = moments(sums, width, (float)eps, &mean);
        _Pragma("omp simd reduction(+ : along_one, along_norm)") for (long c = 0; c < width; c++) {
            float g = widen(gs[c]), normed = (widen(sums[c]) - mean) * rate;
            to_gamma[c] += g * normed;
            to_beta[c] += g;
            along_one += g * gamma[c];
            along_norm += g * gamma[c] * normed;
        }
        along_one /= width;
        along_norm /= width;
        bf16 *to_xs = to_x + r * width, *to_ys = to_y + r * width;
        if (p > 0) {
            SIMD for (long c = 0; c < width; c++) {
                float normed = (widen(sums[c]) - mean) * rate;
                float g = rate * (widen(gs[c]) * gamma[c] - along_one - normed * along_norm);
                float kept = g * factor(d, (uint32_t)(r * width + c));
                to_xs[c] = narrow(g);
                to_ys[c] = narrow(kept);
                to_bias[c] += kept;
            }
        } else {
            SIMD for (long c = 0; c < width; c++) {
                float normed = (widen(sums[c]) - mean) * rate;
                float g = rate * (widen(gs[c]) * gamma[c] - along_one - normed * along_norm);
                to_xs[c] = to_ys[c] = narrow(g);
                to_bias[c] += g;
            }
        }
    }
}

// One round of transposing a square of N vectors of N values: swaps the blocks of this size that lie off the diagonal.
// All rounds, of blocks from 1 to N / 2, transpose it.
#define SWAP_BLOCKS(N, vector, index, tile, block)                     \
    {                                                                  \
        index low, high;                                               \
        _Pragma("GCC unroll 32") for (int j = 0; j < N; j++) {         \
            low[j] = j & block ? N + j - block : j;                    \
            high[j] = j & block ? N + j : j + block;                   \
        }                                                              \
        _Pragma("GCC unroll 32") for (int i = 0; i < N; i++)           \
            if (!(i & block)) {                                        \
                vector upper = tile[i], lower = tile[i + block];       \
                tile[i] = __builtin_shuffle(upper, lower, low);        \
                tile[i + block] = __builtin_shuffle(upper, lower, high); \
            }                                                          \
    }

// out [width, rows] = x [rows, width] transposed.
void transpose(long threads, long rows, long width, const bf16 *x, bf16 *out) {
    enum { SIDE = 32 };
    typedef bf16 vector __attribute__((vector_size(SIDE * sizeof(bf16))));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r += SIDE)
        for (long c = 0; c < width; c += SIDE) {
            const long high = rows - r < SIDE ? rows - r : SIDE, wide = width - c < SIDE ? width - c : SIDE;
            const bf16 *from = x + r * width + c;
            bf16 *to = out + c * rows + r;
            vector tile[SIDE];
            if (high == SIDE && wide == SIDE) {  // copies of a constant size are single instructions
                for (long i = 0; i < SIDE; i++) memcpy(&tile[i], from + i * width, sizeof(vector));
                SWAP_BLOCKS(SIDE, vector, vector, tile, 1)
                SWAP_BLOCKS(SIDE, vector, vector, tile, 2)
                SWAP_BLOCKS(SIDE, vector, vector, tile, 4)
                SWAP_BLOCKS(SIDE, vector, vector, tile, 8)
                SWAP_BLOCKS(SIDE, vector, vector, tile, 16)
                for (long j = 0; j < SIDE; j++) memcpy(to + j * rows, &tile[j], sizeof(vector));
            } else {
                for (long i = 0; i < high; i++)
                    for (long j = 0; j < wide; j++) to[j * rows + i] = from[i * width + j];
            }
        }
}

// Attention goes head by head, text by text, in float32. Rows come in fours and columns in lanes of 16, zeros beyond.
enum { ROWS = 4, LANES = 16 };
typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }

// out [rows, columns] = a [rows, inner] · b [inner, columns]; a's value at (i, k) is a[i · down + k · across].
INLINE void product(long rows, long inner, long columns, const float *a, long down, long across, const float *b,
                    float *out) {
    for (long i = 0; i < rows; i += ROWS)
        for (long j = 0; j < columns; j += LANES) {
            lanes sum0 = {0}, sum1 = {0}, sum2 = {0}, sum3 = {0};
            const float *at = a + i * down;
            for (long k = 0; k < inner; k++, at += across) {
                lanes row = *(const lanes *)(b + k * columns + j);
                sum0 += at[0] * row;
                sum1 += at[down] * row;
                sum2 += at[2 * down] * row;
                sum3 += at[3 * down] * row;
            }
            *(lanes *)(out + i * columns + j) = sum0;
            *(lanes *)(out + (i + 1) * columns + j) = sum1;
            *(lanes *)(out + (i + 2) * columns + j) = sum2;
            *(lanes *)(out + (i + 3) * columns + j) = sum3;
        }
}

// A head's vectors (and their bias, if any), times `scale`; rows of zeros up to `rows`.
INLINE void load(const bf16 *from, long stride, const float *bias, float scale, long length, long rows, long depth,
                 float *to) {
    for (long i = 0; i < length; i++)
        SIMD for (long c = 0; c < depth; c++)
            to[i * depth + c] = (widen(from[i * stride + c]) + (bias ? bias[c] : 0)) * scale;
    for (long i = length * depth; i < rows * depth; i++) to[i] = 0;
}

// to [depth, rows] = from [rows, depth] transposed, both multiples of LANES.
INLINE void turn(const float *from, long rows, long depth, float *to) {
    typedef int32_t index __attribute__((vector_size(LANES * sizeof(int32_t))));
    for (long i = 0; i < rows; i += LANES)
        for (long c = 0; c < depth; c += LANES) {
            lanes tile[LANES];
            _Pragma("GCC unroll 16") for (long k = 0; k < LANES; k++)
                tile[k] = *(const lanes *)(from + (i + k) * depth + c);
            SWAP_BLOCKS(LANES, lanes, index, tile, 1)
            SWAP_BLOCKS(LANES, lanes, index, tile, 2)
            SWAP_BLOCKS(LANES, lanes, index, tile, 4)
            SWAP_BLOCKS(LANES, lanes, index, tile, 8)
            _Pragma("GCC unroll 16") for (long k = 0; k < LANES; k++)
                *(lanes *)(to + (c + k) * rows + i) = tile[k];
        }
}

// What a thread works on, for one head of one text of at most P tokens (a multiple of LANES), float32: queries, keys
// and values, the gradient of the result, and what is being made [P, depth]; queries or that gradient transposed
// [depth, P]; the softmax's weights and the scores' gradient [P, P], keys down and queries across.
typedef struct {
    float *q, *k, *v, *to_mixed, *made, *turned, *weights, *to_scores;
} Space;

long attention_space(long longest, long depth) {
    long most = round_up(longest, LANES);
    return 6 * most * depth + 2 * most * most;
}

INLINE Space divide(float *at, long longest, long depth) {
    long most = round_up(longest, LANES), one = most * depth;
    Space s = {at, at + one, at + 2 * one, at + 3 * one, at + 4 * one, at + 5 * one, at + 6 * one,
               at + 6 * one + most * most};
    return s;
}

// Loads the head and computes softmax(q kᵀ / √depth), before dropout.
INLINE void weigh(const Space s, long length, long columns, long depth, const bf16 *qkv, long width,
                  const float *bias) {
    load(qkv, 3 * width, bias, 1 / sqrtf((float)depth), length, columns, depth, s.q);
    load(qkv + width, 3 * width, bias + width, 1, length, columns, depth, s.k);
    load(qkv + 2 * width, 3 * width, bias + 2 * width, 1, length, columns, depth, s.v);
    turn(s.q, columns, depth, s.turned);
    product(round_up(length, ROWS), depth, columns, s.k, depth, 1, s.turned, s.weights);
    for (long i = 0; i < columns; i += LANES) {
        float *w = s.weights + i, highest[LANES], total[LANES] = {0};
        SIMD for (long l = 0; l < LANES; l++) highest[l] = w[l];
        for (long j = 1; j < length; j++)
            SIMD for (long l = 0; l < LANES; l++)
                highest[l] = w[j * columns + l] > highest[l] ? w[j * columns + l] : highest[l];
        for (long j = 0; j < length; j++)
            SIMD for (long l = 0; l < LANES; l++) {
                w[j * columns + l] = exponential(w[j * columns + l] - highest[l]);
                total[l] += w[j * columns + l];
            }
        SIMD for (long l = 0; l < LANES; l++) total[l] = 1 / total[l];
        for (long j = 0; j < length; j++)
            SIMD for (long l = 0; l < LANES; l++) w[j * columns + l] *= total[l];
    }
}

INLINE void drop(float *values, long count, const Dropout d, uint32_t index) {
    SIMD for (long i = 0; i < count; i++) values[i] *= factor(d, index + (uint32_t)i);
}

// A head's vectors, times `scale`, to where they belong; their sum is added to `total`.
INLINE void store(const float *from, long length, long depth, float scale, long stride, bf16 *to, float *total) {
    for (long i = 0; i < length; i++)
        SIMD for (long c = 0; c < depth; c++) {
            float value = from[i * depth + c] * scale;
            to[i * stride + c] = narrow(value);
            total[c] += value;
        }
}

INLINE void forward_head(const Space s, long length, long columns, long depth, const bf16 *qkv, long width,
                         const float *bias, const Dropout d, uint32_t index, bf16 *out) {
    weigh(s, length, columns, depth, qkv, width, bias);
    if (d.least) drop(s.weights, length * columns, d, index);
    product(round_up(length, ROWS), length, depth, s.weights, 1, columns, s.v, s.made);
    for (long i = 0; i < length; i++)
        SIMD for (long c = 0; c < depth; c++) out[i * width + c] = narrow(s.made[i * depth + c]);
}

INLINE void backward_head(const Space s, long length, long columns, long depth, const bf16 *qkv, long width,
                          const float *bias, const Dropout d, uint32_t index, const bf16 *to_out, bf16 *to_qkv,
                          float *to_bias) {
    const long rows = round_up(length, ROWS);
    weigh(s, length, columns, depth, qkv, width, bias);
    load(to_out, width, 0, 1, length, columns, depth, s.to_mixed);
    turn(s.to_mixed, columns, depth, s.turned);
    product(rows, depth, columns, s.v, depth, 1, s.turned, s.to_scores);
    if (d.least) drop(s.to_scores, length * columns, d, index);
    for (long i = 0; i < columns; i += LANES) {
        const float *w = s.weights + i;
        float *to_w = s.to_scores + i, along[LANES] = {0};
        for (long j = 0; j < length; j++)
            SIMD for (long l = 0; l < LANES; l++) along[l] += w[j * columns + l] * to_w[j * columns + l];
        for (long j = 0; j < length; j++)
            SIMD for (long l = 0; l < LANES; l++)
                to_w[j * columns + l] = w[j * columns + l] * (to_w[j * columns + l] - along[l]);
    }
    if (d.least) drop(s.weights, length * columns, d, index);
    product(rows, length, depth, s.to_scores, 1, columns, s.k, s.made);
    store(s.made, length, depth, 1 / sqrtf((float)depth), 3 * width, to_qkv, to_bias);
    product(rows, length, depth, s.to_scores, columns, 1, s.q, s.made);
    store(s.made, length, depth, 1, 3 * width, to_qkv + width, to_bias + width);
    product(rows, length, depth, s.weights, columns, 1, s.to_mixed, s.made);
    store(s.made, length, depth, 1, 3 * width, to_qkv + 2 * width, to_bias + 2 * width);
}

// Asks for memory that is about to be used: heads lie too far apart for the processor to guess.
INLINE void fetch(const bf16 *from, long count) {
    for (const char *at = (const char *)from; at < (const char *)(from + count); at += 64) __builtin_prefetch(at, 0, 2);
}

// Constants where they are the usual ones, so that the loops above become straight lines of vector instructions.
#define FOR_SHAPE(CALL)                                       \
    if (depth == 32 && columns == 16) { CALL(16, 32); }       \
    else if (depth == 32 && columns == 32) { CALL(32, 32); }  \
    else if (depth == 64 && columns == 16) { CALL(16, 64); }  \
    else if (depth == 64 && columns == 32) { CALL(32, 64); }  \
    else { CALL(columns, depth); }

// Self-attention of texts that lie one after the other, each to itself: softmax(q kᵀ / √depth) v per head, dropout on
// the weights. qkv [tokens, 3, heads, depth] lacks its bias [3, heads, depth]; out [tokens, heads, depth]; depth is a
// multiple of 16. Text i is lengths[i] tokens from first[i] on; space [threads, attention_space(longest, depth)].
void attention(long threads, long texts, const int64_t *first, const int64_t *lengths, long longest, long heads,
               long depth, const bf16 *qkv, const float *bias, uint64_t seed, double p, float *space, bf16 *out) {
    const Dropout d = dropout(seed, p);
    const long width = heads * depth, needs = attention_space(longest, depth);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < texts; t++) {
        const Space s = divide(space + omp_get_thread_num() * needs, longest, depth);
        const long length = lengths[t], columns = round_up(length, LANES);
        if (t + 1 < texts) fetch(qkv + first[t + 1] * 3 * width, lengths[t + 1] * 3 * width);
        for (long h = 0; h < heads; h++) {
            const bf16 *from = qkv + first[t] * 3 * width + h * depth;
            const float *its = bias + h * depth;
            bf16 *to = out + first[t] * width + h * depth;
            uint32_t index = (uint32_t)((first[t] * heads + h * length) * round_up(longest, LANES));
#define CALL(COLUMNS, DEPTH) forward_head(s, length, COLUMNS, DEPTH, from, width, its, d, index, to)
            FOR_SHAPE(CALL)
#undef CALL
        }
    }
}

// to_qkv from to_out; partial [threads, 3, heads, depth] the bias's.
void attention_backward(long threads, long texts, const int64_t *first, const int64_t *lengths, long longest,
                        long heads, long depth, const bf16 *to_out, const bf16 *qkv, const float *bias, uint64_t seed,
                        double p, float *space, bf16 *to_qkv, float *partial) {
    const Dropout d = dropout(seed, p);
    const long width = heads * depth, needs = attention_space(longest, depth);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < texts; t++) {
        const Space s = divide(space + omp_get_thread_num() * needs, longest, depth);
        const long length = lengths[t], columns = round_up(length, LANES);
        if (t + 1 < texts) {
            fetch(qkv + first[t + 1] * 3 * width, lengths[t + 1] * 3 * width);
            fetch(to_out + first[t + 1] * width, lengths[t + 1] * width);
            fetch(to_qkv + first[t + 1] * 3 * width, lengths[t + 1] * 3 * width);
        }
        for (long h = 0; h < heads; h++) {
            const bf16 *from = qkv + first[t] * 3 * width + h * depth, *g = to_out + first[t] * width + h * depth;
            const float *its = bias + h * depth;
            bf16 *to = to_qkv + first[t] * 3 * width + h * depth;
            float *sums = partial + omp_get_thread_num() * 3 * width + h * depth;
            uint32_t index = (uint32_t)((first[t] * heads + h * length) * round_up(longest, LANES));
#define CALL(COLUMNS, DEPTH) backward_head(s, length, COLUMNS, DEPTH, from, width, its, d, index, g, to, sums)
            FOR_SHAPE(CALL)
#undef CALL
        }
    }
}
