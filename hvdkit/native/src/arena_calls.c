/* The collectives as methods of Arena: checks arguments, releases the GIL, and turns statuses into
 * results and exceptions. */
#if defined(__linux__)
#include "arena_object.h"

PyObject *hv_arena_error;

/* ------------------------------------------------------------------------- entering and leaving */

/* Called while waiting. Handlers of signals run here; one that raises ends the wait. */
int hv_run_signal_handlers(void *context)
{
    ArenaObject *self = context;
    PyEval_RestoreThread(self->saved);
    const int raised = PyErr_CheckSignals();
    self->saved = PyEval_SaveThread();
    return raised;
}

static void set_aborted(const ArenaObject *self)
{
    const uint32_t word = hv_arena_abort_word(&self->arena);
    const unsigned rank = word & 0xffff;
    switch (word >> 16) {
    case HV_DIED:
        PyErr_Format(hv_arena_error, "local rank %u died while others waited for it", rank);
        break;
    case HV_CLOSED:
        PyErr_Format(hv_arena_error, "local rank %u closed its arena while others waited for it", rank);
        break;
    default:
        PyErr_Format(hv_arena_error, "local rank %u gave up in the middle of a collective", rank);
    }
}

int hv_check_usable(const ArenaObject *self)
{
    if (!self->open)
        PyErr_SetString(hv_arena_error, "the arena is closed");
    else if (self->forks != hv_forks)
        PyErr_SetString(hv_arena_error, "this process is a forked child of a rank, and no rank itself");
    else if (self->busy)
        PyErr_SetString(hv_arena_error, "the arena is in use by another thread");
    else if (hv_arena_abort_word(&self->arena))
        set_aborted(self);
    else
        return 0;
    return -1;
}

static void enter(ArenaObject *self)
{
    self->busy = 1;
    self->saved = PyEval_SaveThread();
}

static void leave(ArenaObject *self)
{
    PyEval_RestoreThread(self->saved);
    self->busy = 0;
}

/* 0 or 1 as a Python int; NULL with an exception for the others. */
static PyObject *as_result(const ArenaObject *self, int status)
{
    if (status >= 0)
        return PyLong_FromLong(status);
    if (status == HV_ABORTED)
        set_aborted(self);
    return NULL;
}

/* ------------------------------------------------------------------------------------ arguments */

/* A tuple of one count a rank; their sum in units of `unit` bytes must be `bytes`. */
static size_t *arg_counts(const ArenaObject *self, PyObject *object, const char *name, size_t unit,
                          Py_ssize_t bytes)
{
    const Py_ssize_t size = self->arena.size;
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != size) {
        PyErr_Format(PyExc_TypeError, "%s must be a tuple of %zd counts", name, size);
        return NULL;
    }
    size_t *counts = PyMem_Malloc((size_t)size * sizeof *counts), left = (size_t)bytes / unit;
    if (!counts) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < size; i++) {
        counts[i] = PyLong_AsSize_t(PyTuple_GET_ITEM(object, i));
        if (counts[i] == (size_t)-1 && PyErr_Occurred())
            goto failed;
        if (counts[i] > left)
            goto wrong_sum;
        left -= counts[i];
    }
    if (!left && (size_t)bytes % unit == 0)
        return counts;
wrong_sum:
    PyErr_Format(PyExc_ValueError, "%s do not add up to the %zd bytes of the buffer", name, bytes);
failed:
    PyMem_Free(counts);
    return NULL;
}

static int overlap(const Py_buffer *a, const Py_buffer *b)
{
    const uintptr_t x = (uintptr_t)a->buf, y = (uintptr_t)b->buf;
    return x < y + (size_t)b->len && y < x + (size_t)a->len;
}

/* `allowed`: the one place at which the buffers may share memory. */
static int refuse_overlap(const Py_buffer *src, const Py_buffer *dst, int shares_allowed_place)
{
    if (!overlap(src, dst) || shares_allowed_place)
        return 0;
    PyErr_SetString(PyExc_ValueError, "src and dst overlap");
    return -1;
}

static int get_buffers(PyObject *src_object, Py_buffer *src, PyObject *dst_object, Py_buffer *dst)
{
    if (hv_arg_buffer(src_object, src, 0))
        return -1;
    if (!hv_arg_buffer(dst_object, dst, 1))
        return 0;
    PyBuffer_Release(src);
    return -1;
}

