// What a text tower does between its matrix products, in bfloat16: each function goes over memory once.
//
// Values are read as bfloat16, computed in float32 and rounded back (to nearest, ties to even). Rows lie one after the
// other and `threads` share them. Gradients of biases and scales are added up per thread in `partial` [threads, ...],
// zero at first, for the caller to sum; the threads' shares are then fixed, so that equal input on equally many threads
// gives equal output, bit for bit.
//
// Dropout keeps no mask: whether a value is kept is a hash of its index and the seed, asked again going backward.
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

// What is computed in one instruction, at any address: widths are multiples of LANES. Sums go over ROWS at a time.
enum { LANES = 16, ROWS = 4, SIDE = 32 };
typedef float lanes __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t whole __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef bf16 halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

INLINE lanes all(float x) { return x - (lanes){0}; }

INLINE lanes read(const float *from) { return *(const lanes *)from; }

INLINE void write(lanes x, float *to) { *(lanes *)to = x; }

INLINE lanes widen(const bf16 *from) {
#ifdef __AVX512F__
    return (lanes)((words)_mm512_cvtepu16_epi32((__m256i) * (const halves *)from) << 16);
#else
    return (lanes)(__builtin_convertvector(*(const halves *)from, words) << 16);
#endif
}

INLINE float as_float(bf16 x) {
    union { uint32_t bits; float value; } u = {.bits = (uint32_t)x << 16};
    return u.value;
}

INLINE void narrow(lanes x, bf16 *to) {
#ifdef __AVX512BF16__
    *(halves *)to = (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    words bits = (words)x;
    *(halves *)to = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves);
#endif
}

// a where x is negative, elsewhere b.
INLINE lanes where_negative(lanes x, lanes a, lanes b) {
#ifdef __AVX512DQ__
    return (lanes)_mm512_mask_mov_ps((__m512)b, _mm512_movepi32_mask((__m512i)x), (__m512)a);
#else
    whole negative = (whole)x >> 31;
    return (lanes)((negative & (whole)a) | (~negative & (whole)b));
#endif
}

// The lesser and the greater of two; b, where either is not a number.
INLINE lanes lesser(lanes a, lanes b) {
#ifdef __AVX512F__
    return (lanes)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return where_negative((lanes)(a < b), a, b);
#endif
}

INLINE lanes greater(lanes a, lanes b) {
#ifdef __AVX512F__
    return (lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return where_negative((lanes)(a > b), a, b);
#endif
}

// 1 / x, with a relative error of at most 2⁻¹⁴.
INLINE lanes inverse(lanes x) {
#ifdef __AVX512F__
    return (lanes)_mm512_rcp14_ps((__m512)x);
#else
    return 1.0f / x;
#endif
}

INLINE float sum_of(lanes x) {
    float total = 0;
    for (int l = 0; l < LANES; l++) total += x[l];
    return total;
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

// The factors of the values from `index` on.
INLINE lanes factors(const Dropout d, uint32_t index) {
    static const words step = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    words x = d.start + (step + index) * d.stride;
    x = (x ^ (x >> 16)) * 0x7feb352dU;  // "lowbias32" of C. Wellons' Prospecting for Hash Functions
    x = (x ^ (x >> 15)) * 0x846ca68bU;  // and its last round, which the highest bits can do without
    #ifdef __AVX512F__
    return (lanes)_mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask((__m512i)x, _mm512_set1_epi32(d.least)), (__m512)all(d.scale));
#else
    return (lanes)((words)(x >= d.least) & (words)all(d.scale));
#endif
}

// 2^x with a relative error of some 1e-6, for x that is below 128 (a Taylor polynomial for what is left of x).
INLINE lanes power_of_2(lanes x) {
#ifdef __AVX512F__
    lanes n = (lanes)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = greater(all(-126.0f), x);
    lanes n;
    for (int l = 0; l < LANES; l++) n[l] = rintf(x[l]);
#endif
    lanes r = x - n;
    lanes y = 1.0f + r * (0.693147181f + r * (0.240226507f + r * (0.0555041087f + r * (0.00961812911f + r * 0.00133335581f))));
#ifdef __AVX512F__
    return (lanes)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    return y * (lanes)((__builtin_convertvector(n, whole) + 127) << 23);
#endif
}

INLINE lanes exponential(lanes x) { return power_of_2(x * 1.44269504f); }

// The normal distribution: Φ(x), whose tails have a relative error of some 1e-4 (Abramowitz and Stegun, 7.1.26), and
// its density φ(x): GELU is x Φ(x).
INLINE lanes normal(lanes x, lanes *density) {
    lanes a = lesser(all(100.0f), (lanes)((words)x & 0x7fffffffU));  // infinities too
    lanes t = inverse(1.0f + 0.231641888f * a);
    lanes bell = power_of_2(-0.72134752f * a * a + -1.32574806f);
    lanes tail = bell * t * (0.31938153f + t * (-0.356563781f + t * (1.78147794f + t * (-1.82125598f + t * 1.33027443f))));
    *density = bell;
    return where_negative(x, tail, 1.0f - tail);
}

// out = gelu(x + bias), slope = gelu'(x + bias), all [rows, width], bias [width]; out may be x.
void gelu(long threads, long rows, long width, const bf16 *x, const float *bias, bf16 *out, bf16 *slope) {
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < width; c += LANES) {
            const long at = r * width + c;
            lanes density, v = widen(x + at) + read(bias + c);
            lanes share = normal(v, &density);
            narrow(v * share, out + at);
            narrow(share + v * density, slope + at);
        }
}

