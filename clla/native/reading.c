/* Attention of one layer to packed latents and exact tokens, in one softmax, on a CPU.

   What `attention_clla.LatentRows.attended` does with some hundred operations of PyTorch, in one call and without ever
   holding unpacked latents of more than a bucket of rows. Everything is computed in fp32; for a codec in bf16, products
   with latents are of bf16 numbers where the processor has tiles for them (`tiles.h`). `reading.py` compiles and calls
   it.

   Shape legend: B sequences, H key-value heads, M query rows per key-value head, K rows, E exact tokens, d head dim,
   p rotary dim, r rank, s components that rows are judged by and summed up: all r where no rows are chosen. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "tiles.h"

#ifdef __AVX512F__
#include <immintrin.h>
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* anywhere in memory */
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float eight __attribute__((vector_size(32)));
typedef float loose8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ieight __attribute__((vector_size(32)));
typedef uint32_t ueight __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    int64_t scale_byte, codes_byte, bits, first, stop;
} Class;

typedef struct {
    int64_t sequences, heads, queries, dim, rotary, rows, rank, judged, most, exact, tokens, bucket;
    int64_t classes, row_stride, sequence_stride, data_bytes;
    int64_t turned, interleaved, turns_stride, means_stride, codec_kind, exact_kind, bias_stride, used, threads;
    int64_t exact_strides[2]; /* of sequences and of heads */
    double scaling;
    const Class *layout;
    const float *steps;       /* of each class */
    const float *scales;      /* [256] of their codes */
    const uint8_t *data;      /* [B, K, bytes] */
    const float *query;       /* [B, H, M, d] after RoPE; M counts heads first, then tokens */
    const void *decoder;      /* [2 H d, r], keys first */
    const void *mean;         /* [2 H d] */
    const float *turns;       /* [B or 1, K, p/2, 2] cosines and sines of each row */
    const float *means;       /* [B or 1, buckets, p/2, 2] their means over buckets */
    const void *exact_tokens; /* [B, 2 H, E, d], keys first */
    const float *bias;        /* [B or 1, tokens, E] */
    const int32_t *hidden;    /* [B] rows at the front that are not seen */
    const int32_t *fronts;    /* [B] rows before the first bucket */
    float *memory;            /* of `clla_numbers` numbers */
    float *out;               /* [B, H, M, d] */
} Reading;

INLINE vec load(const float *x) { return *(const loose *)x; }
INLINE void store(float *x, vec v) { *(loose *)x = v; }
#ifdef __clang__
#define MIXED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIXED(a, b, ...) __builtin_shuffle(a, b, (ieight){__VA_ARGS__})
#endif

/* The first `count` numbers, fewer than a vector has; the other lanes are zero, or are not stored. */
INLINE vec load_part(const float *x, int64_t count) {
#ifdef __AVX512F__
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), x);
#else
    vec found = {0};
    memcpy(&found, x, count * sizeof(float));
    return found;
#endif
}

INLINE void store_part(float *x, vec v, int64_t count) {
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(x, (__mmask16)((1u << count) - 1), (__m512)v);
#else
    memcpy(x, &v, count * sizeof(float));
#endif
}

INLINE eight folded(vec v) {
#ifdef __AVX512F__
    __m512d halves = _mm512_castps_pd((__m512)v);
    return (eight)_mm512_castps512_ps256((__m512)v) + (eight)_mm256_castpd_ps(_mm512_extractf64x4_pd(halves, 1));
#else
    return v;
#endif
}

