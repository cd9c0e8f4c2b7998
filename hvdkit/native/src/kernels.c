/* Chooses a variant of the loops once, and builds the reductions of many sources from them. */
#include "kernels.h"

#include "scalars.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Tells the compiler that iterations are independent: a destination is a source or apart from all.
 * Without it a run-time overlap check would send the in-place case to the scalar loop. */
#if defined(__clang__)
#define HV_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define HV_INDEPENDENT _Pragma("GCC ivdep")
#endif

enum { HV_CHUNK = 256,    /* 16-bit floats widened at a time */
       HV_BLOCK = 8192 }; /* bytes of an accumulator that stays in the innermost cache */

typedef struct {
    const char *name;
    void (*copy)(void *, const void *, size_t);
    void (*copy_past)(void *, const void *, size_t);
    void (*combine[HV_DTYPES][HV_OPS])(void *, const void *, const void *, size_t);
    void (*accumulate[2][HV_OPS])(float *, const void *, size_t);
    void (*divide[HV_DTYPES])(void *, size_t, uint64_t);
    void (*multiply[HV_DTYPES])(void *, size_t, double);
    void (*widen)(int, float *, const void *, size_t);
    void (*narrow)(int, void *, const float *, size_t);
    void (*f64_to_f32)(void *, const void *, size_t);
    void (*f32_to_f64)(void *, const void *, size_t);
} hv_variant;

/* ------------------------------------------------------------------------------------- variants */

#define HV_LEVEL 0
#define HV_VARIANT "baseline"
#define HV_NAME(x) x##_baseline
#include "kernels_variant.h"
#undef HV_LEVEL
#undef HV_VARIANT
#undef HV_NAME

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define HV_LEVEL 1
#define HV_VARIANT "avx2"
#define HV_NAME(x) x##_avx2
#include "kernels_variant.h"
#undef HV_LEVEL
#undef HV_VARIANT
#undef HV_NAME
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                                    \
    __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define HV_LEVEL 2
#define HV_VARIANT "avx512"
#define HV_NAME(x) x##_avx512
#include "kernels_variant.h"
#undef HV_LEVEL
#undef HV_VARIANT
#undef HV_NAME
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

/* From the plainest to the best. */
static const hv_variant *const all_variants[] = {
    &variant_baseline,
#if defined(__x86_64__)
    &variant_avx2,
    &variant_avx512,
#endif
};

static const hv_variant *active = &variant_baseline;

size_t hv_variant_count(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c"))
        return 1;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 2;
#endif
    return sizeof all_variants / sizeof *all_variants;
}

const char *hv_variant_at(size_t index) { return all_variants[index]->name; }

const char *hv_variant_name(void) { return active->name; }

int hv_variant_select(const char *name)
{
    for (size_t i = 0; i < hv_variant_count(); i++)
        if (!strcmp(all_variants[i]->name, name)) {
            active = all_variants[i];
            return 1;
        }
    return 0;
}

/* ------------------------------------------------------------------------ dtypes and operations */

int hv_op_of_code(long code)
{
    switch (code) {
    case 0: /* Average: its division belongs to the end of the collective */
    case 1:
        return HV_SUM;
    case 3:
        return HV_MIN;
    case 4:
        return HV_MAX;
    case 5:
        return HV_PRODUCT;
    default:
        return -1;
    }
}

size_t hv_itemsize(long dtype)
{
    static const uint8_t sizes[HV_DTYPES] = { 1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 8, 16 };
    return dtype >= 0 && dtype < HV_DTYPES ? sizes[dtype] : 0;
}

static inline int is_complex(enum hv_dtype dtype) { return dtype == HV_C64 || dtype == HV_C128; }

static inline int is_half(enum hv_dtype dtype) { return dtype == HV_F16 || dtype == HV_BF16; }

int hv_is_defined(enum hv_dtype dtype, enum hv_op op)
{
    return !is_complex(dtype) || op == HV_SUM || op == HV_PRODUCT;
}

void hv_copy(void *dst, const void *src, size_t bytes) { active->copy(dst, src, bytes); }

void hv_copy_past(void *dst, const void *src, size_t bytes) { active->copy_past(dst, src, bytes); }

/* Sums and scalings of complex numbers are those of twice as many real ones. */
static inline enum hv_dtype real_parts(enum hv_dtype dtype, size_t *count)
{
    if (!is_complex(dtype))
        return dtype;
    *count *= 2;
    return dtype == HV_C64 ? HV_F32 : HV_F64;
}

void hv_combine(enum hv_dtype dtype, enum hv_op op, void *out, const void *a, const void *b,
                size_t count)
{
    if (op == HV_SUM)
        dtype = real_parts(dtype, &count);
    active->combine[dtype][op](out, a, b, count);
}

void hv_scale(enum hv_dtype dtype, void *data, size_t count, uint64_t divisor, double factor)
{
    if (divisor == 1 && factor == 1.0)
        return;
    dtype = real_parts(dtype, &count);
    if (is_half(dtype)) {
        float wide[HV_CHUNK];
        char *x = data;
        for (size_t done = 0, m; done < count; done += m) {
            m = count - done < HV_CHUNK ? count - done : HV_CHUNK;
            active->widen(dtype == HV_BF16, wide, x + 2 * done, m);
            hv_scale(HV_F32, wide, m, divisor, factor);
            active->narrow(dtype == HV_BF16, x + 2 * done, wide, m);
        }
        return;
    }
    if (divisor != 1)
        active->divide[dtype](data, count, divisor);
    if (factor != 1.0)
        active->multiply[dtype](data, count, factor);
}