// The part of gelu_backward that is `many` rows from `at` on: together, so that sums are fetched and stored once.
INLINE void gelu_rows(const long many, long at, long width, const bf16 *to_out, const bf16 *slope, bf16 *to_x,
                      float *to_bias) {
    for (long c = 0; c < width; c += LANES) {
        lanes total = read(to_bias + c);
        for (long i = 0; i < many; i++) {
            const long here = at + i * width + c;
            lanes g = widen(to_out + here) * widen(slope + here);
            narrow(g, to_x + here);
            total += g;
        }
        write(total, to_bias + c);
    }
}

// to_x = to_out · slope; partial [threads, width] the bias's.
void gelu_backward(long threads, long rows, long width, const bf16 *to_out, const bf16 *slope, bf16 *to_x,
                   float *partial) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r += ROWS) {
        float *to_bias = partial + omp_get_thread_num() * width;
        if (r + ROWS <= rows) gelu_rows(ROWS, r * width, width, to_out, slope, to_x, to_bias);
        else gelu_rows(rows - r, r * width, width, to_out, slope, to_x, to_bias);
    }
}

// out = dropout(x), both [count]; going backward the same, from to_out to to_x.
void drop_values(long threads, long count, const bf16 *x, uint64_t seed, double p, bf16 *out) {
    const Dropout d = dropout(seed, p);
#pragma omp parallel for schedule(dynamic, 1024) num_threads(threads)
    for (long i = 0; i < count; i += LANES) narrow(widen(x + i) * factors(d, (uint32_t)i), out + i);
}

// The mean of a row, and one by its standard deviation (returned).
INLINE float moments(const bf16 *row, long width, float eps, float *mean) {
    lanes total = {0}, squares = {0};
    for (long c = 0; c < width; c += LANES) total += widen(row + c);
    *mean = sum_of(total) / width;
    for (long c = 0; c < width; c += LANES) {
        lanes v = widen(row + c) - *mean;
        squares += v * v;
    }
    return 1.0f / sqrtf(sum_of(squares) / width + eps);
}

// sum = x + dropout(y + bias); out = LayerNorm(sum) · gamma + beta.
void add_norm(long threads, long rows, long width, const bf16 *x, const bf16 *y, const float *bias, const float *gamma,
              const float *beta, double eps, uint64_t seed, double p, bf16 *sum, bf16 *out) {
    const Dropout d = dropout(seed, p);
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const long row = r * width;
        for (long c = 0; c < width; c += LANES) {
            lanes v = widen(y + row + c) + read(bias + c);
            if (d.least) v *= factors(d, (uint32_t)(row + c));
            narrow(widen(x + row + c) + v, sum + row + c);
        }
        float mean, rate = moments(sum + row, width, (float)eps, &mean);
        for (long c = 0; c < width; c += LANES)
            narrow((widen(sum + row + c) - mean) * rate * read(gamma + c) + read(beta + c), out + row + c);
    }
}

