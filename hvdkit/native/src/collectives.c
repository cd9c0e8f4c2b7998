/* The collectives of the arena, as sequences of the rounds of arena.c.
 *
 * Reductions take the ranks' contributions in rank order, whatever the path: an element's result
 * depends on the inputs alone, and is the same on every rank.
 */
#if defined(__linux__)
#include "arena.h"

enum {
    /* Up to this many bytes, divided by the number of peers, every rank reduces all of an all-reduce
     * in one round.  Measured: on two ranks with cores of their own, the piecewise way with its two
     * rounds is as fast from 8 KiB on; on four ranks on two cores, one round is faster to 16 KiB. */
    SMALL_ALLREDUCE = 32768,
    MIN_IN_REGION = 1024, /* a smaller one is no faster in place, for it takes a second round */
    MIN_JUDGED = 32768,   /* shorter messages fill slots through the cache */
    MIN_PIECE = 16384,    /* a broadcast is cut in pieces of this size or larger */
    /* A result of this size or larger, apart from the source, goes past the caches.  Measured on
     * two ranks with 32 MiB of cache: no gain at 4 MiB, about a third less time at 16 MiB.  In a
     * broadcast it is slower, in an all-to-all no faster. */
    LARGE_RESULT = 16 << 20
};

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

static size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

size_t hv_small_limit(const hv_arena *arena)
{
    const size_t peers = arena->size > 1 ? (size_t)arena->size - 1 : 1;
    return min_size(arena->slot_bytes, SMALL_ALLREDUCE / peers);
}

/* ------------------------------------------------------------------------------ the first round */

static int begin_operation(hv_arena *arena, uint64_t signature)
{
    arena->operations++;
    const int status = hv_begin(arena);
    if (!status) {
        hv_slot *own = hv_own_slot(arena);
        own->signature = signature;
        own->region = 0;
    }
    return status;
}

/* End the first round.  Everyone compares everyone's signature, so that all come to the same
 * verdict, and after a mismatch all have used one round. */
static int agree(hv_arena *arena, uint64_t signature)
{
    hv_post(arena);
    const int status = hv_wait_all(arena);
    if (status)
        return status;
    for (int rank = 0; rank < arena->size; rank++)
        if (hv_slot_of(arena, rank, 0)->signature != signature)
            return HV_MISMATCH;
    return HV_OK;
}

/* As agree, where the slots' stores are then judged by the time from here on. */
static int agree_and_start(hv_arena *arena, uint64_t signature)
{
    const int status = agree(arena, signature);
    if (!status)
        hv_start_fill(arena);
    return status;
}

/* The slots of a short message are filled through the cache, and nobody takes the time. */
static hv_fill choose_fill(hv_arena *arena, enum hv_kind kind, size_t bytes)
{
    arena->judged = NULL;
    return bytes < MIN_JUDGED ? hv_copy : hv_choose_fill(arena, kind, bytes);
}

static int finish_round(hv_arena *arena)
{
    hv_post(arena);
    return hv_wait_all(arena);
}

int hv_barrier(hv_arena *arena, uint64_t signature)
{
    const int status = begin_operation(arena, signature);
    return status ? status : agree(arena, signature);
}

int hv_exchange(hv_arena *arena, const void *payload, size_t bytes, uint64_t signature)
{
    const int status = begin_operation(arena, signature);
    if (status)
        return status;
    hv_own_slot(arena)->length = bytes;
    hv_copy(hv_own_slot(arena)->payload, payload, bytes);
    return agree(arena, signature);
}

/* ----------------------------------------------------------------------------------- all-reduce */

/* Publish the whole message, for everyone to reduce. */
static void publish_all(const hv_arena *arena, const void *src, size_t bytes)
{
    hv_copy(hv_own_slot(arena)->payload, src, bytes);
}

