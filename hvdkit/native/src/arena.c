/* The flag protocol of the shared-memory arena.  There is only this one.
 *
 * Every rank has a counter of rounds, `posted`, and two slot buffers. All ranks run the same
 * sequence of rounds n = 1, 2, ... (32 bits, compared modulo 2^32).  In round n, a rank
 *
 *   begin     waits until every peer has posted n-1,                               [1]
 *             fills its own slot buffer n & 1,
 *   post      stores n to its counter,                                             [2]
 *   wait      waits until the peers that it reads from have posted n,              [3]
 *             reads their buffers n & 1, until it itself posts n+1.                [4]
 *
 * Why no reader meets a writer.  The buffer that a rank fills in round n was last filled in round
 * n-2.  A peer reads that content between its posts n-2 and n-1, by [4]; and by [1] it has posted
 * n-1.  So the peer is done.  A peer that reads the new content has seen n in [3], so it is filled.
 *
 * Why it sees what was written.  post [2] is a store with release order, and [1] and [3] are loads
 * with acquire order.  In [3] the fill happens before the post, which synchronises with the load,
 * which happens before the read.  In [1] the peer's reads of round n-2 happen before its post n-1,
 * which synchronises with the load, which happens before the writes.
 *
 * Why nobody runs ahead.  By [1] a rank posts n only once all have posted n-1, if it fills a slot;
 * one that only reads (in a broadcast) waits for its source instead, which did so.  Counters are
 * thus never further apart than two rounds, and the comparison modulo 2^32 is safe.
 *
 * The rounds of an operation follow each other with no round between two operations: leaving an
 * operation is no promise, the first post of the next one is.  Memory that is not a slot (a region
 * that ranks reduce in place) is therefore guarded by a last round of its own.
 *
 * Sleeping.  A waiter that has spun long enough adds itself to the peer's `waiters`, looks at
 * `posted` once more, and sleeps while it still has that value.  A poster stores `posted` and then
 * looks at `waiters`.  All four are sequentially consistent, so in their one total order either the
 * waiter's increment comes before the poster's look, which then wakes it; or the poster's store
 * comes before the waiter's look, which then does not sleep (Dekker).  Should the store fall between
 * the waiter's look and the sleep, the kernel sees that the value has changed and returns at once.
 * A time limit on the sleep is there for what posts nothing: death, abort and signals.
 */
#if defined(__linux__)
#define _GNU_SOURCE /* for CPU_SET and the like */
#include "arena.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SECONDS_BETWEEN_STEPS 2e-3

/* How often a core is offered before sleeping.  Where there is a core for each rank, waking one that
 * sleeps costs more than all these; where there is not, those that yield keep each other from work.
 * Measured, 4 bytes on 2 cores: two hosts of 2 ranks each 110 us with few, 60 with many; one of 4
 * ranks 6 us with few, 10 with many. */
enum { YIELDS = 200, FEW_YIELDS = 4, YIELD_NANOSECONDS = 100000 };

enum { SLEEP_NANOSECONDS = 50000000 };

static size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

/* --------------------------------------------------------------------------------------- layout */

static size_t slot_stride(size_t slot_bytes)
{
    return round_up(sizeof(hv_slot) + slot_bytes, HV_LINE);
}

static size_t slots_offset(size_t size) { return round_up(HV_LINE * (1 + size), 4096); }

size_t hv_arena_bytes(size_t size, size_t slot_bytes)
{
    return round_up(slots_offset(size) + 2 * size * slot_stride(slot_bytes), 4096);
}

hv_slot *hv_slot_of(const hv_arena *arena, int rank, uint32_t ago)
{
    const size_t index = 2 * (size_t)rank + ((arena->round - ago) & 1);
    return (hv_slot *)(arena->slots + index * slot_stride(arena->slot_bytes));
}

hv_slot *hv_own_slot(const hv_arena *arena) { return hv_slot_of(arena, arena->rank, 0); }

/* --------------------------------------------------------------------------------- who is alive */

/* State and start time from /proc/PID/stat; 0 if that cannot be read. */
static int process_status(int pid, char *state, unsigned long long *start_time)
{
    char path[32], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "re");
    if (!file)
        return 0;
    const size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = 0;
    const char *after_name = strrchr(text, ')'); /* the name may hold anything, also ')' */
    return after_name &&
           sscanf(after_name + 1,
                  " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
                  state, start_time) == 2;
}

