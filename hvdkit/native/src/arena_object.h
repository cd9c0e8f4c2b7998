/* The Python type Arena; arena_object.c has its life and regions, arena_calls.c its collectives. */
#ifndef HVDKIT_ARENA_OBJECT_H
#define HVDKIT_ARENA_OBJECT_H

#include "pyargs.h"

#include <sys/types.h>

#include "arena.h"

typedef struct {
    PyObject_HEAD
    hv_arena arena;
    Py_buffer memory;
    Py_buffer region_memory[HV_MAX_REGIONS];
    PyThreadState *saved; /* of the thread that waits without the GIL */
    unsigned forks; /* when it was made: a forked child is no rank, and must not end its parent's */
    char open, busy;
} ArenaObject;

extern PyObject *hv_arena_error;

/* Counts, in each process, the forks that led to it. */
extern unsigned hv_forks;

/* 0 if calls may begin; else -1, with the reason set as an ArenaError. */
int hv_check_usable(const ArenaObject *self);
/* Called while waiting, without the GIL.  Handlers of signals run; one that raises ends the wait. */
int hv_run_signal_handlers(void *context);

PyObject *hv_run_allreduce(ArenaObject *self, PyObject *src, PyObject *dst,
                           const hv_recipe *recipe, uint64_t signature);

PyObject *hv_py_bind_allreduce(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *hv_py_bind(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *hv_py_barrier(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *hv_py_exchange(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *hv_py_allreduce(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *hv_py_reducescatter(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *hv_py_broadcast(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *hv_py_allgather(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *hv_py_alltoall(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs);

#endif