/* Sums of the lanes of four vectors, in the first four lanes. */
INLINE eight totals8(eight a, eight b, eight c, eight d) {
    eight ab = MIXED(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + MIXED(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    eight cd = MIXED(c, d, 0, 8, 2, 10, 4, 12, 6, 14) + MIXED(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
    eight all = MIXED(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + MIXED(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    return all + MIXED(all, all, 4, 5, 6, 7, 0, 1, 2, 3);
}

INLINE eight totals(vec v, vec w, vec x, vec y) { return totals8(folded(v), folded(w), folded(x), folded(y)); }

INLINE float total(vec v) { return totals(v, v, v, v)[0]; }

static float dot(const float *x, const float *y, int64_t count) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum += load(x + i) * load(y + i);
    if (i < count) sum += load_part(x + i, count - i) * load_part(y + i, count - i);
    return total(sum);
}

/* Products. Sizes of a tile are constants, so that sums stay in registers. */

/* C[i][n] (+)= sum over k of A[i][k] B[n][k] */
INLINE void nt_tile(const int m, const int n, int64_t depth, const float *const *a, const float *b, int64_t ldb,
                    float *const *c, int64_t at, int add) {
    vec sums[3][4] = {{{0}}};
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
        vec left[3];
        for (int i = 0; i < m; i++) left[i] = load(a[i] + k);
        for (int j = 0; j < n; j++) {
            vec right = load(b + j * ldb + k);
            for (int i = 0; i < m; i++) sums[i][j] += left[i] * right;
        }
    }
    if (k < depth) {
        vec left[3];
        for (int i = 0; i < m; i++) left[i] = load_part(a[i] + k, depth - k);
        for (int j = 0; j < n; j++) {
            vec right = load_part(b + j * ldb + k, depth - k);
            for (int i = 0; i < m; i++) sums[i][j] += left[i] * right;
        }
    }
    for (int i = 0; i < m; i++) {
        eight found = totals(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
        for (int j = 0; j < n; j++) c[i][at + j] = add ? c[i][at + j] + found[j] : found[j];
    }
}

static void nt(int64_t m, int64_t n, int64_t depth, const float *const *a, const float *b, int64_t ldb, float *const *c,
               int64_t at, int add) {
    for (int64_t j = 0; j < n;) {
        int wide = n - j >= 4;
        for (int64_t i = 0; i < m;) {
            int high = m - i >= 3;
            if (high && wide) nt_tile(3, 4, depth, a + i, b + j * ldb, ldb, c + i, at + j, add);
            else if (high) nt_tile(3, 1, depth, a + i, b + j * ldb, ldb, c + i, at + j, add);
            else if (wide) nt_tile(1, 4, depth, a + i, b + j * ldb, ldb, c + i, at + j, add);
            else nt_tile(1, 1, depth, a + i, b + j * ldb, ldb, c + i, at + j, add);
            i += high ? 3 : 1;
        }
        j += wide ? 4 : 1;
    }
}

/* C[i][n] (+)= sum over k of A[i][k] B[k][n], of two vectors' columns, or of `part` in one. */
INLINE void nn_tile(const int m, const int wide, int64_t part, int64_t depth, const float *const *a, const float *b,
                    int64_t ldb, float *const *c, int64_t at, int add) {
    vec sums[6][2];
    for (int i = 0; i < m; i++)
        for (int j = 0; j < wide; j++) {
            const float *from = c[i] + at + j * LANES;
            sums[i][j] = !add ? (vec){0} : part ? load_part(from, part) : load(from);
        }
    for (int64_t k = 0; k < depth; k++) {
        vec right[2];
        for (int j = 0; j < wide; j++) {
            const float *from = b + k * ldb + j * LANES;
            right[j] = part ? load_part(from, part) : load(from);
        }
        for (int i = 0; i < m; i++)
            for (int j = 0; j < wide; j++) sums[i][j] += a[i][k] * right[j];
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < wide; j++) {
            if (part) store_part(c[i] + at, sums[i][j], part);
            else store(c[i] + at + j * LANES, sums[i][j]);
        }
}

static void nn(int64_t m, int64_t n, int64_t depth, const float *const *a, const float *b, int64_t ldb, float *const *c,
               int add) {
    for (int64_t j = 0; j < n;) {
        int wide = n - j >= 2 * LANES ? 2 : 1;
        int64_t part = n - j < LANES ? n - j : 0;
        for (int64_t i = 0; i < m;) {
            int high = m - i >= 6 ? 6 : m - i >= 3 ? 3 : 1;
            if (part && high == 6) nn_tile(6, 1, part, depth, a + i, b + j, ldb, c + i, j, add);
            else if (part && high == 3) nn_tile(3, 1, part, depth, a + i, b + j, ldb, c + i, j, add);
            else if (part) nn_tile(1, 1, part, depth, a + i, b + j, ldb, c + i, j, add);
            else if (high == 6 && wide == 2) nn_tile(6, 2, 0, depth, a + i, b + j, ldb, c + i, j, add);
            else if (high == 3 && wide == 2) nn_tile(3, 2, 0, depth, a + i, b + j, ldb, c + i, j, add);
            else if (wide == 2) nn_tile(1, 2, 0, depth, a + i, b + j, ldb, c + i, j, add);
            else if (high == 6) nn_tile(6, 1, 0, depth, a + i, b + j, ldb, c + i, j, add);
            else if (high == 3) nn_tile(3, 1, 0, depth, a + i, b + j, ldb, c + i, j, add);
            else nn_tile(1, 1, 0, depth, a + i, b + j, ldb, c + i, j, add);
            i += high;
        }
        j += part ? part : wide * LANES;
    }
}

/* Numbers of 16 bits: kind 0 is fp32, 1 bf16, 2 fp16. */

static void widen(const void *from, int64_t kind, int64_t count, float *to) {
    if (kind == 0) {
        memcpy(to, from, count * sizeof(float));
        return;
    }
    const uint16_t *x = from;
    for (int64_t i = 0; i < count; i++) {
        union {
            uint32_t bits;
            float number;
        } found;
        if (kind == 1) {
            found.bits = (uint32_t)x[i] << 16;
        } else {
            found.bits = (uint32_t)(x[i] & 0x7fff) << 13;
            found.number *= 0x1p112f; /* the exponent's other bias; right for subnormal numbers, too */
            found.bits |= (uint32_t)(x[i] & 0x8000) << 16;
        }
        to[i] = found.number;
    }
}

INLINE const void *at_number(const void *x, int64_t kind, int64_t index) {
    return (const char *)x + index * (kind == 0 ? 4 : 2);
}

/* exp of all lanes, to 2e-7: powers of two by the exponent's bits, the rest by its series. */
INLINE vec exponential(vec x) {
    vec low = {0};
    low += -87.0f;
    ivec under = x < low;
    x = (vec)(((ivec)low & under) | ((ivec)x & ~under));
    vec scaled = x * 1.44269504f;
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    vec whole = (scaled + round) - round;
    vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    vec power = (vec)((__builtin_convertvector(whole, ivec) + 127) << 23);
    vec found = series * power;
    return (vec)((ivec)found & ~under);
}

/* x becomes exp(x - most); returns the sum. */
static float exponentials(float *x, int64_t count, float most) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        vec found = exponential(load(x + i) - most);
        store(x + i, found);
        sum += found;
    }
    float found = total(sum);
    for (; i < count; i++) found += x[i] = expf(x[i] - most);
    return found;
}

static float largest(const float *x, int64_t count, float most) {
    vec found = (vec){0} + most;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        vec next = load(x + i);
        ivec more = next > found;
        found = (vec)(((ivec)next & more) | ((ivec)found & ~more));
    }
    for (int lane = 0; lane < LANES; lane++) most = found[lane] > most ? found[lane] : most;
    for (; i < count; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* x becomes x times a factor; returns the sum of what was there. */
static float scaled(float *x, int64_t count, float factor) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        vec found = load(x + i);
        sum += found;
        store(x + i, found * factor);
    }
    float found = total(sum);
    for (; i < count; i++) {
        found += x[i];
        x[i] *= factor;
    }
    return found;
}

/* Packed rows that lie `stride` bytes apart, or those of them that are `chosen`. */
typedef struct {
    const uint8_t *data, *end;
    int64_t stride, count;
    const int32_t *chosen;
} Rows;

INLINE const uint8_t *row_of(const Rows *rows, int64_t i) {
    return rows->data + (rows->chosen ? rows->chosen[i] : i) * rows->stride;
}

/* Eight numbers to place `at` of a line of fp32, or of bf16. */
INLINE void put(void *z, int64_t at, eight found, const int half) {
#if TILES
    if (half) {
        _mm_storeu_si128((__m128i *)((uint16_t *)z + at), (__m128i)_mm256_cvtneps_pbh((__m256)found));
        return;
    }
#endif
    (void)half;
    *(loose8 *)((float *)z + at) = found;
}

/* Components of one class; bits and kind of numbers are constants. Eight codes fill as many bytes as one has bits. */
INLINE void unpack_class(const uint32_t bits, const int half, const Rows *rows, const Class *class, float step,
                         const float *scales, int64_t stop, void *z, int64_t width) {
    const ueight narrow = {0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits};
    const ueight wide = {0, bits, 2 * bits, 3 * bits, 0, bits, 2 * bits, 3 * bits};
    const ueight none = {0};
    for (int64_t i = 0; i < rows->count; i++) {
        const uint8_t *row = row_of(rows, i), *codes = row + class->codes_byte;
        const float scale = step * scales[row[class->scale_byte]];
        const float least = (0.5f - (float)(1u << (bits - 1))) * scale;
        const int64_t rest = rows->end - codes - 8; /* here 8 bytes at once end with the rows */
        for (int64_t at = class->first, byte = 0; at < stop; at += 8, byte += bits) {
            uint64_t word;
            if (__builtin_expect(byte <= rest, 1)) {
                memcpy(&word, codes + byte, 8);
            } else {
                word = 0;
                memcpy(&word, codes + byte, bits);
            }
            ueight found = none + (uint32_t)word;
            if (bits <= 4) {
                found >>= narrow;
            } else {
                ueight high = none + (uint32_t)(word >> 4 * bits);
                found = MIXED(found, high, 0, 1, 2, 3, 12, 13, 14, 15) >> wide;
            }
            found &= none + ((1u << bits) - 1);
            put(z, i * width + at, __builtin_convertvector((ieight)found, eight) * scale + least, half);
        }
    }
}

/* The first `judged` components of rows, to z [rows, width]. */
INLINE void unpack_as(const int half, const Rows *rows, const Class *layout, int64_t classes, const float *steps,
                      const float *scales, int64_t judged, void *z, int64_t width) {
    for (int64_t c = 0; c < classes && layout[c].first < judged; c++) {
        const Class *class = layout + c;
        const int64_t stop = class->stop < judged ? class->stop : judged;
        switch (class->bits) {
#define BITS(bits)                                                                                                     \
    case bits: unpack_class(bits, half, rows, class, steps[c], scales, stop, z, width); break;
            BITS(1)
            BITS(2)
            BITS(3)
            BITS(4)
            BITS(5)
            BITS(6) BITS(7) BITS(8)
#undef BITS
                default : /* 16 */
                          for (int64_t i = 0; i < rows->count; i++) {
                const uint8_t *row = row_of(rows, i), *codes = row + class->codes_byte;
                const float scale = steps[c] * scales[row[class->scale_byte]];
                for (int64_t at = class->first; at < stop; at += 8) {
                    eight found;
                    for (int lane = 0; lane < 8; lane++, codes += 2)
                        found[lane] = ((float)(codes[0] | codes[1] << 8) - 32767.5f) * scale;
                    put(z, i * width + at, found, half);
                }
            }
        }
    }
}

static void unpack(const Rows *rows, const Class *layout, int64_t classes, const float *steps, const float *scales,
                   int64_t judged, float *z, int64_t width) {
    unpack_as(0, rows, layout, classes, steps, scales, judged, z, width);
}

/* Turn channels [d] of a head by factors [p/2, 2]; backwards for queries that meet keys before their rotation. */
static void turn(const float *x, const float *factors, int64_t dim, int64_t rotary, int64_t interleaved, int backwards,
                 float *to) {
    int64_t half = rotary / 2, step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i * step], b = x[i * step + other], cosine = factors[2 * i];
        float sine = backwards ? -factors[2 * i + 1] : factors[2 * i + 1];
        to[i * step] = a * cosine - b * sine;
        to[i * step + other] = a * sine + b * cosine;
    }
    if (to != x) memcpy(to + rotary, x + rotary, (dim - rotary) * sizeof(float));
}

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* The `most` largest of `count` numbers that are not negative, in the order of their places. */
static void choose(const float *scores, int64_t count, int64_t most, int32_t *chosen) {
    enum { HIGH = 1 << 12 };
    int32_t counts[HIGH];
    int64_t left = most;
    uint32_t prefix = 0, shift = 32;
    for (int round = 0; round < 3; round++) { /* 12, 12 and 8 bits of the number at the border, from the top */
        uint32_t width = round < 2 ? 12 : 8, above = shift == 32 ? 0 : prefix >> shift;
        memset(counts, 0, sizeof(counts));
        for (int64_t i = 0; i < count; i++) {
            uint32_t key = bits_of(scores[i]);
            if (shift == 32 || key >> shift == above) counts[(key >> (shift - width)) & ((1u << width) - 1)]++;
        }
        shift -= width;
        uint32_t digit = (1u << width) - 1;
        while (digit && counts[digit] < left) left -= counts[digit--];
        prefix |= digit << shift;
    }
    int64_t found = 0;
    for (int64_t i = 0; i < count && found < most; i++) {
        uint32_t key = bits_of(scores[i]);
        if (key > prefix || (key == prefix && left-- > 0)) chosen[found++] = (int32_t)i;
    }
}

