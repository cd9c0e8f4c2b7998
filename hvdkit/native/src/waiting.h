/* How to wait a little for a message: look again at once, then offer the core to whoever wants it, for
 * a rank that only looks would burn the time in which the other could send.  Whatever takes longer is
 * left to the caller, who can be interrupted.
 */
#ifndef HVDKIT_WAITING_H
#define HVDKIT_WAITING_H

#include <sched.h>
#include <stdint.h>
#include <time.h>

enum { HV_YIELDS = 200, HV_LONGEST_NANOSECONDS = 1000000 };

typedef struct {
    long looks, most;
    uint64_t end; /* of the yields; 0: not begun */
} hv_patience;

static inline uint64_t hv_nanoseconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* Look so often before yielding. */
static inline hv_patience hv_patience_of(long looks)
{
    return (hv_patience){ .looks = 0, .most = looks, .end = 0 };
}

/* Whether to look again. */
static inline int hv_wait_a_little(hv_patience *patience)
{
    if (patience->looks++ < patience->most)
        return 1;
    if (!patience->end)
        patience->end = hv_nanoseconds() + HV_LONGEST_NANOSECONDS;
    if (patience->looks > patience->most + HV_YIELDS || hv_nanoseconds() > patience->end)
        return 0;
    sched_yield();
    return 1;
}

#endif
