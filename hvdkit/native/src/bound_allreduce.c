/* An all-reduce with everything but the arrays given beforehand: at a few bytes, reading eight
 * arguments costs as much as the reduction. */
#if defined(__linux__)
#include "arena_object.h"

#include <structmember.h>
#include <time.h>

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    ArenaObject *arena;
    hv_recipe recipe;
    uint64_t signature;
    unsigned long long calls, nanoseconds; /* of calls that ended well: statistics at no cost */
} BoundObject;

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static PyObject *call(PyObject *callable, PyObject *const *args, size_t nargs, PyObject *keywords)
{
    BoundObject *self = (BoundObject *)callable;
    if (keywords && PyTuple_GET_SIZE(keywords)) {
        PyErr_SetString(PyExc_TypeError, "a bound all-reduce takes no keywords");
        return NULL;
    }
    if (hv_arg_count("bound allreduce", PyVectorcall_NARGS(nargs), 2))
        return NULL;
    const uint64_t began = now();
    PyObject *status =
        hv_run_allreduce(self->arena, args[0], args[1], &self->recipe, self->signature);
    if (status) {
        self->calls++;
        self->nanoseconds += now() - began;
    }
    return status;
}

static void dealloc(BoundObject *self)
{
    Py_DECREF(self->arena);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMemberDef members[] = {
    { "calls", T_ULONGLONG, offsetof(BoundObject, calls), READONLY, "calls that ended well" },
    { "nanoseconds", T_ULONGLONG, offsetof(BoundObject, nanoseconds), READONLY, "spent in them" },
    { NULL, 0, 0, 0, NULL },
};

static PyTypeObject bound_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hvdkit.native._native.BoundAllreduce",
    .tp_doc = "Callable (src, dst): as Arena.allreduce with the other arguments bound.",
    .tp_basicsize = sizeof(BoundObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(BoundObject, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_members = members,
    .tp_dealloc = (destructor)dealloc,
};

PyObject *hv_py_bind_allreduce(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    hv_recipe recipe;
    uint64_t signature;
    if (hv_arg_count("bind_allreduce", nargs, 6) || hv_arg_recipe(args, &recipe) ||
        hv_arg_u64(args[5], &signature) || PyType_Ready(&bound_type))
        return NULL;
    BoundObject *bound = PyObject_New(BoundObject, &bound_type);
    if (!bound)
        return NULL;
    bound->vectorcall = call;
    bound->arena = (ArenaObject *)Py_NewRef(self);
    bound->recipe = recipe;
    bound->signature = signature;
    bound->calls = bound->nanoseconds = 0;
    return (PyObject *)bound;
}
#endif