enum {
    TOGETHER = 8, /* buckets whose queries go through the decoder at once */
    BLOCK = 32,   /* best rows at once */
    SPAN = 64,    /* rows, or components, at once */
    DEPTH = 256,  /* components of a product that stay in a cache */
    SOME = 64     /* query rows at once */
};

INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t whole(int64_t a, int64_t multiple) { return (a + multiple - 1) / multiple * multiple; }

/* One sequence, and what is computed of it on the way. */
typedef struct {
    const Reading *a;
    int64_t H, M, HM, d, K, E, r, s;
    int64_t most;     /* rows that are read in full; 0 for all */
    int64_t front;    /* row with which the first bucket begins */
    int64_t from, to; /* rows that are seen */
    int64_t half, own_size;
    int64_t threads;   /* that share a sequence's work */
    int64_t tiles, ss; /* whether products are of tiles; numbers of a line of `Own.sums`, s or more */
    const uint8_t *data, *end;
    const float *query, *turns, *means, *bias, *decoder, *mean;
    float *out;
    float *tokens;    /* [2 H, E, d] exact keys and values */
    float *near;      /* [HM, E] logits of exact tokens, then their weights */
    float *logits;    /* [HM, K] logits of rows, then their weights */
    float *top;       /* [HM] largest logit */
    float *shares;    /* [HM] factor that makes weights of a row's numbers; then the rows' share of all weights */
    float *scores;    /* [K] */
    int32_t *best;    /* [most] */
    float *best_rows; /* [most, r] */
    float *best_keys; /* [most, H d] */
    float *better;    /* [HM, most] logits of the best rows, then their weights */
    float *sums;      /* [HM, r] */
    float *own;       /* what each thread has for itself */
    uint32_t *paired; /* [H, d padded / 2, ss] decoder of keys for tiles */
} Work;

