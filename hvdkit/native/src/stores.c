/* Which stores fill a slot: ordinary ones, through the cache, or ones that go past it to memory.
 *
 * A reader gets a line that is dirty in the writer's cache from there.  Between cores that share a
 * cache that is several times as fast as memory; between others it is several times slower, and then
 * data that has gone to memory comes sooner.  Which it is depends on where the scheduler, or a
 * hypervisor, has put the ranks, and on the size.  So every call is timed, from the moment when all
 * ranks have come; the kind of stores that was quicker lately is taken, and now and then the other
 * is tried.  The result is the same bits either way, so every rank may choose for itself; but all
 * ranks count the same calls, and so try at the same time. */
#if defined(__linux__)
#include "arena.h"

#include <time.h>

enum { FIRST_TRIALS = 4, PERIOD = 64 };

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

/* The best of the last calls: one that was interrupted must not decide. */
static double best(const double seconds[HV_RECENT])
{
    double least = seconds[0];
    for (int i = 1; i < HV_RECENT; i++)
        least = seconds[i] < least ? seconds[i] : least;
    return least;
}

static int is_trial(const hv_choice *choice)
{
    return choice->calls < FIRST_TRIALS || choice->calls % PERIOD == 0;
}

hv_fill hv_choose_fill(hv_arena *arena, enum hv_kind kind, size_t bytes)
{
    hv_choice *choice = choice_of(arena, kind, bytes);
    arena->judged = choice;
    if (choice->calls < FIRST_TRIALS)
        choice->past = choice->calls & 1;
    else
        choice->past = (best(choice->seconds[1]) < best(choice->seconds[0])) ^ is_trial(choice);
    return choice->past ? hv_copy_past : hv_copy;
}

void hv_start_fill(hv_arena *arena)
{
    if (arena->judged)
        arena->judged->began = now();
}

void hv_judge_fill(hv_arena *arena)
{
    hv_choice *choice = arena->judged;
    if (!choice)
        return;
    const double seconds = now() - choice->began;
    double *known = choice->seconds[choice->past];
    if (is_trial(choice)) /* what was known is too old to count */
        for (int i = 0; i < HV_RECENT; i++)
            known[i] = seconds;
    else
        known[choice->calls % HV_RECENT] = seconds;
    choice->calls++;
}
#endif