static void reduce_all(hv_arena *arena, const void *src, void *dst, size_t count,
                       const hv_recipe *recipe)
{
    for (int rank = 0; rank < arena->size; rank++)
        arena->sources[rank] = hv_slot_of(arena, rank, 0)->payload;
    arena->sources[arena->rank] = src;
    hv_reduce_many(recipe, &dst, 1, arena->sources, (size_t)arena->size, count);
}

/* Find the region, if any, in which the rank's own block holds this buffer. */
static void locate(const hv_arena *arena, const char *data, size_t bytes, hv_slot *slot)
{
    for (int i = 0; i < arena->region_count; i++) {
        const hv_region *region = &arena->regions[i];
        const char *block = region->base + (size_t)arena->rank * region->stride;
        if (region->id && data >= block && bytes <= region->stride &&
            (size_t)(data - block) <= region->stride - bytes) {
            slot->region = region->id;
            slot->offset = (uint64_t)(data - block);
            return;
        }
    }
}

static const hv_region *region_of(const hv_arena *arena, uint64_t id)
{
    const hv_region *region = arena->regions;
    while (region->id != id)
        region++;
    return region;
}

/* A message of `count` elements in pieces, and each piece in one share a rank. */
typedef struct {
    const char *src;
    char *dst;
    size_t itemsize, count;
    size_t piece;        /* elements of all pieces but the last, which may be shorter */
    size_t pieces;
    size_t share_stride; /* bytes between shares in a slot */
    int past_caches;     /* whether dst is large and apart from src */
    hv_fill fill;        /* how slots are filled */
} layout;

typedef struct {
    size_t offset, bytes; /* within the message */
} span;

static span share_of(const layout *l, size_t first, size_t count, int rank, int size)
{
    const size_t share = ceil_div(ceil_div(count, (size_t)size), HV_SHARE_ALIGN / l->itemsize) *
                         (HV_SHARE_ALIGN / l->itemsize);
    const size_t low = min_size((size_t)rank * share, count);
    const size_t high = min_size(low + share, count);
    return (span){ (first + low) * l->itemsize, (high - low) * l->itemsize };
}

static span piece_share(const hv_arena *arena, const layout *l, size_t piece, int rank)
{
    const size_t first = piece * l->piece;
    return share_of(l, first, min_size(l->piece, l->count - first), rank, arena->size);
}

static layout plan_pieces(const hv_arena *arena, const void *src, void *dst, size_t count,
                          size_t itemsize)
{
    const size_t size = (size_t)arena->size;
    layout l = { .src = src, .dst = dst, .itemsize = itemsize, .count = count };
    l.past_caches = src != dst && count * itemsize >= LARGE_RESULT;
    if (!count)
        return l;
    l.share_stride = arena->slot_bytes / size / HV_SHARE_ALIGN * HV_SHARE_ALIGN;
    const size_t unit = size * (HV_SHARE_ALIGN / itemsize);
    const size_t largest = size * l.share_stride / itemsize;
    l.piece = ceil_div(ceil_div(count, ceil_div(count, largest)), unit) * unit;
    l.pieces = ceil_div(count, l.piece);
    return l;
}

/* A slot holds the contributions to the other ranks' shares of a piece, and where the own share
 * would be, the result of the own share of the piece before. */
static void publish_piece(const hv_arena *arena, const layout *l, size_t piece)
{
    char *payload = hv_own_slot(arena)->payload;
    for (int step = 1; step < arena->size; step++) {
        const int rank = (arena->rank + step) % arena->size;
        const span share = piece_share(arena, l, piece, rank);
        l->fill(payload + (size_t)rank * l->share_stride, l->src + share.offset, share.bytes);
    }
}

static void publish_first(const hv_arena *arena, const layout *l, int small)
{
    if (small)
        publish_all(arena, l->src, l->count * l->itemsize);
    else
        publish_piece(arena, l, 0);
}