/* ---------------------------------------------------------------------------------- collectives */

PyObject *hv_py_barrier(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t signature;
    if (hv_arg_count("barrier", nargs, 1) || hv_check_usable(self) ||
        hv_arg_u64(args[0], &signature))
        return NULL;
    enter(self);
    const int status = hv_barrier(&self->arena, signature);
    leave(self);
    return as_result(self, status);
}

/* The payloads stay in the slots until this rank posts again, so they can be read with the GIL. */
static PyObject *payloads_of_round(const ArenaObject *self)
{
    PyObject *list = PyList_New(self->arena.size);
    for (int rank = 0; list && rank < self->arena.size; rank++) {
        const hv_slot *slot = hv_slot_of(&self->arena, rank, 0);
        PyObject *payload = PyBytes_FromStringAndSize(slot->payload, (Py_ssize_t)slot->length);
        if (payload)
            PyList_SET_ITEM(list, rank, payload);
        else
            Py_CLEAR(list);
    }
    return list;
}

PyObject *hv_py_exchange(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t signature;
    Py_buffer payload;
    if (hv_arg_count("exchange", nargs, 2) || hv_check_usable(self) ||
        hv_arg_u64(args[1], &signature) || hv_arg_buffer(args[0], &payload, 0))
        return NULL;
    if ((size_t)payload.len > self->arena.slot_bytes) {
        PyErr_Format(PyExc_ValueError, "a payload of %zd bytes does not fit into a slot of %zu",
                     payload.len, self->arena.slot_bytes);
        PyBuffer_Release(&payload);
        return NULL;
    }
    enter(self);
    const int status = hv_exchange(&self->arena, payload.buf, (size_t)payload.len, signature);
    leave(self);
    PyBuffer_Release(&payload);
    if (status == HV_OK)
        return payloads_of_round(self);
    return status == HV_MISMATCH ? Py_NewRef(Py_None) : as_result(self, status);
}

PyObject *hv_run_allreduce(ArenaObject *self, PyObject *src_object, PyObject *dst_object,
                           const hv_recipe *recipe, uint64_t signature)
{
    Py_buffer src, dst;
    size_t count;
    int status = HV_INTERRUPTED; /* as if raised here */
    if (hv_check_usable(self) || hv_arg_buffer(dst_object, &dst, 1))
        return NULL;
    const int in_place = src_object == dst_object;
    if (in_place)
        src = dst; /* one export serves both */
    else if (hv_arg_buffer(src_object, &src, 0)) {
        PyBuffer_Release(&dst);
        return NULL;
    }
    if (src.len != dst.len)
        PyErr_Format(PyExc_ValueError, "src has %zd bytes, dst %zd", src.len, dst.len);
    else if (!hv_arg_elements(dst.len, recipe->dtype, &count) &&
             !refuse_overlap(&src, &dst, src.buf == dst.buf)) {
        enter(self);
        status = hv_allreduce(&self->arena, src.buf, dst.buf, count, recipe, signature);
        leave(self);
    }
    if (!in_place)
        PyBuffer_Release(&src);
    PyBuffer_Release(&dst);
    return as_result(self, status);
}

PyObject *hv_py_allreduce(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    hv_recipe recipe;
    uint64_t signature;
    if (hv_arg_count("allreduce", nargs, 8) || hv_arg_recipe(args + 2, &recipe) ||
        hv_arg_u64(args[7], &signature))
        return NULL;
    return hv_run_allreduce(self, args[0], args[1], &recipe, signature);
}

PyObject *hv_py_reducescatter(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    hv_recipe recipe;
    uint64_t signature;
    Py_buffer src, dst;
    int status = HV_INTERRUPTED;
    if (hv_arg_count("reducescatter", nargs, 9) || hv_check_usable(self) ||
        hv_arg_recipe(args + 3, &recipe) || hv_arg_u64(args[8], &signature) ||
        get_buffers(args[0], &src, args[1], &dst))
        return NULL;
    const size_t itemsize = hv_itemsize(recipe.dtype);
    size_t *counts = arg_counts(self, args[2], "counts", itemsize, src.len);
    if (counts) {
        const char *own = src.buf;
        for (int rank = 0; rank < self->arena.rank; rank++)
            own += counts[rank] * itemsize;
        const size_t own_bytes = counts[self->arena.rank] * itemsize;
        if (own_bytes != (size_t)dst.len)
            PyErr_Format(PyExc_ValueError, "dst has %zd bytes, this rank's share %zu", dst.len,
                         own_bytes);
        else if (!refuse_overlap(&src, &dst, dst.buf == own)) {
            enter(self);
            status = hv_reducescatter(&self->arena, src.buf, dst.buf, counts, &recipe, signature);
            leave(self);
        }
        PyMem_Free(counts);
    }
    PyBuffer_Release(&dst);
    PyBuffer_Release(&src);
    return as_result(self, status);
}