/* What a thread has for itself. */
typedef struct {
    float *asked;    /* [TOGETHER, HM, d] queries as they meet keys before their rotation */
    float *absorbed; /* [TOGETHER, HM, s] */
    float *plain;    /* [TOGETHER, HM] their products with the mean key */
    float *z;        /* [bucket or SPAN, s] unpacked rows */
    float *sums;     /* [HM, ss] */
    float *top;      /* [HM] largest logit of the rows in `sums` */
    float *total;    /* [HM] of their weights */
    /* With tiles, rows and columns padded to whole ones: */
    uint16_t *asked16;    /* [TOGETHER M, d] of one head */
    uint16_t *absorbed16; /* [TOGETHER, HM, ss] */
    float *products;      /* [TOGETHER M, ss] of one head; [bucket or SPAN, HM] logits */
    uint32_t *query;      /* [ss / 2, HM] absorbed queries of a bucket */
    uint16_t *z16;        /* [bucket or SPAN, ss] */
    uint32_t *pairs;      /* [bucket or SPAN / 2, ss] */
    uint16_t *weights;    /* [HM, bucket or SPAN] */
} Own;

/* The next part of a piece of memory; with `memory` NULL only `place` moves on. */
static float *cut(float *memory, int64_t *place, int64_t numbers) {
    float *found = memory ? memory + *place : NULL;
    *place += (numbers + 31) / 16 * 16;
    return found;
}

static Own lay_out_own(const Work *w, float *memory, int64_t *place) {
    const int64_t HM = w->HM, most = greater(w->a->bucket, SPAN);
    const int64_t wide = whole(HM, 16), high = whole(most, 32), asked = whole(TOGETHER * w->M, 16);
    Own own = {0};
    own.asked = cut(memory, place, TOGETHER * HM * w->d);
    own.plain = cut(memory, place, TOGETHER * HM);
    own.sums = cut(memory, place, wide * w->ss);
    own.top = cut(memory, place, HM);
    own.total = cut(memory, place, HM);
    if (!w->tiles) {
        own.absorbed = cut(memory, place, TOGETHER * HM * w->s);
        own.z = cut(memory, place, most * w->s);
        return own;
    }
    own.asked16 = (uint16_t *)cut(memory, place, asked * whole(w->d, 32) / 2);
    own.absorbed16 = (uint16_t *)cut(memory, place, TOGETHER * wide * w->ss / 2);
    own.products = cut(memory, place, greater(asked * w->ss, high * wide));
    own.query = (uint32_t *)cut(memory, place, w->ss / 2 * wide);
    own.z16 = (uint16_t *)cut(memory, place, high * w->ss / 2);
    own.pairs = (uint32_t *)cut(memory, place, high / 2 * w->ss);
    own.weights = (uint16_t *)cut(memory, place, wide * high / 2);
    return own;
}

static Own own_of(const Work *w, int64_t thread) {
    int64_t place = 0;
    return lay_out_own(w, w->own + thread * w->own_size, &place);
}

static void clear(const Work *w, const Own *own) {
    memset(own->sums, 0, whole(w->HM, 16) * w->ss * sizeof(float));
    for (int64_t hm = 0; hm < w->HM; hm++) {
        own->top[hm] = -INFINITY;
        own->total[hm] = 0;
    }
    if (w->tiles) { /* what products run over beyond d and s; what they give beyond is not read */
        memset(own->asked16, 0, whole(TOGETHER * w->M, 16) * whole(w->d, 32) * 2);
        memset(own->z16, 0, whole(greater(w->a->bucket, SPAN), 32) * w->ss * 2);
    }
}