/* Reduce the own share of a piece that was published in the round before this one. */
static void reduce_share(hv_arena *arena, const layout *l, size_t piece, const hv_recipe *recipe)
{
    const span share = piece_share(arena, l, piece, arena->rank);
    const size_t hole = (size_t)arena->rank * l->share_stride;
    void *const targets[] = { hv_own_slot(arena)->payload + hole, l->dst + share.offset };
    for (int rank = 0; rank < arena->size; rank++)
        arena->sources[rank] = hv_slot_of(arena, rank, 1)->payload + hole;
    arena->sources[arena->rank] = l->src + share.offset;
    const size_t count = share.bytes / l->itemsize, sources = (size_t)arena->size;
    if (l->fill == hv_copy_past) {
        hv_reduce_many(recipe, targets + 1, 1, arena->sources, sources, count);
        hv_copy_past(targets[0], targets[1], share.bytes);
    } else if (l->past_caches) {
        hv_reduce_many(recipe, targets, 1, arena->sources, sources, count);
        hv_copy_past(targets[1], targets[0], share.bytes);
    } else
        hv_reduce_many(recipe, targets, 2, arena->sources, sources, count);
}

static void collect_piece(const hv_arena *arena, const layout *l, size_t piece)
{
    for (int step = 1; step < arena->size; step++) {
        const int rank = (arena->rank + step) % arena->size;
        const span share = piece_share(arena, l, piece, rank);
        const char *result = hv_slot_of(arena, rank, 0)->payload + (size_t)rank * l->share_stride;
        (l->past_caches ? hv_copy_past : hv_copy)(l->dst + share.offset, result, share.bytes);
    }
}

/* Round k+1 publishes piece k and the results of piece k-1; piece 0 has been published. */
static int allreduce_staged(hv_arena *arena, const layout *l, const hv_recipe *recipe)
{
    hv_start_fill(arena);
    for (size_t piece = 1; piece <= l->pieces; piece++) {
        int status = hv_begin(arena);
        if (status)
            return status;
        reduce_share(arena, l, piece - 1, recipe);
        if (piece < l->pieces)
            publish_piece(arena, l, piece);
        status = finish_round(arena);
        if (status)
            return status;
        collect_piece(arena, l, piece - 1);
    }
    hv_judge_fill(arena);
    return HV_OK;
}

/* All buffers lie at the same place of one region: each rank reduces its share straight out of
 * everyone's buffer and into everyone's buffer. */
static int allreduce_in_region(hv_arena *arena, const layout *l, const hv_recipe *recipe)
{
    const hv_slot *where = hv_own_slot(arena);
    const hv_region *region = region_of(arena, where->region);
    const span share = share_of(l, 0, l->count, arena->rank, arena->size);
    for (int rank = 0; rank < arena->size; rank++) {
        arena->targets[rank] =
            region->base + (size_t)rank * region->stride + where->offset + share.offset;
        arena->sources[rank] = arena->targets[rank];
    }
    hv_reduce_many(recipe, arena->targets, (size_t)arena->size, arena->sources,
                   (size_t)arena->size, share.bytes / l->itemsize);
    const int status = hv_begin(arena);
    return status ? status : finish_round(arena);
}

/* Where everyone's buffer lies, as published in the round: 1 if all at the same place of one region,
 * 0 if none in any, -1 if it is mixed. */
static int all_in_region(const hv_arena *arena)
{
    const hv_slot *own = hv_own_slot(arena);
    int in_regions = 0, same_place = 1;
    for (int rank = 0; rank < arena->size; rank++) {
        const hv_slot *slot = hv_slot_of(arena, rank, 0);
        in_regions += slot->region != 0;
        same_place &= slot->region == own->region && slot->offset == own->offset;
    }
    return !in_regions ? 0 : in_regions == arena->size && same_place ? 1 : -1;
}

