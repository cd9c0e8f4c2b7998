/* Element types, and what the kernels do to a single element: without branches, to be vectorised. */
#ifndef HVDKIT_SCALARS_H
#define HVDKIT_SCALARS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Buffers may begin anywhere and hold any type. */
#define HV_ELEMENT __attribute__((aligned(1), may_alias))
typedef uint8_t hv_u8 HV_ELEMENT;
typedef int8_t hv_i8 HV_ELEMENT;
typedef uint16_t hv_u16 HV_ELEMENT;
typedef int16_t hv_i16 HV_ELEMENT;
typedef uint32_t hv_u32 HV_ELEMENT;
typedef int32_t hv_i32 HV_ELEMENT;
typedef uint64_t hv_u64 HV_ELEMENT;
typedef int64_t hv_i64 HV_ELEMENT;
typedef float hv_f32 HV_ELEMENT;
typedef double hv_f64 HV_ELEMENT;

/* The last few hundred bytes of a copy.  The compiler would put a string instruction here for
 * memcpy, at the price of tens of nanoseconds for the smallest messages. */
static inline void hv_copy_tail(uint8_t *out, const uint8_t *in, size_t bytes)
{
    for (; bytes >= 16; out += 16, in += 16, bytes -= 16) {
        memcpy(out, in, 16);
        __asm__ volatile("" ::: "memory");
    }
    if (bytes & 8)
        memcpy(out, in, 8), out += 8, in += 8;
    if (bytes & 4)
        memcpy(out, in, 4), out += 4, in += 4;
    if (bytes & 2)
        memcpy(out, in, 2), out += 2, in += 2;
    if (bytes & 1)
        *out = *in;
}

static inline uint32_t hv_bits_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float hv_float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

#if defined(__aarch64__)
static inline float hv_f16_to_f32(uint16_t half)
{
    __fp16 x;
    memcpy(&x, &half, sizeof x);
    return (float)x;
}

static inline uint16_t hv_f32_to_f16(float x)
{
    const __fp16 half = (__fp16)x;
    uint16_t bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}
#else
/* After F. Giesen, "float->half variants": exact, also for subnormals and where the FPU flushes
 * those to zero.  NaNs become quiet and keep their upper payload, as the hardware does it. */
static inline float hv_f16_to_f32(uint16_t half)
{
    const uint32_t magnitude = half & 0x7fffu, sign = (uint32_t)(half & 0x8000u) << 16;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const float subnormal = hv_float_of_bits((magnitude << 13) + (113u << 23)) - 0x1p-14f;
    const uint32_t special = (magnitude << 13) | 0x7f800000u | (magnitude > 0x7c00u ? 1u << 22 : 0);
    const uint32_t bits = magnitude >= 0x7c00u  ? special
                          : magnitude < 0x0400u ? hv_bits_of_float(subnormal)
                                                : normal;
    return hv_float_of_bits(bits | sign);
}

static inline uint16_t hv_f32_to_f16(float x)
{
    const uint32_t bits = hv_bits_of_float(x), sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t nan = 0x7e00u | (magnitude >> 13 & 0x03ffu);
    const uint32_t special = magnitude > 0x7f800000u ? nan : 0x7c00u;
    /* Adding 0.5 leaves the subnormal's bits, rounded to nearest even, at the end of the mantissa. */
    const uint32_t subnormal =
        hv_bits_of_float(hv_float_of_bits(magnitude) + 0.5f) - hv_bits_of_float(0.5f);
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t rounded = magnitude >= (143u << 23)  ? special
                             : magnitude < (113u << 23) ? subnormal
                                                        : normal;
    return (uint16_t)(rounded | sign);
}
#endif

static inline float hv_bf16_to_f32(uint16_t half) { return hv_float_of_bits((uint32_t)half << 16); }

/* Orders 16-bit floats as integers, with both zeros equal. */
static inline int16_t hv_sign_magnitude_key(uint16_t x)
{
    const int16_t sign = (int16_t)((int16_t)x >> 15), magnitude = (int16_t)(x & 0x7fff);
    return (int16_t)((magnitude ^ sign) - sign);
}

/* To nearest even, in the upper 16 bits, with anything below; every NaN becomes the quiet one of
 * its sign, as in ml_dtypes. */
static inline uint32_t hv_round_to_bf16(float x)
{
    const uint32_t bits = hv_bits_of_float(x);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    const uint32_t nan = (bits & 0x80000000u) | 0x7fc00000u;
    return x != x ? nan : rounded;
}

static inline uint16_t hv_f32_to_bf16(float x) { return (uint16_t)(hv_round_to_bf16(x) >> 16); }

/* Truncate toward zero; what does not fit becomes the nearest that does, and NaN becomes 0.  (C
 * leaves both undefined.)  `bound` is the first double beyond the largest value. */
#define HV_CLIP(T, low, high, bound)                                                             \
    static inline T hv_clip_##T(double x)                                                        \
    {                                                                                            \
        return x != x ? 0 : x <= (double)(low) ? (low) : x >= (bound) ? (high) : (T)x;           \
    }
HV_CLIP(hv_u8, 0, UINT8_MAX, 0x1p8)
HV_CLIP(hv_i8, INT8_MIN, INT8_MAX, 0x1p7)
HV_CLIP(hv_u16, 0, UINT16_MAX, 0x1p16)
HV_CLIP(hv_i16, INT16_MIN, INT16_MAX, 0x1p15)
HV_CLIP(hv_u32, 0, UINT32_MAX, 0x1p32)
HV_CLIP(hv_i32, INT32_MIN, INT32_MAX, 0x1p31)
HV_CLIP(hv_u64, 0, UINT64_MAX, 0x1p64)
HV_CLIP(hv_i64, INT64_MIN, INT64_MAX, 0x1p63)

#endif
