/* See operations.h. */
#include "operations.h"

#include <sched.h>
#include <string.h>

/* ------------------------------------------------------------------------------ data and delays */

static uint64_t next_random(uint64_t *state) /* splitmix64 */
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

size_t pick(uint64_t *state, size_t choices) { return next_random(state) % choices; }

void delay(rank_state *r)
{
    const size_t kind = pick(&r->own, 24);
    if (kind == 0)
        usleep((useconds_t)pick(&r->own, 400));
    else if (kind < 4)
        sched_yield();
}

/* What `rank` contributes: small whole numbers, whose sums and products are exact in any dtype. */
static int value(uint64_t step, int rank, size_t i)
{
    uint64_t state = step * 1000003 + (uint64_t)rank * 10007 + i;
    return (int)(next_random(&state) % 5) - 2;
}

static void put(enum hv_dtype dtype, void *array, size_t i, int number)
{
    const float single = (float)number;
    const double pair[] = { number, -number }, real = number;
    const uint8_t byte = (uint8_t)number;
    const int64_t whole = number;
    const size_t bytes = hv_itemsize(dtype);
    char *to = (char *)array + i * bytes;
    if (dtype == HV_C128)
        memcpy(to, pair, bytes);
    else if (dtype == HV_F64)
        memcpy(to, &real, bytes);
    else if (dtype == HV_I64)
        memcpy(to, &whole, bytes);
    else if (dtype == HV_U8)
        *to = (char)byte;
    else
        hv_convert(dtype, to, HV_F32, &single, 1);
}

static int combined(enum hv_op op, uint64_t step, int size, size_t i)
{
    int total = value(step, 0, i);
    for (int rank = 1; rank < size; rank++) {
        const int x = value(step, rank, i);
        total = op == HV_SUM ? total + x
                : op == HV_PRODUCT ? total * x
                : (op == HV_MIN) == (x < total) ? x
                                                 : total;
    }
    return total;
}

/* A new buffer that ends where its allocation ends. */
static char *take(rank_state *r, int which, size_t bytes)
{
    free(r->held[which]);
    r->held[which] = malloc(bytes + r->shift + 1);
    CHECK(r, r->held[which]);
    r->held[which] = realloc(r->held[which], bytes + r->shift ? bytes + r->shift : 1);
    memset(r->held[which], 0x5a, bytes + r->shift);
    return r->held[which] + r->shift;
}

static char *copy_of(rank_state *r, int which, const char *from, size_t bytes)
{
    return memcpy(take(r, which, bytes), from, bytes);
}

static char *bytes_of(rank_state *r, int which, int rank, size_t bytes)
{
    char *data = take(r, which, bytes);
    for (size_t i = 0; i < bytes; i++)
        data[i] = (char)value(r->step, rank, i);
    return data;
}

/* ------------------------------------------------------------------------------- one of each op */

static uint64_t signature(const rank_state *r)
{
    return r->step << 1 | (r->mismatch && r->arena.rank == r->arena.size - 1);
}

/* The destination holds the answer, or after a mismatch what it held before. */
static int checked(rank_state *r, int status, const char *dst, const char *before,
                   const char *want, size_t bytes)
{
    if (status == HV_OK)
        CHECK(r, !memcmp(dst, want, bytes));
    if (status == HV_MISMATCH)
        CHECK(r, !memcmp(dst, before, bytes));
    return status;
}

static hv_recipe random_recipe(rank_state *r)
{
    static const enum hv_dtype dtypes[] = { HV_F32, HV_U8,  HV_F16, HV_BF16,
                                            HV_F64, HV_I64, HV_C128 };
    static const enum hv_op ops[] = { HV_SUM, HV_SUM, HV_MIN, HV_MAX, HV_PRODUCT };
    hv_recipe recipe = { dtypes[pick(&r->same, 7)], ops[pick(&r->same, 5)], 1.0, 1, 1.0 };
    /* The wrapped bytes and the pairs have no order here; among floats, 0 times -1 is -0. */
    if (recipe.dtype == HV_U8 || recipe.dtype == HV_C128 ||
        (recipe.op == HV_PRODUCT && recipe.dtype != HV_I64))
        recipe.op = HV_SUM;
    else if (recipe.op == HV_SUM && recipe.dtype != HV_I64 && pick(&r->same, 3) == 0) {
        recipe.prescale = 4.0;
        recipe.divisor = 2;
        recipe.postscale = 0.5;
    }
    return recipe;
}