static void unpack_rows(const Work *w, int64_t first, int64_t count, const Own *own) {
    const Reading *a = w->a;
    const Rows rows = {w->data + first * a->row_stride, w->end, a->row_stride, count, NULL};
    if (!w->tiles) {
        unpack(&rows, a->layout, a->classes, a->steps, a->scales, w->s, own->z, w->s);
        return;
    }
#if TILES
    unpack_as(1, &rows, a->layout, a->classes, a->steps, a->scales, w->s, own->z16, w->ss);
    for (int64_t i = count; i < whole(count, 32); i++) memset(own->z16 + i * w->ss, 0, w->ss * 2);
    for (int64_t i = 0; i < whole(count, 32); i += 2)
        paired(own->z16 + i * w->ss, own->z16 + (i + 1) * w->ss, w->ss, own->pairs + i / 2 * w->ss);
#endif
}

/* sums += weights of some rows, times their latents z. */
static void add_latents(const Work *w, int64_t first, int64_t count, const Own *own) {
    const float *left[SOME];
    float *right[SOME];
#if TILES
    if (w->tiles) {
        const int64_t depth = whole(count, 32);
        for (int64_t hm = 0; hm < w->HM; hm++) {
            narrowed(w->logits + hm * w->K + first, count, own->weights + hm * depth);
            memset(own->weights + hm * depth + count, 0, (depth - count) * 2);
        }
        tiles_product(whole(w->HM, 16), w->ss, depth, own->weights, depth, own->pairs, w->ss, own->sums, w->ss, 1);
        return;
    }
#endif
    for (int64_t start = 0; start < w->HM; start += SOME) {
        int64_t some = lesser(w->HM - start, SOME);
        for (int64_t i = 0; i < some; i++) {
            left[i] = w->logits + (start + i) * w->K + first;
            right[i] = own->sums + (start + i) * w->ss;
        }
        nn(some, w->s, count, left, own->z, w->s, right, 1);
    }
}

/* Every thread calls each of the following functions, and they share the work. */

static void near_logits(const Work *w) {
    const int64_t E = w->E, d = w->d;
#pragma omp for schedule(static)
    for (int64_t hm = 0; hm < w->HM; hm++) {
        const float *query = w->query + hm * d, *bias = w->bias + hm % w->M % w->a->tokens * E;
        float *line = w->near + hm * E;
        nt(1, E, d, &query, w->tokens + hm / w->M * E * d, d, &line, 0, 0);
        for (int64_t e = 0; e < E; e++) line[e] = line[e] * (float)w->a->scaling + bias[e];
    }
}

#if TILES
/* `Own.asked` through the decoder, to `Own.absorbed16`. */
static void absorb_tiles(const Work *w, int64_t count, const Own *own) {
    const int64_t M = w->M, depth = whole(w->d, 32), wide = whole(w->HM, 16), rows = whole(count * M, 16);
    for (int64_t h = 0; h < w->H; h++) {
        for (int64_t i = 0; i < count * M; i++)
            narrowed(own->asked + (i / M * w->HM + h * M + i % M) * w->d, w->d, own->asked16 + i * depth);
        const uint32_t *decoder = w->paired + h * depth / 2 * w->ss;
        tiles_product(rows, w->ss, depth, own->asked16, depth, decoder, w->ss, own->products, w->ss, 0);
        for (int64_t i = 0; i < count * M; i++) {
            uint16_t *to = own->absorbed16 + (i / M * wide + h * M + i % M) * w->ss;
            narrowed(own->products + i * w->ss, w->ss, to);
        }
    }
}

/* Logits of a bucket's rows by its absorbed queries, before what the mean key adds. */
static void logits_tiles(const Work *w, int64_t row, int64_t count, const uint16_t *absorbed, const Own *own) {
    const int64_t wide = whole(w->HM, 16), rows = whole(count, 16);
    for (int64_t q = 0; q < wide; q += 16)
        for (int64_t k = 0; k < w->ss; k += 32)
            transposed(absorbed + q * w->ss + k, w->ss / 2, own->query + k / 2 * wide + q, wide);
    tiles_product(rows, wide, w->ss, own->z16, w->ss, own->query, wide, own->products, wide, 0);
    float part[16][16];
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t q = 0; q < wide; q += 16) {
            transposed(own->products + i * wide + q, wide, part, 16);
            for (int64_t hm = q; hm < lesser(w->HM, q + 16); hm++)
                memcpy(w->logits + hm * w->K + row + i, part[hm - q], lesser(count - i, 16) * sizeof(float));
        }
}
#endif

/* Queries of some buckets, turned back to their middle and led through the decoder. */
static void absorb(const Work *w, int64_t first, int64_t count, const Own *own) {
    const Reading *a = w->a;
    const int64_t HM = w->HM, d = w->d, s = w->s;
    const float *left[TOGETHER * SOME];
    float *right[TOGETHER * SOME];
    for (int64_t g = 0; g < count; g++)
        for (int64_t hm = 0; hm < HM; hm++) {
            const float *query = w->query + hm * d, *means = w->means + (first + g) * w->half * 2;
            float *x = own->asked + (g * HM + hm) * d;
            if (a->turned) turn(query, means, d, a->rotary, a->interleaved, 1, x);
            else memcpy(x, query, d * sizeof(float));
            for (int64_t i = 0; i < d; i++) x[i] *= (float)a->scaling;
            own->plain[g * HM + hm] = dot(x, w->mean + hm / w->M * d, d);
        }
#if TILES
    if (w->tiles) {
        absorb_tiles(w, count, own);
        return;
    }
#endif
    for (int64_t h = 0; h < w->H; h++)
        for (int64_t start = 0; start < w->M; start += SOME) {
            int64_t rows = 0;
            for (int64_t g = 0; g < count; g++)
                for (int64_t m = start; m < lesser(w->M, start + SOME); m++, rows++) {
                    left[rows] = own->asked + (g * HM + h * w->M + m) * d;
                    right[rows] = own->absorbed + (g * HM + h * w->M + m) * s;
                }
            nn(rows, s, d, left, w->decoder + h * d * w->r, w->r, right, 0);
        }
}

