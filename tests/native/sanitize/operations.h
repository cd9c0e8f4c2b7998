/* One rank's use of the arena: each collective with data that every rank can compute, checked. */
#ifndef OPERATIONS_H
#define OPERATIONS_H

#include "arena.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum {
    MAX_RANKS = 5,
    STRIDE = 24576, /* of the region that holds buffers for use in place */
    BUFFERS = 4,
    KINDS = 9,      /* for try_any; those from 6 on are all-reduces */
    LENGTHS = 12    /* for length_at */
};

typedef struct {
    hv_arena arena;
    char *region;
    uint64_t same, own; /* random states: equal on all ranks, and the rank's own */
    uint64_t step;
    int mismatch;       /* whether this step's signatures are to differ */
    int polls_left;     /* until the callback gives up, if above 0 */
    size_t shift;       /* of the step's buffers from alignment */
    char *held[BUFFERS];
} rank_state;

#define CHECK(r, condition)                                                                      \
    do {                                                                                         \
        if (!(condition)) {                                                                      \
            fprintf(stderr, "%s:%d: rank %d of %d, slots of %zu, step %lu: not true: %s\n",      \
                    __FILE__, __LINE__, (r)->arena.rank, (r)->arena.size, (r)->arena.slot_bytes, \
                    (unsigned long)(r)->step, #condition);                                       \
            _exit(2);                                                                            \
        }                                                                                        \
    } while (0)

size_t pick(uint64_t *state, size_t choices);
/* Now and then, wait or let others run. */
void delay(rank_state *r);

/* To be called on every rank before each operation. */
void next_step(rank_state *r, int mismatch);
/* Run one operation and check its answer, or after a mismatch that it has left the destination
 * alone. Whether it is in place follows from r->same. Returns the hv_status. */
int try_any(rank_state *r, int kind, size_t bytes, int in_regions);
/* Lengths about where a collective changes its ways: 0, 1, the small limit, a slot, several. */
size_t length_at(const rank_state *r, size_t index);

#endif