int hv_convert(enum hv_dtype to, void *dst, enum hv_dtype from, const void *src, size_t count)
{
    if (to == from)
        active->copy(dst, src, count * hv_itemsize(to));
    else if (to == HV_F32 && is_half(from))
        active->widen(from == HV_BF16, dst, src, count);
    else if (is_half(to) && from == HV_F32)
        active->narrow(to == HV_BF16, dst, src, count);
    else if (to == HV_F32 && from == HV_F64)
        active->f64_to_f32(dst, src, count);
    else if (to == HV_F64 && from == HV_F32)
        active->f32_to_f64(dst, src, count);
    else if (is_half(to) && is_half(from)) {
        float wide[HV_CHUNK];
        for (size_t done = 0, m; done < count; done += m) {
            m = count - done < HV_CHUNK ? count - done : HV_CHUNK;
            active->widen(from == HV_BF16, wide, (const char *)src + 2 * done, m);
            active->narrow(to == HV_BF16, (char *)dst + 2 * done, wide, m);
        }
    } else
        return 0;
    return 1;
}

/* ------------------------------------------------------------------- reductions of many sources */

/* Sums and products of 16-bit floats: `wide` holds the float32 total, rounded once into dst. */
static void reduce_block_wide(const hv_recipe *recipe, float *wide, void *dst,
                              const void *const *srcs, size_t src_count, size_t at, size_t count)
{
    const int brain = recipe->dtype == HV_BF16;
    float scaled[HV_CHUNK];
    active->widen(brain, wide, (const char *)srcs[0] + at, count);
    if (recipe->prescale != 1.0)
        hv_scale(HV_F32, wide, count, 1, recipe->prescale);
    for (size_t s = 1; s < src_count; s++) {
        const char *src = (const char *)srcs[s] + at;
        if (recipe->prescale == 1.0) {
            active->accumulate[brain][recipe->op](wide, src, count);
            continue;
        }
        for (size_t done = 0, m; done < count; done += m) {
            m = count - done < HV_CHUNK ? count - done : HV_CHUNK;
            active->widen(brain, scaled, src + 2 * done, m);
            hv_scale(HV_F32, scaled, m, 1, recipe->prescale);
            hv_combine(HV_F32, recipe->op, wide + done, wide + done, scaled, m);
        }
    }
    hv_scale(HV_F32, wide, count, recipe->divisor, recipe->postscale);
    active->narrow(brain, dst, wide, count);
}

/* The others.  `total` is apart from all buffers, since a destination may be a source that is still
 * to be read; only the last step writes to dst. */
static void reduce_block(const hv_recipe *recipe, void *total, void *dst, const void *const *srcs,
                         size_t src_count, size_t at, size_t count)
{
    const enum hv_dtype dtype = recipe->dtype;
    const size_t bytes = count * hv_itemsize(dtype);
    const void *left = (const char *)srcs[0] + at;
    char scaled[HV_BLOCK];
    if (recipe->prescale != 1.0 || src_count == 1) {
        void *first = src_count == 1 ? dst : total;
        if (first != left)
            active->copy(first, left, bytes);
        hv_scale(dtype, first, count, 1, recipe->prescale);
        left = first;
    }
    for (size_t s = 1; s < src_count; s++) {
        const void *right = (const char *)srcs[s] + at;
        void *out = s + 1 == src_count ? dst : total;
        if (recipe->prescale != 1.0) {
            active->copy(scaled, right, bytes);
            hv_scale(dtype, scaled, count, 1, recipe->prescale);
            right = scaled;
        }
        hv_combine(dtype, recipe->op, out, left, right, count);
        left = out;
    }
    hv_scale(dtype, dst, count, recipe->divisor, recipe->postscale);
}

void hv_reduce_many(const hv_recipe *recipe, void *const *dsts, size_t dst_count,
                    const void *const *srcs, size_t src_count, size_t count)
{
    const enum hv_dtype dtype = recipe->dtype;
    const int plain = recipe->prescale == 1.0 && recipe->divisor == 1 && recipe->postscale == 1.0;
    if (plain && src_count == 2 && dst_count == 1) {
        hv_combine(dtype, recipe->op, dsts[0], srcs[0], srcs[1], count);
        return;
    }
    const int wide = is_half(dtype) && (recipe->op == HV_SUM || recipe->op == HV_PRODUCT) &&
                     !(plain && src_count <= 2);
    const size_t itemsize = hv_itemsize(dtype);
    const size_t block = HV_BLOCK / (wide ? sizeof(float) : itemsize);
    float total[HV_BLOCK / sizeof(float)] __attribute__((aligned(64)));
    for (size_t done = 0, m; done < count; done += m) {
        m = count - done < block ? count - done : block;
        const size_t at = done * itemsize;
        char *dst = (char *)dsts[0] + at;
        if (wide)
            reduce_block_wide(recipe, total, dst, srcs, src_count, at, m);
        else
            reduce_block(recipe, total, dst, srcs, src_count, at, m);
        for (size_t d = 1; d < dst_count; d++)
            active->copy((char *)dsts[d] + at, dst, m * itemsize);
    }
}