// The part of add_norm_backward that is `many` rows from `at` on, at most ROWS; sums [3, width].
INLINE void norm_rows(const long many, long at, long width, const bf16 *to_out, const bf16 *sum, const float *gamma,
                      float eps, const Dropout d, bf16 *to_x, bf16 *to_y, float *sums) {
    float *to_gamma = sums, *to_beta = sums + width, *to_bias = sums + 2 * width;
    float mean[ROWS], rate[ROWS], along_one[ROWS], along_norm[ROWS];
    lanes one[ROWS] = {0}, norm[ROWS] = {0};
    for (long i = 0; i < many; i++) rate[i] = moments(sum + at + i * width, width, eps, &mean[i]);
    for (long c = 0; c < width; c += LANES) {
        lanes gammas = read(to_gamma + c), betas = read(to_beta + c);
        for (long i = 0; i < many; i++) {
            const long here = at + i * width + c;
            lanes g = widen(to_out + here), normed = (widen(sum + here) - mean[i]) * rate[i];
            gammas += g * normed;
            betas += g;
            g *= read(gamma + c);
            one[i] += g;
            norm[i] += g * normed;
        }
        write(gammas, to_gamma + c);
        write(betas, to_beta + c);
    }
    for (long i = 0; i < many; i++) {
        along_one[i] = sum_of(one[i]) / width;
        along_norm[i] = sum_of(norm[i]) / width;
    }
    for (long c = 0; c < width; c += LANES) {
        lanes biases = read(to_bias + c);
        for (long i = 0; i < many; i++) {
            const long here = at + i * width + c;
            lanes normed = (widen(sum + here) - mean[i]) * rate[i];
            lanes g = rate[i] * (widen(to_out + here) * read(gamma + c) - along_one[i] - normed * along_norm[i]);
            narrow(g, to_x + here);
            if (d.least) g *= factors(d, (uint32_t)here);
            narrow(g, to_y + here);
            biases += g;
        }
        write(biases, to_bias + c);
    }
}

// to_x and to_y from to_out and add_norm's sum; partial [threads, 3, width]: gamma's, beta's and the bias's.
void add_norm_backward(long threads, long rows, long width, const bf16 *to_out, const bf16 *sum, const float *gamma,
                       double eps, uint64_t seed, double p, bf16 *to_x, bf16 *to_y, float *partial) {
    const Dropout d = dropout(seed, p);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r += ROWS) {
        float *sums = partial + omp_get_thread_num() * 3 * width;
        if (r + ROWS <= rows) norm_rows(ROWS, r * width, width, to_out, sum, gamma, eps, d, to_x, to_y, sums);
        else norm_rows(rows - r, r * width, width, to_out, sum, gamma, eps, d, to_x, to_y, sums);
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

// One square of x [rows, width] to out [width, rows], transposed; `wide`: to float32.
INLINE void turn_square(long rows, long width, const bf16 *from, bf16 *to, float *wide) {
    typedef bf16 vector __attribute__((vector_size(SIDE * sizeof(bf16))));
    vector tile[SIDE];
    for (long i = 0; i < SIDE; i++) memcpy(&tile[i], from + i * width, sizeof(vector));  // of a constant size: one
    SWAP_BLOCKS(SIDE, vector, vector, tile, 1)                                           // instruction
    SWAP_BLOCKS(SIDE, vector, vector, tile, 2)
    SWAP_BLOCKS(SIDE, vector, vector, tile, 4)
    SWAP_BLOCKS(SIDE, vector, vector, tile, 8)
    SWAP_BLOCKS(SIDE, vector, vector, tile, 16)
    for (long j = 0; j < SIDE; j++) {
        if (wide) {
            bf16 row[SIDE];
            memcpy(row, &tile[j], sizeof(vector));
            for (long i = 0; i < SIDE; i += LANES) write(widen(row + i), wide + j * rows + i);
        } else {
            memcpy(to + j * rows, &tile[j], sizeof(vector));
        }
    }
}

INLINE void turn_all(long threads, long rows, long width, const bf16 *x, bf16 *out, float *wide) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (long r = 0; r < rows; r += SIDE)
        for (long c = 0; c < width; c += SIDE) {
            const long to = c * rows + r;
            if (r + SIDE <= rows && c + SIDE <= width) {
                turn_square(rows, width, x + r * width + c, out ? out + to : 0, wide ? wide + to : 0);
                continue;
            }
            for (long i = 0; r + i < rows && i < SIDE; i++)
                for (long j = 0; c + j < width && j < SIDE; j++) {
                    bf16 value = x[(r + i) * width + c + j];
                    if (wide) wide[to + j * rows + i] = as_float(value);
                    else out[to + j * rows + i] = value;
                }
        }
}

// out [width, rows] = x [rows, width] transposed.
void transpose(long threads, long rows, long width, const bf16 *x, bf16 *out) {
    turn_all(threads, rows, width, x, out, 0);
}

// The same in float32.
void transpose_wide(long threads, long rows, long width, const bf16 *x, float *out) {
    turn_all(threads, rows, width, x, 0, out);
}