static uint64_t pid_namespace(void)
{
    struct stat status;
    return stat("/proc/self/ns/pid", &status) ? 0 : (uint64_t)status.st_ino;
}

/* A process of another pid namespace cannot be asked for, and counts as alive. */
static int is_dead(const hv_arena *arena, const hv_control *peer)
{
    const int pid = atomic_load(&peer->pid);
    char state;
    unsigned long long start_time;
    if (!pid || peer->pid_namespace != arena->controls[arena->rank].pid_namespace)
        return 0;
    if (kill(pid, 0) && errno == ESRCH)
        return 1;
    if (!process_status(pid, &state, &start_time))
        return 0;
    const int reused = peer->start_time && start_time != peer->start_time;
    return state == 'Z' || state == 'X' || reused;
}

/* ------------------------------------------------------------------------- attach, close, abort */

static int cores_for_all(const hv_arena *arena)
{
    cpu_set_t allowed;
    return !sched_getaffinity(0, sizeof allowed, &allowed) && CPU_COUNT(&allowed) >= arena->size;
}

void hv_arena_attach(hv_arena *arena, void *memory, int rank, int size, size_t slot_bytes,
                     uint32_t spin_iterations)
{
    char *base = memory;
    char state;
    unsigned long long start_time = 0;
    memset(arena, 0, sizeof *arena);
    arena->rank = rank;
    arena->size = size;
    arena->slot_bytes = slot_bytes;
    arena->spin_iterations = spin_iterations;
    arena->yields = spin_iterations || cores_for_all(arena) ? YIELDS : FEW_YIELDS;
    arena->abort_word = (_Atomic uint32_t *)base;
    arena->controls = (hv_control *)(base + HV_LINE);
    arena->slots = base + slots_offset((size_t)size);
    arena->round = atomic_load(&arena->controls[rank].posted); /* 0 in fresh memory */
    /* The first to touch a page decides on which NUMA node it lies. */
    memset(hv_slot_of(arena, rank, arena->round & 1), 0, 2 * slot_stride(slot_bytes));
    hv_control *own = &arena->controls[rank];
    process_status(getpid(), &state, &start_time);
    own->start_time = start_time;
    own->pid_namespace = pid_namespace();
    atomic_store(&own->pid, getpid()); /* last: it says that the others are valid */
}

static void futex_wake_all(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* Nonzero when a signal ended the sleep. */
static int futex_sleep(_Atomic uint32_t *word, uint32_t value)
{
    const struct timespec limit = { 0, SLEEP_NANOSECONDS };
    return syscall(SYS_futex, word, FUTEX_WAIT, value, &limit, NULL, 0) && errno != EAGAIN;
}

void hv_arena_close(hv_arena *arena)
{
    hv_control *own = &arena->controls[arena->rank];
    atomic_store(&own->closed, 1);
    futex_wake_all(&own->posted);
}

void hv_arena_abort(hv_arena *arena, enum hv_reason reason, int rank)
{
    uint32_t none = 0;
    atomic_compare_exchange_strong(arena->abort_word, &none, (uint32_t)reason << 16 | (uint32_t)rank);
    for (int peer = 0; peer < arena->size; peer++)
        futex_wake_all(&arena->controls[peer].posted);
}

uint32_t hv_arena_abort_word(const hv_arena *arena) { return atomic_load(arena->abort_word); }

/* -------------------------------------------------------------------------------- post and wait */

static inline int has_posted(const hv_control *peer, uint32_t round)
{
    const uint32_t posted = atomic_load_explicit(&peer->posted, memory_order_acquire);
    return (int32_t)(posted - round) >= 0;
}

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void hv_post(hv_arena *arena)
{
    hv_control *own = &arena->controls[arena->rank];
    atomic_store(&own->posted, arena->round);
    if (atomic_load(&own->waiters))
        futex_wake_all(&own->posted);
}

/* Sleep until the peer posts, or something ends the wait.  Returns whether the time was up. */
static int sleep_for_post(hv_control *peer, uint32_t round)
{
    int woken_early = 0;
    atomic_fetch_add(&peer->waiters, 1);
    const uint32_t posted = atomic_load(&peer->posted);
    if ((int32_t)(posted - round) < 0 && !atomic_load(&peer->closed))
        woken_early = futex_sleep(&peer->posted, posted);
    atomic_fetch_sub(&peer->waiters, 1);
    return woken_early;
}

/* A peer that posted and then closed or died has done its part, so look at its counter last. */
static int give_up_on(hv_arena *arena, int rank, uint32_t round, enum hv_reason reason)
{
    if (has_posted(&arena->controls[rank], round))
        return HV_OK;
    hv_arena_abort(arena, reason, rank);
    return HV_ABORTED;
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Go to a core on which no peer was seen last, and stay there or not as the scheduler likes. */
static void leave_core(const hv_arena *arena)
{
    cpu_set_t allowed, others;
    if (sched_getaffinity(0, sizeof allowed, &allowed))
        return;
    others = allowed;
    for (int rank = 0; rank < arena->size; rank++) {
        const int core = atomic_load(&arena->controls[rank].core) - 1;
        if (core >= 0 && core < CPU_SETSIZE)
            CPU_CLR(core, &others);
    }
    if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others))
        sched_setaffinity(0, sizeof allowed, &allowed);
}

