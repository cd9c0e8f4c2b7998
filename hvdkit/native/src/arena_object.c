/* The Python type Arena: its construction and end, regions, attributes. */
#if defined(__linux__)
#include "arena_object.h"

#include <pthread.h>
#include <structmember.h>

/* -------------------------------------------------------------------------------------- regions */

static PyObject *register_region(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (hv_arg_count("register", nargs, 2) || hv_check_usable(self))
        return NULL;
    const size_t stride = PyLong_AsSize_t(args[1]);
    if (stride == (size_t)-1 && PyErr_Occurred())
        return NULL;
    for (int i = 0; i < HV_MAX_REGIONS; i++) {
        hv_region *region = &self->arena.regions[i];
        if (region->id)
            continue;
        Py_buffer *memory = &self->region_memory[i];
        if (hv_arg_buffer(args[0], memory, 1))
            return NULL;
        if (!stride || (size_t)memory->len / stride < (size_t)self->arena.size) {
            PyErr_Format(PyExc_ValueError, "%zd bytes do not hold %d blocks of %zu", memory->len,
                         self->arena.size, stride);
            PyBuffer_Release(memory);
            return NULL;
        }
        region->base = memory->buf;
        region->stride = stride;
        region->id = ++self->arena.last_region;
        if (self->arena.region_count <= i)
            self->arena.region_count = i + 1;
        return PyLong_FromUnsignedLongLong(region->id);
    }
    return PyErr_Format(PyExc_ValueError, "%d regions are registered already", HV_MAX_REGIONS);
}

static PyObject *unregister_region(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t id;
    if (hv_arg_count("unregister", nargs, 1) || hv_arg_u64(args[0], &id))
        return NULL;
    if (self->busy) {
        PyErr_SetString(hv_arena_error, "the arena is in use by another thread");
        return NULL;
    }
    for (int i = 0; id && i < HV_MAX_REGIONS; i++)
        if (self->arena.regions[i].id == id) {
            self->arena.regions[i].id = 0;
            PyBuffer_Release(&self->region_memory[i]);
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "no region %llu", (unsigned long long)id);
}

/* ---------------------------------------------------------------------------- life of an object */

static PyObject *abort_arena(ArenaObject *self, PyObject *Py_UNUSED(unused))
{
    if (self->open && self->forks == hv_forks)
        hv_arena_abort(&self->arena, HV_GAVE_UP, self->arena.rank);
    Py_RETURN_NONE;
}

static void release(ArenaObject *self)
{
    if (!self->open)
        return;
    self->open = 0;
    if (self->forks == hv_forks)
        hv_arena_close(&self->arena);
    for (int i = 0; i < HV_MAX_REGIONS; i++)
        if (self->arena.regions[i].id)
            PyBuffer_Release(&self->region_memory[i]);
    PyBuffer_Release(&self->memory);
}

static PyObject *close_arena(ArenaObject *self, PyObject *Py_UNUSED(unused))
{
    if (self->busy) {
        PyErr_SetString(hv_arena_error, "the arena is in use by another thread");
        return NULL;
    }
    release(self);
    Py_RETURN_NONE;
}

static int init(ArenaObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = { "memory", "rank", "size", "slot_bytes", "spin_iterations", NULL };
    PyObject *memory;
    int rank, size;
    Py_ssize_t slot_bytes;
    unsigned int spin_iterations;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OiinI:Arena", names, &memory, &rank, &size,
                                     &slot_bytes, &spin_iterations))
        return -1;
    if (self->open) {
        PyErr_SetString(PyExc_ValueError, "the arena is initialised already");
        return -1;
    }
    if (size < 1 || size > HV_MAX_RANKS || rank < 0 || rank >= size) {
        PyErr_Format(PyExc_ValueError, "rank %d of %d ranks; up to %d are possible", rank, size,
                     HV_MAX_RANKS);
        return -1;
    }
    if (slot_bytes < (Py_ssize_t)size * HV_SHARE_ALIGN) {
        PyErr_Format(PyExc_ValueError, "slot_bytes must be %d or more for %d ranks, not %zd",
                     size * HV_SHARE_ALIGN, size, slot_bytes);
        return -1;
    }
    if (hv_arg_buffer(memory, &self->memory, 1))
        return -1;
    const size_t needed = hv_arena_bytes((size_t)size, (size_t)slot_bytes);
    if ((size_t)self->memory.len < needed || (uintptr_t)self->memory.buf % HV_LINE) {
        PyErr_Format(PyExc_ValueError,
                     "the arena needs %zu bytes aligned to %d; the memory has %zd at %p", needed,
                     HV_LINE, self->memory.len, self->memory.buf);
        PyBuffer_Release(&self->memory);
        return -1;
    }
    hv_arena_attach(&self->arena, self->memory.buf, rank, size, (size_t)slot_bytes,
                    spin_iterations);
    self->arena.interrupted = hv_run_signal_handlers;
    self->arena.context = self;
    self->forks = hv_forks;
    self->open = 1;
    return 0;
}

