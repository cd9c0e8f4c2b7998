/* The shared-memory arena: ranks of one node reduce straight out of each other's memory.
 *
 * arena.c has the flag protocol, collectives.c the collectives as sequences of its rounds. Neither
 * knows Python: a callback, called now and then while waiting, lets signals interrupt a wait.
 */
#ifndef HVDKIT_ARENA_H
#define HVDKIT_ARENA_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

enum { HV_LINE = 128,        /* two cache lines: the prefetcher fetches lines in pairs */
       HV_SHARE_ALIGN = 64,  /* shares of a message end at cache lines */
       HV_MAX_RANKS = 1024,
       HV_MAX_REGIONS = 256 };

enum hv_status { HV_OK = 0, HV_MISMATCH = 1, HV_ABORTED = -1, HV_INTERRUPTED = -2 };

/* Why an arena was aborted; in the abort word above the rank. */
enum hv_reason { HV_DIED = 1, HV_CLOSED = 2, HV_GAVE_UP = 3 };

/* One a rank, written by that rank alone, but for `waiters`. */
typedef struct {
    _Atomic uint32_t posted;  /* the last round that the rank posted: the futex word */
    _Atomic uint32_t waiters; /* ranks that sleep, or are about to, until `posted` changes */
    _Atomic uint32_t closed;
    _Atomic int32_t pid; /* 0 until the rank has attached itself */
    _Atomic int32_t core; /* 1 + the one on which it last waited long; 0: none yet */
    uint64_t start_time; /* of the process, against reuse of its pid; 0 if unknown */
    uint64_t pid_namespace;
} __attribute__((aligned(HV_LINE))) hv_control;

/* At the head of each slot buffer, so that it comes with the first bytes of a small payload. */
typedef struct {
    uint64_t signature; /* of the operation: in its first round only */
    uint64_t region;    /* where the buffer lies, if in a region: id, or 0 */
    uint64_t offset;
    uint64_t length; /* of the payload, where ranks may differ */
    char payload[] __attribute__((aligned(64)));
} hv_slot;

typedef struct {
    uint64_t id; /* 0: free */
    char *base;
    size_t stride;
} hv_region;

/* The collectives that move data through slots, piece by piece; see stores.c. */
enum hv_kind { HV_ALLREDUCE, HV_REDUCESCATTER, HV_BROADCAST, HV_ALLGATHER, HV_ALLTOALL, HV_KINDS };
enum { HV_SIZE_CLASSES = 24, /* powers of two from 4 KiB on */
       HV_RECENT = 3 };

typedef void (*hv_fill)(void *dst, const void *src, size_t bytes);

typedef struct {
    uint32_t calls;
    int past;          /* whether the call under way fills slots past the cache */
    double began; /* when all ranks had come, in seconds */
    double seconds[2][HV_RECENT]; /* what calls took lately: through the cache, past it */
} hv_choice;

typedef struct {
    int rank, size;
    size_t slot_bytes;
    uint32_t round; /* the last round begun */
    uint64_t operations; /* begun so far, refused ones included: equal on ranks in the same one */
    uint32_t spin_iterations;
    int yields; /* before sleeping */
    double stepped_aside; /* when this rank last left a core to a peer, in seconds */
    int (*interrupted)(void *context); /* polled on slow waits; nonzero gives up */
    void *context;
    _Atomic uint32_t *abort_word; /* shared: 0, or hv_reason << 16 | rank */
    hv_control *controls;         /* shared */
    char *slots;                  /* shared: two for each rank */
    hv_region regions[HV_MAX_REGIONS];
    int region_count; /* of entries that were ever in use */
    uint64_t last_region;
    hv_choice choices[HV_KINDS][HV_SIZE_CLASSES];
    hv_choice *judged; /* of the call under way; NULL if its message is short */
    const void *sources[HV_MAX_RANKS]; /* scratch of one call */
    void *targets[HV_MAX_RANKS];
} hv_arena;

/* ------------------------------------------------------------------------ arena.c: the protocol */

size_t hv_arena_bytes(size_t size, size_t slot_bytes);
void hv_arena_attach(hv_arena *arena, void *memory, int rank, int size, size_t slot_bytes,
                     uint32_t spin_iterations);
void hv_arena_close(hv_arena *arena);

/* Record why the arena is of no more use (the first reason stays), and wake all who wait. */
void hv_arena_abort(hv_arena *arena, enum hv_reason reason, int rank);
uint32_t hv_arena_abort_word(const hv_arena *arena);

/* Begin a round: wait until the own slot buffer of the round may be written. */
int hv_begin(hv_arena *arena);
/* The own slot buffer of the round begun last. */
hv_slot *hv_own_slot(const hv_arena *arena);
/* The buffer of `rank` in the round begun last (ago 0) or in the one before (ago 1). */
hv_slot *hv_slot_of(const hv_arena *arena, int rank, uint32_t ago);
/* Publish the own slot buffer; done with all that was read in the round before. */
void hv_post(hv_arena *arena);
/* Wait until `rank`, or everyone, has posted the round begun last. */
int hv_wait_rank(hv_arena *arena, int rank);
int hv_wait_all(hv_arena *arena);

/* --------------------------------------------------------- stores.c: which stores fill the slots */

/* The stores for a call's slots; then say when all ranks have come, and when the call is done. */
hv_fill hv_choose_fill(hv_arena *arena, enum hv_kind kind, size_t bytes);
void hv_start_fill(hv_arena *arena);
void hv_judge_fill(hv_arena *arena);

/* ---------------------------------------------------------- collectives.c: all return hv_status */

/* Largest all-reduce, in bytes, for which every rank reduces everything, in one round. */
size_t hv_small_limit(const hv_arena *arena);

int hv_barrier(hv_arena *arena, uint64_t signature);
/* Leaves every rank's payload and its length in the slots of the round. */
int hv_exchange(hv_arena *arena, const void *payload, size_t bytes, uint64_t signature);
int hv_allreduce(hv_arena *arena, const void *src, void *dst, size_t count,
                 const hv_recipe *recipe, uint64_t signature);
int hv_reducescatter(hv_arena *arena, const void *src, void *dst, const size_t *counts,
                     const hv_recipe *recipe, uint64_t signature);
int hv_broadcast(hv_arena *arena, void *data, size_t bytes, int root, uint64_t signature);
int hv_allgather(hv_arena *arena, const void *src, void *dst, const size_t *bytes,
                 uint64_t signature);
int hv_alltoall(hv_arena *arena, const void *src, void *dst, const size_t *sent,
                const size_t *received, size_t largest_pair, uint64_t signature);

#endif