/* Logits of the rows of bucket g of those that are absorbed. */
static void bucket_logits(const Work *w, int64_t row, int64_t count, int64_t g, const Own *own) {
    const float *left[SOME], *plain = own->plain + g * w->HM;
    float *right[SOME];
#if TILES
    if (w->tiles) logits_tiles(w, row, count, own->absorbed16 + g * whole(w->HM, 16) * w->ss, own);
#endif
    for (int64_t start = 0; start < w->HM && !w->tiles; start += SOME) {
        int64_t some = lesser(w->HM - start, SOME);
        for (int64_t i = 0; i < some; i++) {
            left[i] = own->absorbed + (g * w->HM + start + i) * w->s;
            right[i] = w->logits + (start + i) * w->K;
        }
        nt(some, count, w->s, left, own->z, w->s, right, row, 0);
    }
    for (int64_t hm = 0; hm < w->HM; hm++) {
        float *line = w->logits + hm * w->K;
        for (int64_t t = row; t < row + count; t++) line[t] += plain[hm];
        for (int64_t t = row; t < lesser(w->from, row + count); t++) line[t] = -INFINITY;
        for (int64_t t = greater(row, w->to); t < row + count; t++) line[t] = -INFINITY;
    }
}

/* Logits become weights relative to the largest so far, and latents are summed up with them while they lie at hand. */
static void add_bucket(const Work *w, int64_t row, int64_t count, const Own *own) {
    for (int64_t hm = 0; hm < w->HM; hm++) {
        float *line = w->logits + hm * w->K + row, top = largest(line, count, own->top[hm]);
        if (top == -INFINITY) { /* nothing is seen yet */
            memset(line, 0, count * sizeof(float));
            continue;
        }
        float shrink = expf(own->top[hm] - top);
        if (shrink < 1) scaled(own->sums + hm * w->ss, w->s, shrink);
        own->total[hm] = own->total[hm] * shrink + exponentials(line, count, top);
        own->top[hm] = top;
    }
    add_latents(w, row, count, own);
}

/* Logits of all rows, by one rotation for each bucket; where no rows are chosen, their sums as well. */
static void read_buckets(const Work *w, const Own *own) {
    const int64_t size = w->a->bucket, buckets = (w->K - w->front + size - 1) / size;
#pragma omp for schedule(static) nowait
    for (int64_t hm = 0; hm < w->HM; hm++)
        for (int64_t i = 0; i < w->front; i++) w->logits[hm * w->K + i] = -INFINITY;
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < (buckets + TOGETHER - 1) / TOGETHER; chunk++) {
        int64_t first = chunk * TOGETHER, together = lesser(buckets - first, TOGETHER);
        absorb(w, first, together, own);
        for (int64_t g = 0; g < together; g++) {
            int64_t row = w->front + (first + g) * size, count = lesser(w->K - row, size);
            unpack_rows(w, row, count, own);
            bucket_logits(w, row, count, g, own);
            if (!w->most) add_bucket(w, row, count, own);
        }
    }
}

/* The rows with the largest weights, summed over all queries. */
static void choose_best(const Work *w) {
    const int64_t K = w->K, E = w->E;
#pragma omp for schedule(static)
    for (int64_t hm = 0; hm < w->HM; hm++) {
        float *line = w->logits + hm * K, top = largest(line, K, largest(w->near + hm * E, E, -INFINITY));
        float sum = exponentials(line, K, top);
        for (int64_t e = 0; e < E; e++) sum += expf(w->near[hm * E + e] - top);
        w->top[hm] = top;
        w->shares[hm] = 1 / sum;
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < (K + 511) / 512; part++)
        for (int64_t hm = 0; hm < w->HM; hm++)
            for (int64_t i = part * 512; i < lesser(K, part * 512 + 512); i++)
                w->scores[i] = (hm ? w->scores[i] : 0) + w->logits[hm * K + i] * w->shares[hm];
#pragma omp single
    choose(w->scores, K, w->most, w->best);
}

/* Logits of the best rows, from their keys. */
static void read_best(const Work *w) {
    const Reading *a = w->a;
    const int64_t d = w->d, r = w->r, width = w->H * d;
    const float *left[BLOCK];
    float *right[BLOCK];
#pragma omp for schedule(dynamic)
    for (int64_t start = 0; start < w->most; start += BLOCK) {
        int64_t count = lesser(w->most - start, BLOCK);
        const Rows rows = {w->data, w->end, a->row_stride, count, w->best + start};
        unpack(&rows, a->layout, a->classes, a->steps, a->scales, r, w->best_rows + start * r, r);
        for (int64_t i = 0; i < count; i++) {
            left[i] = w->best_rows + (start + i) * r;
            right[i] = w->best_keys + (start + i) * width;
            memcpy(right[i], w->mean, width * sizeof(float));
        }
        for (int64_t k = 0; k < r; k += DEPTH) {
            nt(count, width, lesser(r - k, DEPTH), left, w->decoder + k, r, right, 0, 1);
            for (int64_t i = 0; i < count; i++) left[i] += DEPTH;
        }
        for (int64_t i = 0; i < count; i++) {
            int64_t row = w->best[start + i], seen = row >= w->from && row < w->to;
            for (int64_t h = 0; h < w->H; h++) {
                float *key = right[i] + h * d;
                if (a->turned) turn(key, w->turns + row * w->half * 2, d, a->rotary, a->interleaved, 0, key);
                for (int64_t hm = h * w->M; hm < (h + 1) * w->M; hm++) {
                    float found = dot(w->query + hm * d, key, d) * (float)a->scaling;
                    w->better[hm * w->most + start + i] = seen ? found : -INFINITY;
                }
            }
        }
    }
}

