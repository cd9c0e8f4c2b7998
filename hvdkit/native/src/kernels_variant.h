/* The loops of the kernels, compiled once for each instruction set: no include guard, on purpose.
 *
 * The including file defines HV_NAME(x), which gives x a suffix of its own, HV_VARIANT, the name,
 * and HV_LEVEL: 0 for the architecture's baseline, 1 for AVX2 + F16C, 2 for AVX-512.
 *
 * Every loop is plain C that the compiler vectorises, but for float16 on x86-64.  Bits are the same
 * in all variants: the compiler may neither fuse a multiplication with an addition
 * (-ffp-contract=off) nor reassociate.
 */

#if HV_LEVEL == 2
#define HV_VECTOR 64
#elif HV_LEVEL == 1
#define HV_VECTOR 32
#else
#define HV_VECTOR 16
#endif

#if HV_LEVEL == 2
#define HV_COPY_LINE_PAST(out, in)                                                               \
    _mm512_stream_si512((void *)(out), _mm512_loadu_si512((const void *)(in)))
#elif HV_LEVEL == 1
#define HV_PAST(out, in, at)                                                                     \
    _mm256_stream_si256((void *)((out) + (at)), _mm256_loadu_si256((const void *)((in) + (at))))
#define HV_COPY_LINE_PAST(out, in) (HV_PAST(out, in, 0), HV_PAST(out, in, 32))
#else
#define HV_PAST(out, in, at)                                                                     \
    _mm_stream_si128((void *)((out) + (at)), _mm_loadu_si128((const void *)((in) + (at))))
#define HV_COPY_LINE_PAST(out, in)                                                               \
    (HV_PAST(out, in, 0), HV_PAST(out, in, 16), HV_PAST(out, in, 32), HV_PAST(out, in, 48))
#endif

typedef uint8_t HV_NAME(vector)
    __attribute__((vector_size(HV_VECTOR), aligned(1), may_alias));

/* -------------------------------------------------------------------------------------- copying */

/* The empty asm keeps compilers from recognising the loop and calling memcpy instead of it. */
static void HV_NAME(copy)(void *dst, const void *src, size_t bytes)
{
    uint8_t *out = dst;
    const uint8_t *in = src;
    if (bytes >= 8 * HV_VECTOR) {
        const size_t head = HV_VECTOR - (uintptr_t)out % HV_VECTOR;
        *(HV_NAME(vector) *)out = *(const HV_NAME(vector) *)in;
        out += head, in += head, bytes -= head;
        for (; bytes >= 4 * HV_VECTOR; bytes -= 4 * HV_VECTOR) {
            const HV_NAME(vector) *from = (const HV_NAME(vector) *)in;
            HV_NAME(vector) *to = (HV_NAME(vector) *)out;
            const HV_NAME(vector) a = from[0], b = from[1], c = from[2], d = from[3];
            to[0] = a, to[1] = b, to[2] = c, to[3] = d;
            out += 4 * HV_VECTOR, in += 4 * HV_VECTOR;
            __asm__ volatile("" ::: "memory");
        }
    }
    hv_copy_tail(out, in, bytes);
}

/* The same past the caches: the old content of the destination is not fetched, and what is in the
 * caches stays.  The fence lets a later store, such as a flag, come after these. */
static void HV_NAME(copy_past)(void *dst, const void *src, size_t bytes)
{
#if defined(__x86_64__)
    uint8_t *out = dst;
    const uint8_t *in = src;
    const size_t head = (64 - (uintptr_t)out % 64) % 64;
    if (bytes >= head + 64) {
        HV_NAME(copy)(out, in, head);
        out += head, in += head, bytes -= head;
        for (; bytes >= 64; out += 64, in += 64, bytes -= 64)
            HV_COPY_LINE_PAST(out, in);
        _mm_sfence();
    }
    HV_NAME(copy)(out, in, bytes);
#else
    HV_NAME(copy)(dst, src, bytes);
#endif
}

/* ---------------------------------------------------------------------- out[i] = op(a[i], b[i]) */

#define HV_COMBINE(name, T, expression)                                                          \
    static void HV_NAME(name)(void *out, const void *left, const void *right, size_t count)      \
    {                                                                                            \
        T *o = out;                                                                              \
        const T *l = left, *r = right;                                                           \
        HV_INDEPENDENT                                                                           \
        for (size_t i = 0; i < count; i++) {                                                     \
            const T a = l[i], b = r[i];                                                          \
            o[i] = (T)(expression);                                                              \
        }                                                                                        \
    }