int hv_allreduce(hv_arena *arena, const void *src, void *dst, size_t count,
                 const hv_recipe *recipe, uint64_t signature)
{
    const size_t bytes = count * hv_itemsize(recipe->dtype);
    if (arena->size == 1) {
        hv_reduce_many(recipe, &dst, 1, &src, 1, count);
        return HV_OK;
    }
    const int small = bytes <= hv_small_limit(arena);
    layout l = plan_pieces(arena, src, dst, count, hv_itemsize(recipe->dtype));
    l.fill = choose_fill(arena, HV_ALLREDUCE, small ? 0 : bytes);
    int status = begin_operation(arena, signature);
    if (status)
        return status;
    if (src == dst && bytes >= MIN_IN_REGION)
        locate(arena, src, bytes, hv_own_slot(arena));
    if (hv_own_slot(arena)->region == 0)
        publish_first(arena, &l, small);
    status = agree(arena, signature);
    if (status)
        return status;

    const int in_region = all_in_region(arena);
    if (in_region == 1)
        return allreduce_in_region(arena, &l, recipe);
    if (in_region == -1) { /* who lies in a region has published no data yet */
        status = hv_begin(arena);
        if (status)
            return status;
        publish_first(arena, &l, small);
        status = finish_round(arena);
        if (status)
            return status;
    }
    if (!small)
        return allreduce_staged(arena, &l, recipe);
    reduce_all(arena, src, dst, count, recipe);
    return HV_OK;
}

/* ------------------------------------------------------------------------------- reduce-scatter */

/* The slot has a part for every peer: this is the place of `to` in the slot of `from`. */
static size_t part_index(int from, int to) { return (size_t)(to < from ? to : to - 1); }

static size_t part_bytes(const hv_arena *arena)
{
    const size_t peers = arena->size > 1 ? (size_t)arena->size - 1 : 1;
    return arena->slot_bytes / peers / HV_SHARE_ALIGN * HV_SHARE_ALIGN;
}

/* The bytes of a share that go through in round `k` of the operation. */
static size_t part_length(size_t bytes, size_t part, size_t k)
{
    return bytes > k * part ? min_size(bytes - k * part, part) : 0;
}

int hv_reducescatter(hv_arena *arena, const void *src, void *dst, const size_t *counts,
                     const hv_recipe *recipe, uint64_t signature)
{
    const size_t itemsize = hv_itemsize(recipe->dtype), part = part_bytes(arena);
    const int me = arena->rank;
    size_t largest = 0, own_offset = 0, total = 0;
    for (int rank = 0; rank < arena->size; rank++) {
        largest = counts[rank] > largest ? counts[rank] : largest;
        own_offset += rank < me ? counts[rank] * itemsize : 0;
        total += counts[rank] * itemsize;
    }
    const hv_fill fill = choose_fill(arena, HV_REDUCESCATTER, total);
    for (size_t k = 0; k == 0 || k * part < largest * itemsize; k++) {
        int status = k ? hv_begin(arena) : begin_operation(arena, signature);
        if (status)
            return status;
        const char *from = src;
        for (int rank = 0; rank < arena->size; rank++) {
            const size_t bytes = counts[rank] * itemsize;
            if (rank != me)
                fill(hv_own_slot(arena)->payload + part_index(me, rank) * part, from + k * part,
                     part_length(bytes, part, k));
            from += bytes;
        }
        status = k ? finish_round(arena) : agree_and_start(arena, signature);
        if (status)
            return status;
        const size_t bytes = part_length(counts[me] * itemsize, part, k);
        if (!bytes)
            continue;
        void *target = (char *)dst + k * part;
        for (int rank = 0; rank < arena->size; rank++)
            arena->sources[rank] =
                rank == me ? (const char *)src + own_offset + k * part
                           : hv_slot_of(arena, rank, 0)->payload + part_index(rank, me) * part;
        hv_reduce_many(recipe, &target, 1, arena->sources, (size_t)arena->size, bytes / itemsize);
    }
    hv_judge_fill(arena);
    return HV_OK;
}

/* ------------------------------------------------------------ broadcast, all-gather, all-to-all */