/* Two ranks that wait for each other in turn look like one busy thread to the scheduler, which may
 * keep them on one core for ever, while another idles: each spins away the time that the other
 * needs.  Measured: 65 us for what takes 5 us on two cores.  So where there are cores for all, the
 * higher rank steps aside, now and then. */
static void step_aside(hv_arena *arena, const hv_control *peer, int rank)
{
    hv_control *own = &arena->controls[arena->rank];
    const int core = sched_getcpu() + 1;
    atomic_store(&own->core, core);
    if (!arena->spin_iterations || arena->rank < rank || atomic_load(&peer->core) != core)
        return;
    const double now = seconds();
    if (now - arena->stepped_aside < SECONDS_BETWEEN_STEPS)
        return;
    arena->stepped_aside = now;
    leave_core(arena);
}

static int wait_slowly(hv_arena *arena, int rank, uint32_t round)
{
    hv_control *peer = &arena->controls[rank];
    step_aside(arena, peer, rank);
    const double end = seconds() + 1e-9 * YIELD_NANOSECONDS;
    for (int i = 0; i < arena->yields && (i < FEW_YIELDS || seconds() < end); i++) {
        sched_yield();
        if (has_posted(peer, round))
            return HV_OK;
    }
    for (;;) {
        const int look_around = sleep_for_post(peer, round);
        if (has_posted(peer, round))
            return HV_OK;
        if (hv_arena_abort_word(arena))
            return HV_ABORTED;
        if (atomic_load(&peer->closed))
            return give_up_on(arena, rank, round, HV_CLOSED);
        if (!look_around)
            continue;
        if (arena->interrupted && arena->interrupted(arena->context)) {
            hv_arena_abort(arena, HV_GAVE_UP, arena->rank);
            return HV_INTERRUPTED;
        }
        if (is_dead(arena, peer))
            return give_up_on(arena, rank, round, HV_DIED);
    }
}

static inline int wait_for(hv_arena *arena, int rank, uint32_t round)
{
    const hv_control *peer = &arena->controls[rank];
    if (has_posted(peer, round))
        return HV_OK;
    for (uint32_t i = 0; i < arena->spin_iterations; i++) {
        relax();
        if (has_posted(peer, round))
            return HV_OK;
    }
    return wait_slowly(arena, rank, round);
}

int hv_wait_rank(hv_arena *arena, int rank) { return wait_for(arena, rank, arena->round); }

static int wait_for_all(hv_arena *arena, uint32_t round)
{
    for (int step = 1; step < arena->size; step++) {
        const int status = wait_for(arena, (arena->rank + step) % arena->size, round);
        if (status)
            return status;
    }
    return HV_OK;
}

int hv_wait_all(hv_arena *arena) { return wait_for_all(arena, arena->round); }

int hv_begin(hv_arena *arena)
{
    arena->round++;
    return wait_for_all(arena, arena->round - 1);
}
#endif