/* Weights of all rows and exact tokens, the best rows' logits in their places. */
static void weigh(const Work *w) {
#pragma omp for schedule(static)
    for (int64_t hm = 0; hm < w->HM; hm++) {
        float *line = w->logits + hm * w->K, *exact = w->near + hm * w->E, *better = w->better + hm * w->most;
        float top = largest(better, w->most, w->top[hm]), shrink = expf(w->top[hm] - top);
        for (int64_t i = 0; i < w->most; i++) line[w->best[i]] = 0;
        float share = scaled(line, w->K, 1) * shrink + exponentials(better, w->most, top);
        float sum = share + exponentials(exact, w->E, top);
        scaled(line, w->K, shrink / sum);
        scaled(exact, w->E, 1 / sum);
        scaled(better, w->most, 1 / sum);
        for (int64_t i = 0; i < w->most; i++) line[w->best[i]] = better[i];
        w->shares[hm] = share / sum;
    }
}

/* Sums of the first components of all rows, and of the others of the best rows. */
static void sum_up(const Work *w, const Own *own) {
#pragma omp for schedule(static) nowait
    for (int64_t span = 0; span < (w->K + SPAN - 1) / SPAN; span++) {
        int64_t row = span * SPAN, count = lesser(w->K - row, SPAN);
        unpack_rows(w, row, count, own);
        add_latents(w, row, count, own);
    }
    const float *left[SOME];
    float *right[SOME];
#pragma omp for schedule(static)
    for (int64_t span = 0; span < (w->r - w->s + SPAN - 1) / SPAN; span++)
        for (int64_t start = 0; start < w->HM; start += SOME) {
            int64_t column = w->s + span * SPAN, some = lesser(w->HM - start, SOME);
            for (int64_t i = 0; i < some; i++) {
                left[i] = w->better + (start + i) * w->most;
                right[i] = w->sums + (start + i) * w->r + column;
            }
            nn(some, lesser(w->r - column, SPAN), w->most, left, w->best_rows + column, w->r, right, 0);
        }
}

/* What the threads have summed up, together. */
static void gather(const Work *w, int64_t threads) {
#pragma omp for schedule(static)
    for (int64_t hm = 0; hm < w->HM; hm++) {
        float *sums = w->sums + hm * w->r, *near = w->near + hm * w->E, top = -INFINITY, total = 0;
        if (!w->most) {
            for (int64_t thread = 0; thread < threads; thread++) top = largest(own_of(w, thread).top + hm, 1, top);
            top = largest(near, w->E, top);
        }
        memset(sums, 0, w->s * sizeof(float));
        for (int64_t thread = 0; thread < threads; thread++) {
            const Own own = own_of(w, thread);
            float shrink = w->most ? 1 : expf(own.top[hm] - top);
            total += own.total[hm] * shrink;
            for (int64_t j = 0; j < w->s; j++) sums[j] += own.sums[hm * w->ss + j] * shrink;
        }
        if (!w->most) {
            float all = total + exponentials(near, w->E, top);
            scaled(sums, w->s, 1 / all);
            scaled(near, w->E, 1 / all);
            w->shares[hm] = total / all;
        }
    }
}

/* Values of the sums, and of exact tokens. */
static void decode(const Work *w) {
    const int64_t d = w->d, E = w->E;
    const float *left[SOME];
    float *right[SOME];
#pragma omp for schedule(static)
    for (int64_t h = 0; h < w->H; h++) {
        const float *mean = w->mean + (w->H + h) * d, *decoder = w->decoder + (w->H + h) * d * w->r;
        for (int64_t start = h * w->M; start < (h + 1) * w->M; start += SOME) {
            int64_t some = lesser((h + 1) * w->M - start, SOME);
            for (int64_t i = 0; i < some; i++) {
                left[i] = w->sums + (start + i) * w->r;
                right[i] = w->out + (start + i) * d;
            }
            nt(some, d, w->r, left, decoder, w->r, right, 0, 0);
            for (int64_t i = 0; i < some; i++) {
                for (int64_t j = 0; j < d; j++) right[i][j] += w->shares[start + i] * mean[j];
                left[i] = w->near + (start + i) * E;
            }
            nn(some, d, E, left, w->tokens + (w->H + h) * E * d, d, right, 1);
        }
    }
}

static void attend_one(const Work *w) {
#pragma omp parallel num_threads(w->threads) if (w -> threads > 1)
    {
#ifdef _OPENMP
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
        int64_t thread = 0, threads = 1;
#endif
        const Own own = own_of(w, thread);
        clear(w, &own);
#if TILES
        TileConfig before;
        if (w->tiles) tiles_begin(&before);
#endif
        near_logits(w);
        read_buckets(w, &own);
        if (w->most) {
            choose_best(w);
            read_best(w);
            weigh(w);
            sum_up(w, &own);
        }
        gather(w, threads);
        decode(w);
#if TILES
        if (w->tiles) tiles_end(&before);
#endif
    }
}