/* In pieces: the root fills the next slot while the others read this one. */
int hv_broadcast(hv_arena *arena, void *data, size_t bytes, int root, uint64_t signature)
{
    const size_t quarter = ceil_div(bytes, 4);
    const size_t piece = min_size(arena->slot_bytes, quarter > MIN_PIECE ? quarter : MIN_PIECE);
    const hv_fill fill = choose_fill(arena, HV_BROADCAST, bytes);
    for (size_t done = 0; done == 0 || done < bytes; done += piece) {
        const size_t length = min_size(piece, bytes - done);
        int status = HV_OK;
        if (!done)
            status = begin_operation(arena, signature);
        else if (arena->rank == root)
            status = hv_begin(arena);
        else
            arena->round++; /* fills no slot, so it need not wait for its readers */
        if (status)
            return status;
        if (arena->rank == root)
            fill(hv_own_slot(arena)->payload, (char *)data + done, length);
        if (!done)
            status = agree_and_start(arena, signature);
        else {
            hv_post(arena);
            if (arena->rank != root)
                status = hv_wait_rank(arena, root);
        }
        if (status)
            return status;
        if (arena->rank != root)
            hv_copy((char *)data + done, hv_slot_of(arena, root, 0)->payload, length);
    }
    hv_judge_fill(arena);
    return HV_OK;
}

int hv_allgather(hv_arena *arena, const void *src, void *dst, const size_t *bytes,
                 uint64_t signature)
{
    const size_t part = arena->slot_bytes;
    const int me = arena->rank;
    size_t largest = 0, total = 0;
    for (int rank = 0; rank < arena->size; total += bytes[rank++])
        largest = bytes[rank] > largest ? bytes[rank] : largest;
    const hv_fill fill = choose_fill(arena, HV_ALLGATHER, total);
    for (size_t k = 0; k == 0 || k * part < largest; k++) {
        int status = k ? hv_begin(arena) : begin_operation(arena, signature);
        if (status)
            return status;
        const size_t own = part_length(bytes[me], part, k);
        fill(hv_own_slot(arena)->payload, (const char *)src + k * part, own);
        status = k ? finish_round(arena) : agree_and_start(arena, signature);
        if (status)
            return status;
        const hv_fill copy = total >= LARGE_RESULT ? hv_copy_past : hv_copy;
        char *to = dst;
        for (int rank = 0; rank < arena->size; rank++) {
            const void *from = rank == me ? (const char *)src + k * part
                                          : hv_slot_of(arena, rank, 0)->payload;
            if (from != to + k * part)
                copy(to + k * part, from, part_length(bytes[rank], part, k));
            to += bytes[rank];
        }
    }
    hv_judge_fill(arena);
    return HV_OK;
}

int hv_alltoall(hv_arena *arena, const void *src, void *dst, const size_t *sent,
                const size_t *received, size_t largest_pair, uint64_t signature)
{
    const size_t part = part_bytes(arena);
    const int me = arena->rank;
    const size_t most = largest_pair * (size_t)arena->size;
    const char *own = src;
    const hv_fill fill = choose_fill(arena, HV_ALLTOALL, most);
    for (size_t k = 0; k == 0 || k * part < largest_pair; k++) {
        int status = k ? hv_begin(arena) : begin_operation(arena, signature);
        if (status)
            return status;
        const char *from = src;
        for (int rank = 0; rank < arena->size; from += sent[rank++]) {
            if (rank == me)
                own = from;
            else
                fill(hv_own_slot(arena)->payload + part_index(me, rank) * part, from + k * part,
                     part_length(sent[rank], part, k));
        }
        status = k ? finish_round(arena) : agree_and_start(arena, signature);
        if (status)
            return status;
        char *to = dst;
        for (int rank = 0; rank < arena->size; to += received[rank++])
            if (rank != me)
                hv_copy(to + k * part,
                        hv_slot_of(arena, rank, 0)->payload + part_index(rank, me) * part,
                        part_length(received[rank], part, k));
            else if (!k) /* in one go: measured a quarter less time at 16 MiB */
                (most >= LARGE_RESULT ? hv_copy_past : hv_copy)(to, own, received[me]);
    }
    hv_judge_fill(arena);
    return HV_OK;
}
#endif