/* where: 0 apart, 1 in place, 2 in the region, 3 there on some ranks, 4 there at unequal places */
static int try_allreduce(rank_state *r, size_t bytes, int where)
{
    const hv_recipe recipe = random_recipe(r);
    const int rank = r->arena.rank, size = r->arena.size;
    const size_t itemsize = hv_itemsize(recipe.dtype), count = bytes / itemsize;
    bytes = count * itemsize;
    char *src = take(r, 0, bytes), *want = take(r, 1, bytes), *dst = src;
    if (where == 0)
        dst = take(r, 2, bytes);
    if (where == 2 || where == 4 || (where == 3 && rank % 2))
        src = dst = r->region + (size_t)rank * STRIDE + (where == 4 ? 16 * (size_t)rank : 64);
    for (size_t i = 0; i < count; i++) {
        put(recipe.dtype, src, i, value(r->step, rank, i));
        put(recipe.dtype, want, i, combined(recipe.op, r->step, size, i));
    }
    const char *before = copy_of(r, 3, dst, bytes);
    delay(r);
    const int status = hv_allreduce(&r->arena, src, dst, count, &recipe, signature(r));
    return checked(r, status, dst, before, want, bytes);
}

static size_t uneven(size_t unit, int rank)
{
    return unit * (((size_t)rank + 1) % 3) + (size_t)rank;
}

static int try_reducescatter(rank_state *r, size_t unit, int in_place)
{
    const hv_recipe recipe = random_recipe(r);
    const size_t itemsize = hv_itemsize(recipe.dtype);
    size_t counts[MAX_RANKS], count = 0, first = 0;
    for (int rank = 0; rank < r->arena.size; count += counts[rank++]) {
        counts[rank] = uneven(unit / itemsize, rank);
        if (rank == r->arena.rank)
            first = count;
    }
    const size_t own = counts[r->arena.rank];
    char *src = take(r, 0, count * itemsize), *want = take(r, 1, own * itemsize);
    char *dst = in_place ? src + first * itemsize : take(r, 2, own * itemsize);
    for (size_t i = 0; i < count; i++)
        put(recipe.dtype, src, i, value(r->step, r->arena.rank, i));
    for (size_t i = 0; i < own; i++)
        put(recipe.dtype, want, i, combined(recipe.op, r->step, r->arena.size, first + i));
    const char *before = copy_of(r, 3, dst, own * itemsize);
    delay(r);
    const int status = hv_reducescatter(&r->arena, src, dst, counts, &recipe, signature(r));
    return checked(r, status, dst, before, want, own * itemsize);
}

static int try_broadcast(rank_state *r, size_t bytes)
{
    const int root = (int)pick(&r->same, (size_t)r->arena.size);
    const char *want = bytes_of(r, 1, root, bytes);
    char *data = bytes_of(r, 0, r->arena.rank, bytes);
    const char *before = copy_of(r, 3, data, bytes);
    delay(r);
    const int status = hv_broadcast(&r->arena, data, bytes, root, signature(r));
    return checked(r, status, data, before, want, bytes);
}

