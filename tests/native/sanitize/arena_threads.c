/* The arena between threads: every collective against a plain loop, for the sanitizers to watch.
 *
 *     arena_threads [seed [steps]]
 *
 * Each rank is a thread with an hv_arena of its own over one block of memory. The sanitizers see
 * all of the memory's users this way, which they do not between processes. The steps of a world
 * follow from the seed; only the delays and the schedule differ from run to run. Whatever is wrong
 * ends the process with a status other than 0, and so does an alarm should a rank hang.
 */
#include "operations.h"

#include <pthread.h>
#include <string.h>

#if defined(__has_feature) /* clang's way to say it */
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
#endif

enum { LIMIT_SECONDS = 540 };

typedef struct world world;

struct world {
    int size;
    size_t slot_bytes;
    uint32_t spin, first_round;
    uint64_t seed;
    int steps;
    void (*body)(rank_state *, const world *);
    char *memory, *region;
};

/* ------------------------------------------------------------------------------- whole programs */

/* Every collective at every size, then in any order, with mismatches in between. */
static void correct_use(rank_state *r, const world *w)
{
    for (int kind = 0; kind < KINDS; kind++)
        for (size_t index = 0; index < LENGTHS; index++) {
            next_step(r, 0);
            CHECK(r, try_any(r, kind, length_at(r, index), 1) == HV_OK);
        }
    for (int i = 0; i < w->steps; i++) {
        next_step(r, pick(&r->same, 8) == 0);
        const int kind = (int)pick(&r->same, KINDS);
        const int want = r->mismatch ? HV_MISMATCH : HV_OK;
        CHECK(r, try_any(r, kind, length_at(r, pick(&r->same, LENGTHS)), 1) == want);
    }
}

static int give_up(void *context)
{
    rank_state *r = context;
    return r->polls_left > 0 && --r->polls_left == 0;
}

/* The last rank leaves in the way that the seed says; everyone else's waits end. */
static void one_leaves(rank_state *r, const world *w)
{
    const int last = r->arena.size - 1, steps = (int)pick(&r->same, 20);
    const enum hv_reason reasons[] = { HV_GAVE_UP, HV_CLOSED, HV_GAVE_UP };
    const int way = (int)(w->seed % 3);
    int status = HV_OK;
    for (int i = 0; status == HV_OK && (i < steps || r->arena.rank != last); i++) {
        next_step(r, 0);
        status = try_any(r, (int)pick(&r->same, KINDS), length_at(r, pick(&r->same, LENGTHS)), 0);
    }
    if (r->arena.rank != last) {
        /* In the third way the last rank just stops calling, and rank 0's callback gives up. */
        CHECK(r, status == (way == 2 && r->arena.rank == 0 ? HV_INTERRUPTED : HV_ABORTED));
        const int who = way == 2 ? 0 : last;
        CHECK(r, hv_arena_abort_word(&r->arena) == ((uint32_t)reasons[way] << 16 | (uint32_t)who));
        return;
    }
    /* Rank 0's callback is called in any slow wait, and may have given up before this. */
    CHECK(r, status == HV_OK || (way == 2 && status == HV_ABORTED));
    usleep((useconds_t)pick(&r->own, 3000));
    if (way == 0)
        hv_arena_abort(&r->arena, HV_GAVE_UP, last);
    else if (way == 1)
        hv_arena_close(&r->arena);
}

/* --------------------------------------------------------------------------------------- worlds */

typedef struct {
    const world *world;
    int rank;
} ticket;

/* What lies between two slots belongs to nobody. */
static char *gap_after(const hv_arena *arena, uint32_t ago, size_t *bytes)
{
    char *end = hv_slot_of(arena, arena->rank, ago)->payload + arena->slot_bytes;
    *bytes = -(uintptr_t)end % HV_LINE;
    return end;
}

static void *run_rank(void *argument)
{
    const ticket *t = argument;
    const world *w = t->world;
    rank_state *r = calloc(1, sizeof *r);
    size_t gap;
    if (!r)
        abort();
    r->region = w->region;
    r->same = w->seed;
    r->own = w->seed * 31 + (uint64_t)t->rank + (uint64_t)getpid();
    r->polls_left = w->body == one_leaves && t->rank == 0 && w->seed % 3 == 2 ? 2 : 0;
    delay(r);
    hv_arena_attach(&r->arena, w->memory, t->rank, w->size, w->slot_bytes, w->spin);
    r->arena.interrupted = give_up;
    r->arena.context = r;
    r->arena.regions[1] = (hv_region){ .id = 7, .base = w->region, .stride = STRIDE };
    r->arena.region_count = 2; /* the first was registered once, and is no more */
    for (uint32_t ago = 0; ago < 2; ago++) {
        char *start = gap_after(&r->arena, ago, &gap);
        ASAN_POISON_MEMORY_REGION(start, gap);
    }
    w->body(r, w);
    for (int i = 0; i < BUFFERS; i++)
        free(r->held[i]);
    free(r);
    return NULL;
}

static void run_world(world w)
{
    pthread_t threads[MAX_RANKS];
    ticket tickets[MAX_RANKS];
    const size_t bytes = hv_arena_bytes((size_t)w.size, w.slot_bytes);
    w.memory = aligned_alloc(4096, bytes);
    w.region = aligned_alloc(4096, (size_t)w.size * STRIDE);
    if (!w.memory || !w.region)
        abort();
    memset(w.memory, 0, bytes);
    memset(w.region, 0, (size_t)w.size * STRIDE);
    for (int rank = 0; rank < w.size; rank++)
        ((hv_control *)(w.memory + HV_LINE))[rank].posted = w.first_round;
    for (int rank = 0; rank < w.size; rank++) {
        tickets[rank] = (ticket){ &w, rank };
        if (pthread_create(&threads[rank], NULL, run_rank, &tickets[rank]))
            abort();
    }
    for (int rank = 0; rank < w.size; rank++)
        pthread_join(threads[rank], NULL);
    ASAN_UNPOISON_MEMORY_REGION(w.memory, bytes);
    free(w.memory);
    free(w.region);
}

int main(int argc, char **argv)
{
    const uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    const int steps = argc > 2 ? atoi(argv[2]) : 100;
    int worlds = 0;
    alarm(LIMIT_SECONDS);
    for (int size = 1; size <= MAX_RANKS; size++) {
        const size_t slots[] = { 1024, 1000, (size_t)size * HV_SHARE_ALIGN, 18000 };
        for (size_t i = 0; i < 8; i++, worlds++) {
            hv_variant_select(hv_variant_at((size_t)worlds % hv_variant_count()));
            run_world((world){ .size = size, .slot_bytes = slots[i / 2], .spin = i % 2 ? 300 : 0,
                               .first_round = i ? 0 : UINT32_MAX - 50, .seed = seed + i,
                               .steps = steps, .body = correct_use });
        }
        for (uint64_t i = 0; size > 1 && i < 12; i++, worlds++)
            run_world((world){ .size = size, .slot_bytes = slots[i % 4], .spin = i % 2 ? 300 : 0,
                               .seed = seed + i, .body = one_leaves });
    }
    printf("%d worlds of 1 to %d ranks, all answers right\n", worlds, MAX_RANKS);
    return 0;
}
