/* Reduction, scaling, conversion and copying of arrays of every dtype that hvdkit carries.
 *
 * Plain C without Python, so that the arena and the tests of the arena can be built from it alone.
 * No function here allocates, blocks or fails: the caller has checked dtype, operation and sizes.
 * Buffers may have any alignment.  A destination is either identical to a source or apart from it.
 */
#ifndef HVDKIT_KERNELS_H
#define HVDKIT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* The positions in hvdkit.dtypes.DTYPES. */
enum hv_dtype {
    HV_BOOL, HV_U8, HV_I8, HV_U16, HV_I16, HV_U32, HV_I32, HV_U64, HV_I64,
    HV_F16, HV_BF16, HV_F32, HV_F64, HV_C64, HV_C128, HV_DTYPES
};

enum hv_op { HV_SUM, HV_MIN, HV_MAX, HV_PRODUCT, HV_OPS };

/* What an all-reduce does to its sources: each times prescale, then op over all of them in order,
 * then divided by divisor, then times postscale.  Factors of one are skipped. */
typedef struct {
    enum hv_dtype dtype;
    enum hv_op op;
    double prescale;
    uint64_t divisor;
    double postscale;
} hv_recipe;

/* The operation of a hvdkit.dtypes.ReduceOp value, or -1 if there is none of that value. */
int hv_op_of_code(long code);

/* Bytes of an element, or 0 for an unknown dtype code. */
size_t hv_itemsize(long dtype);

/* Whether op is defined for dtype (complex numbers have no order). */
int hv_is_defined(enum hv_dtype dtype, enum hv_op op);

/* out = op(a, b), element by element; 16-bit floats are computed in float32 and rounded once. */
void hv_combine(enum hv_dtype dtype, enum hv_op op, void *out, const void *a, const void *b,
                size_t count);

/* Write recipe(sources in order) to every destination.  16-bit floats accumulate in float32 over
 * all sources and are rounded once.  The result of an element depends on nothing but the sources'
 * elements and their order: not on count, alignment, or the variant in use. */
void hv_reduce_many(const hv_recipe *recipe, void *const *dsts, size_t dst_count,
                    const void *const *srcs, size_t src_count, size_t count);

/* Divide by divisor and multiply by factor, in place. Not defined for bool. */
void hv_scale(enum hv_dtype dtype, void *data, size_t count, uint64_t divisor, double factor);

/* Convert between float16, bfloat16, float32 and float64; 0 if the pair is unknown. */
int hv_convert(enum hv_dtype to, void *dst, enum hv_dtype from, const void *src, size_t count);

/* Copy without libc's memcpy: for large pieces that is `rep movsb`, which some cores run at a
 * quarter of the speed when source and destination differ in their offset within a page. */
void hv_copy(void *dst, const void *src, size_t bytes);

/* Copy past the caches, to a destination that is too large to stay in them. */
void hv_copy_past(void *dst, const void *src, size_t bytes);

/* The variant in use ("baseline", "avx2", "avx512"), and the names of those that run here. */
const char *hv_variant_name(void);
size_t hv_variant_count(void);
const char *hv_variant_at(size_t index);
int hv_variant_select(const char *name);

#endif