static void dealloc(ArenaObject *self)
{
    release(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *get_aborted(ArenaObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->open && hv_arena_abort_word(&self->arena));
}

static PyObject *get_small_limit(ArenaObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(hv_small_limit(&self->arena));
}

#define FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

static PyMethodDef methods[] = {
    { "barrier", FAST(hv_py_barrier), "barrier(signature)" },
    { "exchange", FAST(hv_py_exchange), "exchange(payload, signature)" },
    { "allreduce", FAST(hv_py_allreduce),
      "allreduce(src, dst, dtype, op, prescale, divisor, postscale, signature)" },
    { "bind_allreduce", FAST(hv_py_bind_allreduce),
      "bind_allreduce(dtype, op, prescale, divisor, postscale, signature): callable (src, dst)" },
    { "bind", FAST(hv_py_bind),
      "bind(name, *arguments): another collective, without its buffers: callable (src, dst)" },
    { "reducescatter", FAST(hv_py_reducescatter),
      "reducescatter(src, dst, counts, dtype, op, prescale, divisor, postscale, signature)" },
    { "broadcast", FAST(hv_py_broadcast), "broadcast(buffer, root, signature)" },
    { "allgather", FAST(hv_py_allgather), "allgather(src, dst, counts, signature)" },
    { "alltoall", FAST(hv_py_alltoall),
      "alltoall(src, dst, send_counts, recv_counts, largest_pair, signature)" },
    { "register", FAST(register_region), "register(memory, stride): the region's id" },
    { "unregister", FAST(unregister_region), "unregister(id)" },
    { "abort", (PyCFunction)abort_arena, METH_NOARGS, "Make every rank's next wait an error." },
    { "close", (PyCFunction)close_arena, METH_NOARGS, "Mark this rank closed, release buffers." },
    { NULL, NULL, 0, NULL },
};

static PyMemberDef members[] = {
    { "rank", T_INT, offsetof(ArenaObject, arena.rank), READONLY, NULL },
    { "size", T_INT, offsetof(ArenaObject, arena.size), READONLY, NULL },
    { "slot_bytes", T_PYSSIZET, offsetof(ArenaObject, arena.slot_bytes), READONLY, NULL },
    { "operations", T_ULONGLONG, offsetof(ArenaObject, arena.operations), READONLY, NULL },
    { "spin_iterations", T_UINT, offsetof(ArenaObject, arena.spin_iterations), 0, NULL },
    { NULL, 0, 0, 0, NULL },
};

static PyGetSetDef computed[] = {
    { "aborted", (getter)get_aborted, NULL, "whether every call raises", NULL },
    { "small_limit", (getter)get_small_limit, NULL, "bytes of the largest one-round allreduce", NULL },
    { NULL, NULL, NULL, NULL, NULL },
};

static PyTypeObject arena_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hvdkit.native._native.Arena",
    .tp_doc = "Arena(memory, rank, size, slot_bytes, spin_iterations)\n--\n\n"
              "Collectives between the ranks of one node, over shared memory that was zeroed once.",
    .tp_basicsize = sizeof(ArenaObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)init,
    .tp_dealloc = (destructor)dealloc,
    .tp_methods = methods,
    .tp_members = members,
    .tp_getset = computed,
};

static PyObject *arena_bytes(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (hv_arg_count("arena_bytes", nargs, 2))
        return NULL;
    const size_t size = PyLong_AsSize_t(args[0]);
    if (size == (size_t)-1 && PyErr_Occurred())
        return NULL;
    const size_t slot_bytes = PyLong_AsSize_t(args[1]);
    if (slot_bytes == (size_t)-1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromSize_t(hv_arena_bytes(size, slot_bytes));
}

static PyMethodDef arena_functions[] = {
    { "arena_bytes", FAST(arena_bytes),
      "arena_bytes(size, slot_bytes)\n--\n\nBytes of shared memory that an arena needs." },
    { NULL, NULL, 0, NULL },
};

unsigned hv_forks;

static void count_fork(void) { hv_forks++; }

int hv_add_arena(PyObject *module)
{
    hv_arena_error = PyErr_NewExceptionWithDoc(
        "hvdkit.native._native.ArenaError",
        "A local rank died, gave up or closed while others waited for it.", PyExc_RuntimeError,
        NULL);
    if (pthread_atfork(NULL, NULL, count_fork)) {
        PyErr_NoMemory();
        return -1;
    }
    if (!hv_arena_error || PyType_Ready(&arena_type) ||
        PyModule_AddFunctions(module, arena_functions) ||
        PyModule_AddObjectRef(module, "ArenaError", hv_arena_error))
        return -1;
    return PyModule_AddObjectRef(module, "Arena", (PyObject *)&arena_type);
}
#endif