/* Lay out a sequence's memory; how many numbers it holds. */
static int64_t lay_out(Work *w, float *memory) {
    const int64_t width = w->H * w->d;
    int64_t place = 0;
    w->tokens = cut(memory, &place, 2 * width * w->E);
    w->near = cut(memory, &place, w->HM * w->E);
    w->logits = cut(memory, &place, w->HM * w->K);
    w->top = cut(memory, &place, w->HM);
    w->shares = cut(memory, &place, w->HM);
    w->scores = cut(memory, &place, w->most ? w->K : 0);
    w->best = (int32_t *)cut(memory, &place, w->most);
    w->best_rows = cut(memory, &place, w->most * w->r);
    w->best_keys = cut(memory, &place, w->most * width);
    w->better = cut(memory, &place, w->HM * w->most);
    w->sums = cut(memory, &place, w->HM * w->r);
    w->own = cut(memory, &place, w->threads * w->own_size);
    return place;
}

/* How many sequences are read at once: as many as there are threads, if there are as many; else threads share one. */
static int64_t teams_of(const Reading *a) {
#ifdef _OPENMP
    return a->sequences >= a->threads ? a->threads : 1;
#else
    return 1;
#endif
}

static Work work_of(const Reading *a) {
    const int64_t K = a->rows, HM = a->heads * a->queries;
    Work w = {.a = a, .H = a->heads, .M = a->queries, .HM = HM, .d = a->dim, .K = K, .E = a->exact, .r = a->rank};
    w.s = a->judged;
    w.most = a->most < K ? a->most : 0;
    w.half = a->rotary / 2;
#if TILES
    static int allowed = -1;
    if (allowed < 0) allowed = tiles_allowed();
    w.tiles = allowed && a->codec_kind == 1;
#endif
    w.ss = w.tiles ? whole(w.s, 32) : w.s;
    w.threads = teams_of(a) > 1 ? 1 : a->threads;
    lay_out_own(&w, NULL, &w.own_size);
    w.end = a->data + a->data_bytes;
    w.to = a->used >= 0 ? lesser(a->used, K) : K;
    return w;
}

/* Lay out the memory that all sequences share; how many numbers it holds. */
static int64_t lay_out_shared(Work *w, float *memory, float **mean, float **decoder) {
    const int64_t width = 2 * w->H * w->d;
    int64_t place = 0;
    *mean = cut(memory, &place, width);
    *decoder = cut(memory, &place, w->a->codec_kind ? width * w->r : 0);
    w->paired = (uint32_t *)cut(memory, &place, w->tiles ? w->H * whole(w->d, 32) / 2 * w->ss : 0);
    return place;
}

/* How many numbers of memory are taken. */
int64_t clla_numbers(const Reading *a) {
    Work w = work_of(a);
    float *mean, *decoder;
    return lay_out_shared(&w, NULL, &mean, &decoder) + teams_of(a) * lay_out(&w, NULL);
}

/* Decoder and mean as they are computed with. */
static void prepare(const Work *w, float *mean, float *decoder) {
    const Reading *a = w->a;
    const int64_t d = w->d, r = w->r, kind = a->codec_kind;
    widen(a->mean, kind, 2 * w->H * d, mean);
#pragma omp parallel for schedule(static) num_threads(a->threads) if (a->threads > 1)
    for (int64_t h = 0; h < 2 * w->H; h++) {
        const int64_t place = h * d * r, paired_keys = w->tiles && h < w->H;
        if (kind && (!paired_keys || w->most)) widen(at_number(a->decoder, kind, place), kind, d * r, decoder + place);
#if TILES
        if (!paired_keys) continue;
        const uint16_t *from = (const uint16_t *)a->decoder + place;
        uint32_t *to = w->paired + h * whole(d, 32) / 2 * w->ss;
        memset(to, 0, whole(d, 32) / 2 * w->ss * sizeof(uint32_t));
        for (int64_t i = 0; i < d; i += 2)
            paired(from + i * r, i + 1 < d ? from + (i + 1) * r : NULL, w->s, to + i / 2 * w->ss);
#endif
    }
}

static void attend_sequence(Work *w, int64_t b) {
    const Reading *a = w->a;
    w->front = lesser(a->fronts[b], w->K);
    w->from = lesser(a->hidden[b], w->K);
    w->data = a->data + b * a->sequence_stride;
    w->query = a->query + b * w->HM * w->d;
    w->turns = a->turns + b * a->turns_stride;
    w->means = a->means + b * a->means_stride;
    w->bias = a->bias + b * a->bias_stride;
    w->out = a->out + b * w->HM * w->d;
    for (int64_t h = 0; h < 2 * w->H && w->E; h++) {
        int64_t place = b * a->exact_strides[0] + h * a->exact_strides[1];
        const void *from = at_number(a->exact_tokens, a->exact_kind, place);
        widen(from, a->exact_kind, w->E * w->d, w->tokens + h * w->E * w->d);
    }
    attend_one(w);
}

void clla_attend(const Reading *a) {
    Work w = work_of(a);
    const int64_t teams = teams_of(a), size = lay_out(&w, NULL);
    float *mean, *decoder, *memory = a->memory + lay_out_shared(&w, a->memory, &mean, &decoder);
    w.mean = mean;
    w.decoder = a->codec_kind ? decoder : a->decoder;
    prepare(&w, mean, decoder);
    if (teams == 1) { /* not in a parallel region of one thread, for which OpenMP would start others anew */
        lay_out(&w, memory);
        for (int64_t b = 0; b < a->sequences; b++) attend_sequence(&w, b);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(teams)
    {
        Work own = w;
        lay_out(&own, memory + omp_get_thread_num() * size);
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < a->sequences; b++) attend_sequence(&own, b);
    }
#endif
}

#include "packing.h"
