/* Collectives with everything but the arrays given beforehand.  An all-reduce's arguments are read
 * then, too: at a few bytes, reading eight of them costs as much as the reduction. */
#if defined(__linux__)
#include "arena_object.h"
#include "waiting.h"

#include <string.h>
#include <structmember.h>

enum { MOST_ARGUMENTS = 7 };

typedef PyObject *(*method)(ArenaObject *, PyObject *const *, Py_ssize_t);

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    ArenaObject *arena;
    method other; /* NULL: an all-reduce, as the recipe says */
    hv_recipe recipe;
    uint64_t signature;
    PyObject *arguments; /* of the other */
    unsigned long long calls, nanoseconds; /* of calls that ended well: statistics at no cost */
} BoundObject;

/* The result is in place: of a source apart from it, the root takes a copy first. */
static PyObject *run_broadcast(ArenaObject *arena, PyObject *const *args, Py_ssize_t nargs)
{
    const long root = PyLong_AsLong(args[2]);
    if (args[0] != args[1] && root == arena->arena.rank) {
        Py_buffer src, dst;
        if (hv_arg_buffer(args[0], &src, 0))
            return NULL;
        if (hv_arg_buffer(args[1], &dst, 1)) {
            PyBuffer_Release(&src);
            return NULL;
        }
        const int fits = src.len == dst.len;
        if (fits)
            hv_copy(dst.buf, src.buf, (size_t)dst.len);
        else
            PyErr_Format(PyExc_ValueError, "src has %zd bytes, dst %zd", src.len, dst.len);
        PyBuffer_Release(&dst);
        PyBuffer_Release(&src);
        if (!fits)
            return NULL;
    }
    return hv_py_broadcast(arena, args + 1, nargs - 1);
}

static PyObject *run_other(BoundObject *self, PyObject *src, PyObject *dst)
{
    PyObject *args[2 + MOST_ARGUMENTS] = { src, dst };
    const Py_ssize_t more = PyTuple_GET_SIZE(self->arguments);
    for (Py_ssize_t i = 0; i < more; i++)
        args[2 + i] = PyTuple_GET_ITEM(self->arguments, i);
    return self->other(self->arena, args, 2 + more);
}

static PyObject *call(PyObject *callable, PyObject *const *args, size_t nargs, PyObject *keywords)
{
    BoundObject *self = (BoundObject *)callable;
    if (keywords && PyTuple_GET_SIZE(keywords)) {
        PyErr_SetString(PyExc_TypeError, "a bound collective takes no keywords");
        return NULL;
    }
    if (hv_arg_count("bound collective", PyVectorcall_NARGS(nargs), 2))
        return NULL;
    const uint64_t began = hv_nanoseconds();
    PyObject *status =
        self->other ? run_other(self, args[0], args[1])
                    : hv_run_allreduce(self->arena, args[0], args[1], &self->recipe, self->signature);
    if (status) {
        self->calls++;
        self->nanoseconds += hv_nanoseconds() - began;
    }
    return status;
}

static void dealloc(BoundObject *self)
{
    Py_DECREF(self->arena);
    Py_XDECREF(self->arguments);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMemberDef members[] = {
    { "calls", T_ULONGLONG, offsetof(BoundObject, calls), READONLY, "calls that ended well" },
    { "nanoseconds", T_ULONGLONG, offsetof(BoundObject, nanoseconds), READONLY, "spent in them" },
    { NULL, 0, 0, 0, NULL },
};

static PyTypeObject bound_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hvdkit.native._native.Bound",
    .tp_doc = "Callable (src, dst): a collective of Arena with the other arguments bound.",
    .tp_basicsize = sizeof(BoundObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(BoundObject, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_members = members,
    .tp_dealloc = (destructor)dealloc,
};

static BoundObject *bind(ArenaObject *arena, method other)
{
    if (PyType_Ready(&bound_type))
        return NULL;
    BoundObject *bound = PyObject_New(BoundObject, &bound_type);
    if (!bound)
        return NULL;
    bound->vectorcall = call;
    bound->arena = (ArenaObject *)Py_NewRef(arena);
    bound->other = other;
    bound->arguments = NULL;
    bound->calls = bound->nanoseconds = 0;
    return bound;
}

PyObject *hv_py_bind_allreduce(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    hv_recipe recipe;
    uint64_t signature;
    if (hv_arg_count("bind_allreduce", nargs, 6) || hv_arg_recipe(args, &recipe) ||
        hv_arg_u64(args[5], &signature))
        return NULL;
    BoundObject *bound = bind(self, NULL);
    if (bound) {
        bound->recipe = recipe;
        bound->signature = signature;
    }
    return (PyObject *)bound;
}

/* The arguments are checked when the collective is called. */
PyObject *hv_py_bind(ArenaObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const struct {
        const char *name;
        method other;
    } known[] = {
        { "reducescatter", hv_py_reducescatter },
        { "broadcast", run_broadcast },
        { "allgather", hv_py_allgather },
        { "alltoall", hv_py_alltoall },
    };
    const char *name = nargs ? PyUnicode_AsUTF8(args[0]) : "";
    if (!name)
        return NULL;
    size_t i = 0;
    while (i < sizeof known / sizeof *known && strcmp(name, known[i].name))
        i++;
    if (i == sizeof known / sizeof *known || nargs > 1 + MOST_ARGUMENTS)
        return PyErr_Format(PyExc_ValueError, "there is no %s with %zd arguments to bind", name,
                            nargs - 1);
    BoundObject *bound = bind(self, known[i].other);
    if (!bound)
        return NULL;
    bound->arguments = PyTuple_New(nargs - 1);
    for (Py_ssize_t k = 1; bound->arguments && k < nargs; k++)
        PyTuple_SET_ITEM(bound->arguments, k - 1, Py_NewRef(args[k]));
    if (!bound->arguments)
        Py_CLEAR(bound);
    return (PyObject *)bound;
}
#endif