PyObject *hv_py_broadcast(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t signature;
    Py_buffer data;
    if (hv_arg_count("broadcast", nargs, 3) || hv_check_usable(self) ||
        hv_arg_u64(args[2], &signature))
        return NULL;
    const long root = PyLong_AsLong(args[1]);
    if (root == -1 && PyErr_Occurred())
        return NULL;
    if (root < 0 || root >= self->arena.size)
        return PyErr_Format(PyExc_ValueError, "root %ld is not in 0..%d", root,
                            self->arena.size - 1);
    if (hv_arg_buffer(args[0], &data, root != self->arena.rank))
        return NULL;
    enter(self);
    const int status =
        hv_broadcast(&self->arena, data.buf, (size_t)data.len, (int)root, signature);
    leave(self);
    PyBuffer_Release(&data);
    return as_result(self, status);
}

PyObject *hv_py_allgather(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t signature;
    Py_buffer src, dst;
    int status = HV_INTERRUPTED;
    if (hv_arg_count("allgather", nargs, 4) || hv_check_usable(self) ||
        hv_arg_u64(args[3], &signature) || get_buffers(args[0], &src, args[1], &dst))
        return NULL;
    size_t *counts = arg_counts(self, args[2], "counts", 1, dst.len);
    if (counts) {
        const char *own = dst.buf;
        for (int rank = 0; rank < self->arena.rank; rank++)
            own += counts[rank];
        if ((size_t)src.len != counts[self->arena.rank])
            PyErr_Format(PyExc_ValueError, "src has %zd bytes, this rank's count is %zu", src.len,
                         counts[self->arena.rank]);
        else if (!refuse_overlap(&src, &dst, src.buf == own)) {
            enter(self);
            status = hv_allgather(&self->arena, src.buf, dst.buf, counts, signature);
            leave(self);
        }
        PyMem_Free(counts);
    }
    PyBuffer_Release(&dst);
    PyBuffer_Release(&src);
    return as_result(self, status);
}

static int check_pairs(const ArenaObject *self, const size_t *sent, const size_t *received,
                       size_t largest_pair)
{
    const int me = self->arena.rank;
    for (int rank = 0; rank < self->arena.size; rank++)
        if (sent[rank] > largest_pair || received[rank] > largest_pair) {
            PyErr_SetString(PyExc_ValueError, "a count is above largest_pair");
            return -1;
        }
    if (sent[me] == received[me])
        return 0;
    PyErr_SetString(PyExc_ValueError, "this rank sends itself other than it receives from itself");
    return -1;
}

PyObject *hv_py_alltoall(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t signature;
    Py_buffer src, dst;
    int status = HV_INTERRUPTED;
    if (hv_arg_count("alltoall", nargs, 6) || hv_check_usable(self) ||
        hv_arg_u64(args[5], &signature))
        return NULL;
    const size_t largest_pair = PyLong_AsSize_t(args[4]);
    if ((largest_pair == (size_t)-1 && PyErr_Occurred()) ||
        get_buffers(args[0], &src, args[1], &dst))
        return NULL;
    size_t *sent = arg_counts(self, args[2], "send_counts", 1, src.len);
    size_t *received = sent ? arg_counts(self, args[3], "recv_counts", 1, dst.len) : NULL;
    if (received && !check_pairs(self, sent, received, largest_pair) &&
        !refuse_overlap(&src, &dst, 0)) {
        enter(self);
        status = hv_alltoall(&self->arena, src.buf, dst.buf, sent, received, largest_pair,
                             signature);
        leave(self);
    }
    PyMem_Free(sent);
    PyMem_Free(received);
    PyBuffer_Release(&dst);
    PyBuffer_Release(&src);
    return as_result(self, status);
}
#endif
