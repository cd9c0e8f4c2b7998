/* Which stores fill a slot: ordinary ones, through the cache, or ones that go past it to memory.
 *
 * A reader gets a line that is dirty in the writer's cache from there.  Between cores that share a
 * cache that is several times as fast as memory; between others it is several times slower, and then
 * data that has gone to memory comes sooner.  Which it is depends on where the scheduler, or a
 * hypervisor, has put the ranks, and on the size.  So both are tried, now and then, and the quicker
 * one is taken in between.  The result is the same bits either way, and every rank may choose for
 * itself; but all ranks count the same calls and so try the same stores at the same time. */
#if defined(__linux__)
#include "arena.h"

#include <time.h>

enum { PERIOD = 128, TRIALS = 4 }; /* of PERIOD calls, so many are trials: of each kind in turn */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static hv_choice *choice_of(hv_arena *arena, enum hv_kind kind, size_t bytes)
{
    int size_class = 0;
    for (size_t rest = bytes >> 12; rest && size_class < HV_SIZE_CLASSES - 1; rest >>= 1)
        size_class++;
    return &arena->choices[kind][size_class];
}

hv_fill hv_choose_fill(hv_arena *arena, enum hv_kind kind, size_t bytes)
{
    hv_choice *choice = choice_of(arena, kind, bytes);
    const uint32_t place = choice->calls % PERIOD;
    choice->past = place < TRIALS ? place & 1 : choice->seconds[1] < choice->seconds[0];
    arena->judged = choice;
    return choice->past ? hv_copy_past : hv_copy;
}

void hv_start_fill(hv_arena *arena)
{
    if (arena->judged)
        arena->judged->began = now();
}

/* Of the two trials of a kind the quicker counts: the other may have met a page fault. */
void hv_judge_fill(hv_arena *arena)
{
    hv_choice *choice = arena->judged;
    if (!choice)
        return;
    const uint32_t place = choice->calls++ % PERIOD;
    if (place >= TRIALS)
        return;
    const double seconds = now() - choice->began;
    double *known = &choice->seconds[choice->past];
    if (place < TRIALS / 2 || seconds < *known)
        *known = seconds;
}
#endif