// Attention goes head by head, text by text, in float32. Rows come in fours and columns in lanes of 16, zeros beyond.

INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }

// out [rows, columns] = a [rows, inner] · b [inner, columns]; a's value at (i, k) is a[i · down + k · across].
INLINE void product(long rows, long inner, long columns, const float *a, long down, long across, const float *b,
                    float *out) {
    for (long i = 0; i < rows; i += ROWS)
        for (long j = 0; j < columns; j += LANES) {
            lanes sum0 = {0}, sum1 = {0}, sum2 = {0}, sum3 = {0};
            const float *at = a + i * down;
            for (long k = 0; k < inner; k++, at += across) {
                lanes row = read(b + k * columns + j);
                sum0 += at[0] * row;
                sum1 += at[down] * row;
                sum2 += at[2 * down] * row;
                sum3 += at[3 * down] * row;
            }
            write(sum0, out + i * columns + j);
            write(sum1, out + (i + 1) * columns + j);
            write(sum2, out + (i + 2) * columns + j);
            write(sum3, out + (i + 3) * columns + j);
        }
}

// A head's vectors (and their bias, if any), times `scale`; rows of zeros up to `rows`.
INLINE void load(const bf16 *from, long stride, const float *bias, float scale, long length, long rows, long depth,
                 float *to) {
    for (long i = 0; i < length; i++)
        for (long c = 0; c < depth; c += LANES) {
            lanes x = widen(from + i * stride + c);
            if (bias) x += read(bias + c);
            write(x * scale, to + i * depth + c);
        }
    memset(to + length * depth, 0, (rows - length) * depth * sizeof(float));
}

// to [depth, rows] = from [rows, depth] transposed, both multiples of LANES.
INLINE void turn(const float *from, long rows, long depth, float *to) {
    for (long i = 0; i < rows; i += LANES)
        for (long c = 0; c < depth; c += LANES) {
            lanes tile[LANES];
            _Pragma("GCC unroll 16") for (long k = 0; k < LANES; k++)
                tile[k] = read(from + (i + k) * depth + c);
            SWAP_BLOCKS(LANES, lanes, whole, tile, 1)
            SWAP_BLOCKS(LANES, lanes, whole, tile, 2)
            SWAP_BLOCKS(LANES, lanes, whole, tile, 4)
            SWAP_BLOCKS(LANES, lanes, whole, tile, 8)
            _Pragma("GCC unroll 16") for (long k = 0; k < LANES; k++)
                write(tile[k], to + (c + k) * rows + i);
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
        float *w = s.weights + i;
        lanes highest = read(w), total = {0};
        for (long j = 1; j < length; j++) highest = greater(read(w + j * columns), highest);
        for (long j = 0; j < length; j++) {
            lanes x = exponential(read(w + j * columns) - highest);
            total += x;
            write(x, w + j * columns);
        }
        total = 1.0f / total;
        for (long j = 0; j < length; j++) write(read(w + j * columns) * total, w + j * columns);
    }
}

INLINE void drop(float *values, long count, const Dropout d, uint32_t index) {
    for (long i = 0; i < count; i += LANES) write(read(values + i) * factors(d, index + (uint32_t)i), values + i);
}

// A head's vectors, times `scale`, to where they belong; their sum is added to `total`.
INLINE void store(const float *from, long length, long depth, float scale, long stride, bf16 *to, float *total) {
    for (long i = 0; i < length; i++)
        for (long c = 0; c < depth; c += LANES) {
            lanes value = read(from + i * depth + c) * scale;
            narrow(value, to + i * stride + c);
            write(read(total + c) + value, total + c);
        }
}

INLINE void forward_head(const Space s, long length, long columns, long depth, const bf16 *qkv, long width,
                         const float *bias, const Dropout d, uint32_t index, bf16 *out) {
    weigh(s, length, columns, depth, qkv, width, bias);
    if (d.least) drop(s.weights, length * columns, d, index);
    product(round_up(length, ROWS), length, depth, s.weights, 1, columns, s.v, s.made);
    for (long i = 0; i < length; i++)
        for (long c = 0; c < depth; c += LANES) narrow(read(s.made + i * depth + c), out + i * width + c);
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
        float *to_w = s.to_scores + i;
        lanes along = {0};
        for (long j = 0; j < length; j++) along += read(w + j * columns) * read(to_w + j * columns);
        for (long j = 0; j < length; j++)
            write(read(w + j * columns) * (read(to_w + j * columns) - along), to_w + j * columns);
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
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
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