/* Sum and product wrap around, so signed integers use the unsigned loop.  1u keeps 16-bit factors
 * from being promoted to int, whose overflow is undefined. */
#define HV_COMBINE_MODULAR(T)                                                                    \
    HV_COMBINE(sum_##T, T, a + b)                                                                \
    HV_COMBINE(product_##T, T, 1u * a * b)

#define HV_COMBINE_ORDERED(T)                                                                    \
    HV_COMBINE(min_##T, T, a < b ? a : b)                                                        \
    HV_COMBINE(max_##T, T, a > b ? a : b)

/* A NaN wins, the first one if both are; of equal values (+0 and -0) the second: numpy's choice. */
#define HV_COMBINE_FLOAT(T)                                                                      \
    HV_COMBINE(sum_##T, T, a + b)                                                                \
    HV_COMBINE(product_##T, T, a * b)                                                            \
    HV_COMBINE(min_##T, T, ((a < b) | (a != a)) ? a : b)                                         \
    HV_COMBINE(max_##T, T, ((a > b) | (a != a)) ? a : b)

#define HV_COMBINE_COMPLEX(T, R)                                                                 \
    static void HV_NAME(product_##T)(void *out, const void *left, const void *right,             \
                                     size_t count)                                               \
    {                                                                                            \
        R *o = out;                                                                              \
        const R *l = left, *r = right;                                                           \
        HV_INDEPENDENT                                                                           \
        for (size_t i = 0; i < count; i++) {                                                     \
            const R a = l[2 * i], b = l[2 * i + 1], c = r[2 * i], d = r[2 * i + 1];              \
            o[2 * i] = a * c - b * d;                                                            \
            o[2 * i + 1] = a * d + b * c;                                                        \
        }                                                                                        \
    }

HV_COMBINE(or_bool, hv_u8, (a | b) != 0)
HV_COMBINE(and_bool, hv_u8, (a != 0) & (b != 0))
HV_COMBINE_MODULAR(hv_u8)
HV_COMBINE_MODULAR(hv_u16)
HV_COMBINE_MODULAR(hv_u32)
HV_COMBINE_MODULAR(hv_u64)
HV_COMBINE_ORDERED(hv_u8)
HV_COMBINE_ORDERED(hv_i8)
HV_COMBINE_ORDERED(hv_u16)
HV_COMBINE_ORDERED(hv_i16)
HV_COMBINE_ORDERED(hv_u32)
HV_COMBINE_ORDERED(hv_i32)
HV_COMBINE_ORDERED(hv_u64)
HV_COMBINE_ORDERED(hv_i64)
HV_COMBINE_FLOAT(hv_f32)
HV_COMBINE_FLOAT(hv_f64)
#if HV_LEVEL < 2 /* with AVX-512, gcc 12 fuses this pattern (vfmaddsub) whatever -ffp-contract says */
HV_COMBINE_COMPLEX(complex64, hv_f32)
HV_COMBINE_COMPLEX(complex128, hv_f64)
#else
#define product_complex64_avx512 product_complex64_avx2
#define product_complex128_avx512 product_complex128_avx2
#endif

/* ------------------------------------------------------------------ 16-bit floats: Min and Max */

/* Compared as integers: no conversion, sixteen bits a lane, and NaN payloads stay.  Of equal float16
 * the first is taken, of equal bfloat16 the second: so do numpy and ml_dtypes. */
#define HV_COMBINE_KEYS(name, relation, infinity)                                                \
    static void HV_NAME(name)(void *out, const void *left, const void *right, size_t count)      \
    {                                                                                            \
        hv_u16 *o = out;                                                                         \
        const hv_u16 *l = left, *r = right;                                                      \
        HV_INDEPENDENT                                                                           \
        for (size_t i = 0; i < count; i++) {                                                     \
            const uint16_t a = l[i], b = r[i];                                                   \
            const int16_t x = hv_sign_magnitude_key(a), y = hv_sign_magnitude_key(b);            \
            const int16_t p = (int16_t)(a & 0x7fff), q = (int16_t)(b & 0x7fff);                  \
            const uint16_t better = x relation y ? a : b;                                        \
            const uint16_t second = q > (int16_t)(infinity) ? b : better;                        \
            o[i] = p > (int16_t)(infinity) ? a : second;                                         \
        }                                                                                        \
    }

HV_COMBINE_KEYS(min_f16, <=, 0x7c00)
HV_COMBINE_KEYS(max_f16, >=, 0x7c00)
HV_COMBINE_KEYS(min_bf16, <, 0x7f80)
HV_COMBINE_KEYS(max_bf16, >, 0x7f80)

/* -------------------------------------------------------------- 16-bit floats by way of float32 */

/* Whole vectors of float16 by intrinsics, as compilers do not vectorise its conversion; the rest of
 * them, and most of bfloat16, by loops. */
#if HV_LEVEL == 2
#define HV_LANES 16
#define HV_FLOATS __m512
#define HV_ANY_NAN(x, y) _mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q)
#define HV_LOAD_f32(p) _mm512_loadu_ps((const void *)(p))
#define HV_STORE_f32(p, x) _mm512_storeu_ps((void *)(p), x)
#define HV_LOAD_f16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(p)))
#define HV_STORE_f16(p, x)                                                                       \
    _mm256_storeu_si256((void *)(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))
#elif HV_LEVEL == 1
#define HV_LANES 8
#define HV_FLOATS __m256
#define HV_ANY_NAN(x, y) _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_UNORD_Q))
#define HV_LOAD_f32(p) _mm256_loadu_ps((const void *)(p))
#define HV_STORE_f32(p, x) _mm256_storeu_ps((void *)(p), x)
#define HV_LOAD_f16(p) _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p)))
#define HV_STORE_f16(p, x)                                                                       \
    _mm_storeu_si128((void *)(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))
#endif

#ifdef HV_LANES
#define HV_BY_LANES_f16(statement)                                                               \
    for (; i + HV_LANES <= count; i += HV_LANES)                                                 \
        statement;
#else
#define HV_BY_LANES_f16(statement)
#endif
#define HV_BY_LANES_bf16(statement)

#define HV_CONVERT_HALF(kind)                                                                    \
    static void HV_NAME(widen_##kind)(hv_f32 *out, const hv_u16 *in, size_t count)               \
    {                                                                                            \
        size_t i = 0;                                                                            \
        HV_BY_LANES_##kind(HV_STORE_f32(out + i, HV_LOAD_##kind(in + i)))                        \
        HV_INDEPENDENT                                                                           \
        for (; i < count; i++)                                                                   \
            out[i] = hv_##kind##_to_f32(in[i]);                                                  \
    }                                                                                            \
    static void HV_NAME(narrow_##kind)(hv_u16 *out, const hv_f32 *in, size_t count)              \
    {                                                                                            \
        size_t i = 0;                                                                            \
        HV_BY_LANES_##kind(HV_STORE_##kind(out + i, HV_LOAD_f32(in + i)))                        \
        HV_INDEPENDENT                                                                           \
        for (; i < count; i++)                                                                   \
            out[i] = hv_f32_to_##kind(in[i]);                                                    \
    }

/* Of two NaNs the second, as in numpy, in whichever order the compiler adds. */
#define HV_SECOND_NAN(b, result) ((b) != (b) ? (b) : (result))

/* Two bfloat16 are the upper and the lower half of 32 bits, so a vector of pairs becomes two of
 * float32 by a mask and a shift, with no element changing its lane. */
#define HV_COMBINE_PAIR(o, l, r, operator)                                                       \
    {                                                                                            \
        const uint32_t x = *(const hv_u32 *)(l), y = *(const hv_u32 *)(r);                       \
        const float a = hv_float_of_bits(x << 16), b = hv_float_of_bits(y << 16);                \
        const float c = hv_float_of_bits(x & 0xffff0000u);                                       \
        const float d = hv_float_of_bits(y & 0xffff0000u);                                       \
        const uint32_t low = hv_round_to_bf16(HV_SECOND_NAN(b, a operator b));                    \
        const uint32_t high = hv_round_to_bf16(HV_SECOND_NAN(d, c operator d));                   \
        *(hv_u32 *)(o) = low >> 16 | (high & 0xffff0000u);                                       \
    }
#if HV_LEVEL == 2
/* No NaN is tested for one by one: vectors in which there is one are left to the loop of pairs. */
#define HV_WIDE(x) _mm512_set1_epi32((int)(x))
#define HV_LOW(x) _mm512_castsi512_ps(_mm512_slli_epi32(x, 16))
#define HV_HIGH(x) _mm512_castsi512_ps(_mm512_and_si512(x, HV_WIDE(0xffff0000u)))
#define HV_ROUND(x)                                                                              \
    _mm512_add_epi32(_mm512_add_epi32(x, HV_WIDE(0x7fff)),                                       \
                     _mm512_and_si512(_mm512_srli_epi32(x, 16), HV_WIDE(1)))
#define HV_BY_PAIRS_bf16(operator)                                                               \
    for (; i + 32 <= count; i += 32) {                                                           \
        const __m512i x = _mm512_loadu_si512(l + i), y = _mm512_loadu_si512(r + i);              \
        const __m512 low = HV_LOW(x) operator HV_LOW(y), high = HV_HIGH(x) operator HV_HIGH(y);  \
        if (__builtin_expect(HV_ANY_NAN(low, high), 0)) {                  \
            for (size_t pair = i; pair < i + 32; pair += 2)                                      \
                HV_COMBINE_PAIR(o + pair, l + pair, r + pair, operator)                          \
            continue;                                                                            \
        }                                                                                        \
        const __m512i p = _mm512_castps_si512(low), q = _mm512_castps_si512(high);               \
        _mm512_storeu_si512(o + i, _mm512_mask_blend_epi16(0xaaaaaaaau,                          \
                                                           _mm512_srli_epi32(HV_ROUND(p), 16),   \
                                                           HV_ROUND(q)));                        \
    }
#else
#define HV_BY_PAIRS_bf16(operator)                                                               \
    HV_INDEPENDENT                                                                               \
    for (size_t pair = 0; pair < count / 2; pair++)                                              \
        HV_COMBINE_PAIR(o + 2 * pair, l + 2 * pair, r + 2 * pair, operator)                      \
    i = count / 2 * 2;
#endif
#ifdef HV_LANES
#define HV_BY_PAIRS_f16(operator)                                                                \
    for (size_t step; i + HV_LANES <= count; i += step) {                                        \
        step = i + 2 * HV_LANES <= count ? 2 * HV_LANES : HV_LANES;                              \
        const size_t j = i + step - HV_LANES;                                                    \
        const HV_FLOATS p = HV_LOAD_f16(l + i) operator HV_LOAD_f16(r + i);                      \
        const HV_FLOATS q = HV_LOAD_f16(l + j) operator HV_LOAD_f16(r + j);                      \
        if (__builtin_expect(HV_ANY_NAN(p, q), 0)) {                                             \
            for (size_t k = i; k < i + step; k++) {                                              \
                const float a = hv_f16_to_f32(l[k]), b = hv_f16_to_f32(r[k]);                    \
                o[k] = hv_f32_to_f16(HV_SECOND_NAN(b, a operator b));                            \
            }                                                                                    \
            continue;                                                                            \
        }                                                                                        \
        HV_STORE_f16(o + i, p);                                                                  \
        HV_STORE_f16(o + j, q);                                                                  \
    }
#else
#define HV_BY_PAIRS_f16(operator)
#endif

#define HV_COMBINE_HALF(name, kind, operator)                                                    \
    static void HV_NAME(name##_##kind)(void *out, const void *left, const void *right,           \
                                       size_t count)                                             \
    {                                                                                            \
        hv_u16 *o = out;                                                                         \
        const hv_u16 *l = left, *r = right;                                                      \
        size_t i = 0;                                                                            \
        HV_BY_PAIRS_##kind(operator)                                                             \
        HV_INDEPENDENT                                                                           \
        for (; i < count; i++) {                                                                 \
            const float a = hv_##kind##_to_f32(l[i]), b = hv_##kind##_to_f32(r[i]);              \
            o[i] = hv_f32_to_##kind(HV_SECOND_NAN(b, a operator b));                              \
        }                                                                                        \
    }                                                                                            \
    static void HV_NAME(name##_into_f32_##kind)(float *total, const void *right, size_t count)   \
    {                                                                                            \
        const hv_u16 *r = right;                                                                 \
        size_t i = 0;                                                                            \
        HV_BY_LANES_##kind(                                                                      \
            HV_STORE_f32(total + i, HV_LOAD_f32(total + i) operator HV_LOAD_##kind(r + i)))      \
        HV_INDEPENDENT                                                                           \
        for (; i < count; i++)                                                                   \
            total[i] = total[i] operator hv_##kind##_to_f32(r[i]);                               \
    }

HV_CONVERT_HALF(f16)
HV_CONVERT_HALF(bf16)
HV_COMBINE_HALF(sum, f16, +)
HV_COMBINE_HALF(product, f16, *)
HV_COMBINE_HALF(sum, bf16, +)
HV_COMBINE_HALF(product, bf16, *)

static void HV_NAME(widen)(int brain, float *out, const void *in, size_t count)
{
    if (brain)
        HV_NAME(widen_bf16)(out, in, count);
    else
        HV_NAME(widen_f16)(out, in, count);
}

static void HV_NAME(narrow)(int brain, void *out, const float *in, size_t count)
{
    if (brain)
        HV_NAME(narrow_bf16)(out, in, count);
    else
        HV_NAME(narrow_f16)(out, in, count);
}

/* ---------------------------------------------------------------- x[i] / divisor, x[i] * factor */

#define HV_IN_PLACE(name, T, Argument, Parameter, expression)                                    \
    static void HV_NAME(name##_##T)(void *data, size_t count, Argument argument)                 \
    {                                                                                            \
        T *x = data;                                                                             \
        const Parameter y = (Parameter)argument;                                                 \
        HV_INDEPENDENT                                                                           \
        for (size_t i = 0; i < count; i++)                                                       \
            x[i] = (T)(expression);                                                              \
    }

/* Up to 32 bits the rounded quotient of doubles never reaches the next integer (that is 2^-32 away,
 * relatively), so truncating it is exact; and it vectorises, which integer division does not. */
#define HV_SCALE_INTEGER(T, divide_in, quotient)                                                 \
    HV_IN_PLACE(divide, T, uint64_t, divide_in, quotient)                                        \
    HV_IN_PLACE(multiply, T, double, double, hv_clip_##T((double)x[i] * y))

HV_SCALE_INTEGER(hv_u8, double, (int32_t)(x[i] / y))
HV_SCALE_INTEGER(hv_i8, double, (int32_t)(x[i] / y))
HV_SCALE_INTEGER(hv_u16, double, (int32_t)(x[i] / y))
HV_SCALE_INTEGER(hv_i16, double, (int32_t)(x[i] / y))
HV_SCALE_INTEGER(hv_u32, double, (uint32_t)(x[i] / y))
HV_SCALE_INTEGER(hv_i32, double, (int32_t)(x[i] / y))
HV_SCALE_INTEGER(hv_u64, uint64_t, x[i] / y)
HV_SCALE_INTEGER(hv_i64, int64_t, x[i] / y)
HV_IN_PLACE(divide, hv_f32, uint64_t, float, x[i] / y)
HV_IN_PLACE(divide, hv_f64, uint64_t, double, x[i] / y)
HV_IN_PLACE(multiply, hv_f32, double, float, x[i] * y)
HV_IN_PLACE(multiply, hv_f64, double, double, x[i] * y)

/* -------------------------------------------------------------------------- float32 <-> float64 */

static void HV_NAME(f64_to_f32)(void *out, const void *in, size_t count)
{
    hv_f32 *o = out;
    const hv_f64 *x = in;
    for (size_t i = 0; i < count; i++)
        o[i] = (float)x[i];
}

static void HV_NAME(f32_to_f64)(void *out, const void *in, size_t count)
{
    hv_f64 *o = out;
    const hv_f32 *x = in;
    for (size_t i = 0; i < count; i++)
        o[i] = x[i];
}

/* ------------------------------------------------------------------------------------ the table */

#define HV_ROW(sum, min, max, product)                                                           \
    { HV_NAME(sum), HV_NAME(min), HV_NAME(max), HV_NAME(product) }

static const hv_variant HV_NAME(variant) = {
    .name = HV_VARIANT,
    .copy = HV_NAME(copy),
    .copy_past = HV_NAME(copy_past),
    .combine = {
        [HV_BOOL] = HV_ROW(or_bool, and_bool, or_bool, and_bool),
        [HV_U8] = HV_ROW(sum_hv_u8, min_hv_u8, max_hv_u8, product_hv_u8),
        [HV_I8] = HV_ROW(sum_hv_u8, min_hv_i8, max_hv_i8, product_hv_u8),
        [HV_U16] = HV_ROW(sum_hv_u16, min_hv_u16, max_hv_u16, product_hv_u16),
        [HV_I16] = HV_ROW(sum_hv_u16, min_hv_i16, max_hv_i16, product_hv_u16),
        [HV_U32] = HV_ROW(sum_hv_u32, min_hv_u32, max_hv_u32, product_hv_u32),
        [HV_I32] = HV_ROW(sum_hv_u32, min_hv_i32, max_hv_i32, product_hv_u32),
        [HV_U64] = HV_ROW(sum_hv_u64, min_hv_u64, max_hv_u64, product_hv_u64),
        [HV_I64] = HV_ROW(sum_hv_u64, min_hv_i64, max_hv_i64, product_hv_u64),
        [HV_F16] = HV_ROW(sum_f16, min_f16, max_f16, product_f16),
        [HV_BF16] = HV_ROW(sum_bf16, min_bf16, max_bf16, product_bf16),
        [HV_F32] = HV_ROW(sum_hv_f32, min_hv_f32, max_hv_f32, product_hv_f32),
        [HV_F64] = HV_ROW(sum_hv_f64, min_hv_f64, max_hv_f64, product_hv_f64),
        /* The sum is that of twice as many real numbers. */
        [HV_C64] = { [HV_PRODUCT] = HV_NAME(product_complex64) },
        [HV_C128] = { [HV_PRODUCT] = HV_NAME(product_complex128) },
    },
    .accumulate = {
        { [HV_SUM] = HV_NAME(sum_into_f32_f16), [HV_PRODUCT] = HV_NAME(product_into_f32_f16) },
        { [HV_SUM] = HV_NAME(sum_into_f32_bf16), [HV_PRODUCT] = HV_NAME(product_into_f32_bf16) },
    },
    .divide = {
        [HV_U8] = HV_NAME(divide_hv_u8), [HV_I8] = HV_NAME(divide_hv_i8),
        [HV_U16] = HV_NAME(divide_hv_u16), [HV_I16] = HV_NAME(divide_hv_i16),
        [HV_U32] = HV_NAME(divide_hv_u32), [HV_I32] = HV_NAME(divide_hv_i32),
        [HV_U64] = HV_NAME(divide_hv_u64), [HV_I64] = HV_NAME(divide_hv_i64),
        [HV_F32] = HV_NAME(divide_hv_f32), [HV_F64] = HV_NAME(divide_hv_f64),
    },
    .multiply = {
        [HV_U8] = HV_NAME(multiply_hv_u8), [HV_I8] = HV_NAME(multiply_hv_i8),
        [HV_U16] = HV_NAME(multiply_hv_u16), [HV_I16] = HV_NAME(multiply_hv_i16),
        [HV_U32] = HV_NAME(multiply_hv_u32), [HV_I32] = HV_NAME(multiply_hv_i32),
        [HV_U64] = HV_NAME(multiply_hv_u64), [HV_I64] = HV_NAME(multiply_hv_i64),
        [HV_F32] = HV_NAME(multiply_hv_f32), [HV_F64] = HV_NAME(multiply_hv_f64),
    },
    .widen = HV_NAME(widen),
    .narrow = HV_NAME(narrow),
    .f64_to_f32 = HV_NAME(f64_to_f32),
    .f32_to_f64 = HV_NAME(f32_to_f64),
};

#undef HV_ROW
#undef HV_SCALE_INTEGER
#undef HV_IN_PLACE
#undef HV_COMBINE_HALF
#undef HV_BY_PAIRS_bf16
#undef HV_ROUND
#undef HV_HIGH
#undef HV_LOW
#undef HV_WIDE
#undef HV_COMBINE_PAIR
#undef HV_SECOND_NAN
#undef HV_BY_PAIRS_f16
#undef HV_CONVERT_HALF
#undef HV_BY_LANES_bf16
#undef HV_BY_LANES_f16
#undef HV_STORE_f16
#undef HV_LOAD_f16
#undef HV_STORE_f32
#undef HV_LOAD_f32
#undef HV_ANY_NAN
#undef HV_FLOATS
#undef HV_LANES
#undef HV_COMBINE_KEYS
#undef HV_COMBINE_COMPLEX
#undef HV_COMBINE_FLOAT
#undef HV_COMBINE_ORDERED
#undef HV_COMBINE_MODULAR
#undef HV_COMBINE
#undef HV_COPY_LINE_PAST
#undef HV_PAST
#undef HV_VECTOR