static int try_allgather(rank_state *r, size_t unit, int in_place)
{
    size_t counts[MAX_RANKS], total = 0, first = 0;
    for (int rank = 0; rank < r->arena.size; total += counts[rank++]) {
        counts[rank] = uneven(unit, rank);
        if (rank == r->arena.rank)
            first = total;
    }
    char *want = take(r, 1, total), *dst = take(r, 2, total), *to = want;
    for (int rank = 0; rank < r->arena.size; to += counts[rank++])
        for (size_t i = 0; i < counts[rank]; i++)
            to[i] = (char)value(r->step, rank, i);
    const char *src = copy_of(r, 0, want + first, counts[r->arena.rank]);
    if (in_place)
        src = memcpy(dst + first, src, counts[r->arena.rank]);
    const char *before = copy_of(r, 3, dst, total);
    delay(r);
    const int status = hv_allgather(&r->arena, src, dst, counts, signature(r));
    return checked(r, status, dst, before, want, total);
}

static size_t pair_bytes(size_t unit, int from, int to)
{
    return unit * (size_t)((from + 2 * to) % 3) + (size_t)(from + to);
}

static int try_alltoall(rank_state *r, size_t unit)
{
    const int me = r->arena.rank, size = r->arena.size;
    size_t sent[MAX_RANKS], received[MAX_RANKS], out = 0, in = 0;
    for (int rank = 0; rank < size; rank++) {
        out += sent[rank] = pair_bytes(unit, me, rank);
        in += received[rank] = pair_bytes(unit, rank, me);
    }
    char *src = take(r, 0, out), *want = take(r, 1, in), *dst = take(r, 2, in);
    char *from = src, *to = want;
    for (int rank = 0; rank < size; rank++) { /* a pair's data is that of rank 5 * from + to */
        for (size_t i = 0; i < sent[rank]; i++)
            *from++ = (char)value(r->step, MAX_RANKS * me + rank, i);
        for (size_t i = 0; i < received[rank]; i++)
            *to++ = (char)value(r->step, MAX_RANKS * rank + me, i);
    }
    const char *before = copy_of(r, 3, dst, in);
    delay(r);
    const int status = hv_alltoall(&r->arena, src, dst, sent, received, 2 * unit + 2 * MAX_RANKS,
                                   signature(r));
    return checked(r, status, dst, before, want, in);
}

static int try_exchange(rank_state *r, size_t bytes)
{
    bytes = bytes < r->arena.slot_bytes ? bytes : r->arena.slot_bytes;
    const char *own = bytes_of(r, 0, r->arena.rank, bytes);
    const int status = hv_exchange(&r->arena, own, bytes, signature(r));
    for (int rank = 0; status == HV_OK && rank < r->arena.size; rank++) {
        const hv_slot *slot = hv_slot_of(&r->arena, rank, 0);
        CHECK(r, slot->length == bytes);
        CHECK(r, !memcmp(slot->payload, bytes_of(r, 1, rank, bytes), bytes));
    }
    return status;
}

void next_step(rank_state *r, int mismatch)
{
    r->step++;
    r->mismatch = mismatch && r->arena.size > 1;
    r->shift = pick(&r->same, 2) ? pick(&r->same, 16) : 0;
}

int try_any(rank_state *r, int kind, size_t bytes, int in_regions)
{
    const int in_place = (int)pick(&r->same, 2), where = (int)pick(&r->same, in_regions ? 5 : 2);
    switch (kind) {
    case 0:
        return try_broadcast(r, bytes);
    case 1:
        return try_allgather(r, bytes, in_place);
    case 2:
        return try_reducescatter(r, bytes, in_place);
    case 3:
        return try_alltoall(r, bytes);
    case 4:
        return try_exchange(r, bytes);
    case 5:
        return hv_barrier(&r->arena, signature(r));
    default:
        return try_allreduce(r, bytes, where);
    }
}

size_t length_at(const rank_state *r, size_t index)
{
    const size_t slot = r->arena.slot_bytes, small = hv_small_limit(&r->arena);
    const size_t sizes[LENGTHS] = {
        0,        1,    33,        small - 16, small,        small + 16,
        slot - 1, slot, slot + 16, 1000,       2 * slot + 7, 5 * slot + 48,
    };
    const size_t bytes = sizes[index];
    return bytes < STRIDE - 256 ? bytes : STRIDE - 256;
}
