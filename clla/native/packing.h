/* Rows of bytes from latents, as `RowLayout.pack` of quantize_clla.py: included by reading.c, whose vectors it uses.

   For each class of components the scale of least error of some around their root mean square, then their codes. */

typedef struct {
    int64_t rows, rank, row_bytes, classes, kind, stride, threads;
    const Class *layout;
    const float *steps;  /* of each class */
    const float *scales; /* [256] of their codes */
    const void *latents; /* [rows, rank], `stride` numbers apart */
    uint8_t *out;        /* [rows, row_bytes] */
} Packing;

static const int OFFSETS[] = {0, -1, 1, -2, 2, 3}; /* SCALE_OFFSETS of quantize_clla.py */

INLINE eight load8(const float *x) { return *(const loose8 *)x; }
INLINE eight either(ieight which, eight a, eight b) { return (eight)(((ieight)a & which) | ((ieight)b & ~which)); }

/* Half-integer levels less a half, of numbers in steps. */
INLINE eight levels(eight t, float half) {
    const eight least = (eight){0} - half, most = (eight){0} + (half - 1);
    t = either(t < least, least, t);
    t = either(t > most, most, t);
    eight found = __builtin_convertvector(__builtin_convertvector(t, ieight), eight);
    return found + __builtin_convertvector(found > t, eight); /* true is -1: towards minus infinity */
}

INLINE float sum8(eight v) { return totals8(v, v, v, v)[0]; }

static void pack_class(const float *x, int64_t count, int64_t bits, float unit, const float *scales, uint8_t *scale,
                       uint8_t *codes) {
    const float half = (float)(1 << (bits - 1));
    eight squares = {0};
    for (int64_t i = 0; i < count; i += 8) squares += load8(x + i) * load8(x + i);
    const float size = sqrtf(sum8(squares) / (float)count);
    const int start = size > 0 ? (int)fminf(fmaxf(nearbyintf(log2f(size) * 8) + 128, 1), 255) : 0;
    float least = 0;
    int best = 0;
    for (int try = 0; try < 6; try ++) {
        const int tried = !start                       ? 0
                          : start + OFFSETS[try] < 1   ? 1
                          : start + OFFSETS[try] > 255 ? 255
                                                       : start + OFFSETS[try];
        const float step = unit * scales[tried], inverse = step > 0 ? 1 / step : 0;
        eight errors = {0};
        for (int64_t i = 0; i < count; i += 8) {
            const eight at = load8(x + i), off = (levels(at * inverse, half) + 0.5f) * step - at;
            errors += off * off;
        }
        const float error = sum8(errors);
        if (!try || error < least) {
            least = error;
            best = tried;
        }
    }
    *scale = (uint8_t)best;
    const float step = unit * scales[best];
    for (int64_t i = 0; i < count; i += 8) {
        const eight t = step > 0 ? load8(x + i) / step : (eight){0};
        const ieight found = __builtin_convertvector(levels(t, half) + half, ieight);
        if (bits == 16) {
            for (int lane = 0; lane < 8; lane++, codes += 2) {
                codes[0] = (uint8_t)found[lane];
                codes[1] = (uint8_t)(found[lane] >> 8);
            }
        } else {
            uint64_t word = 0;
            for (int lane = 0; lane < 8; lane++) word |= (uint64_t)found[lane] << (lane * bits);
            memcpy(codes, &word, bits);
            codes += bits;
        }
    }
}

/* `memory` has room for rank numbers of each thread. */
void clla_pack(const Packing *a, float *memory) {
#pragma omp parallel num_threads(a->threads) if (a -> threads > 1)
    {
#ifdef _OPENMP
        float *x = memory + omp_get_thread_num() * a->rank;
#else
        float *x = memory;
#endif
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a->rows; row++) {
            uint8_t *out = a->out + row * a->row_bytes;
            widen(at_number(a->latents, a->kind, row * a->stride), a->kind, a->rank, x);
            for (int64_t c = 0; c < a->classes; c++) {
                const Class *class = a->layout + c;
                pack_class(x + class->first, class->stop - class->first, class->bits, a->steps[c], a->scales,
                           out + class->scale_byte, out + class->codes_byte);
            }
        }
    }
}
