/* An all-reduce by messages that comes after another call as it did before, so that all ranks expect
 * it: hvdkit.collectives.frames says what they expect, and .gathered and .short what they do then.
 * What Python would do for it takes longer than a small message.
 *
 *   is it as last time?    after that call, of an unchanged state: else Python does it        [1]
 *   do what was done then, which says whether all ranks have made this call                   [2]
 *   note that they have; else Python has to find out                                          [3]
 */
#include "pyargs.h"
#include "waiting.h"

#include <string.h>
#include <structmember.h>

/* What hvdkit.collectives.frames keeps in its `state`. */
enum { LAST, LAST_CALL, CHANGES, TOLD, STATE }; /* and the counts after each two calls: */
enum { IN_VAIN, SURE, VERSION, COUNTS };
enum { MOST_SURE = 8 };
static const uint64_t BEFORE = 0x9e3779b97f4a7c15u;

/* After so many others this call is known at a time: in a loop it comes after itself, and at its
 * beginning after what was before. */
enum { WAYS = 8 };

/* What is done where the call comes after the two that `last` stands for. */
typedef struct {
    PyObject *run;     /* (source, target) -> whether all ranks have made this call; NULL: no way */
    PyObject *differs; /* (source, target) -> status, where they have not */
    int64_t last;
    size_t counts;   /* where in the state those after it are; 0: nowhere */
    int64_t version; /* of what is expected there */
    int expected;    /* whether the state says how sure this way is */
} way;

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *otherwise; /* (source, target) -> status: the same in Python, which prepares this */
    int64_t signature;
    Py_buffer state;
    int prepared;
    int64_t changes; /* of the state, to which all ways belong */
    way ways[WAYS];
    size_t next; /* the way that makes room for another */
    unsigned long long calls, nanoseconds; /* of calls that ended well */
} RecurringObject;

/* What to do after the calls that were the last ones; NULL: ask Python. */
static const way *known(const RecurringObject *self)
{
    const int64_t *state = self->state.buf;
    if (!self->prepared || state[CHANGES] != self->changes)
        return NULL;
    for (size_t i = 0; i < WAYS; i++) {
        const way *how = &self->ways[i];
        if (how->run && how->last == state[LAST])
            return how->counts && state[how->counts + VERSION] != how->version ? NULL : how;
    }
    return NULL;
}

static void note(RecurringObject *self, const way *how) /* [3] */
{
    int64_t *state = self->state.buf, *counts = state + how->counts;
    if (how->expected)
        counts[SURE] += counts[SURE] < MOST_SURE;
    else if (how->counts)
        counts[IN_VAIN] = counts[SURE] = 0;
    const uint64_t before = (uint64_t)state[LAST_CALL];
    state[LAST] = (int64_t)((uint64_t)self->signature + BEFORE * before);
    state[LAST_CALL] = self->signature;
}

/* The way is a copy of its own, for Python may forget it meanwhile. */
static PyObject *make(RecurringObject *self, way how, PyObject *const *args)
{
    PyObject *status = NULL;
    Py_INCREF(how.run);
    Py_INCREF(how.differs);
    ((int64_t *)self->state.buf)[TOLD]++;
    PyObject *alike = PyObject_Vectorcall(how.run, args, 2, NULL); /* [2] */
    const int made = alike ? PyObject_IsTrue(alike) : -1;
    Py_XDECREF(alike);
    if (made > 0) {
        note(self, &how);
        status = PyLong_FromLong(0);
    } else if (!made)
        status = PyObject_Vectorcall(how.differs, args, 2, NULL);
    Py_DECREF(how.run);
    Py_DECREF(how.differs);
    return status;
}

static PyObject *call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    RecurringObject *self = (RecurringObject *)callable;
    const uint64_t began = hv_nanoseconds();
    if ((keywords && PyTuple_GET_SIZE(keywords)) ||
        hv_arg_count("recurring", PyVectorcall_NARGS(flags), 2))
        return NULL;
    const way *how = known(self); /* [1] */
    PyObject *status =
        how ? make(self, *how, args) : PyObject_Vectorcall(self->otherwise, args, 2, NULL);
    if (status && PyLong_AsLong(status) == 0) {
        self->calls++;
        self->nanoseconds += hv_nanoseconds() - began;
    }
    return status;
}

static void forget(way *how)
{
    Py_CLEAR(how->differs);
    Py_CLEAR(how->run);
}

static void let_go(RecurringObject *self)
{
    for (size_t i = 0; i < WAYS; i++)
        forget(&self->ways[i]);
    if (self->prepared)
        PyBuffer_Release(&self->state);
    self->prepared = 0;
}

/* Take the state as it is now: what was known of an earlier one is of no use. */
static int begin(RecurringObject *self, PyObject *state)
{
    if (self->prepared && ((const int64_t *)self->state.buf)[CHANGES] == self->changes)
        return 0;
    let_go(self);
    if (hv_arg_buffer(state, &self->state, 1))
        return -1;
    self->prepared = 1;
    if (self->state.len < STATE * (Py_ssize_t)sizeof(int64_t)) {
        let_go(self);
        PyErr_SetString(PyExc_ValueError, "this is no state of frames");
        return -1;
    }
    self->changes = ((const int64_t *)self->state.buf)[CHANGES];
    return 0;
}

/* Where a way is kept that comes after `last`: where another one was, if so. */
static way *place_for(RecurringObject *self, int64_t last)
{
    for (size_t i = 0; i < WAYS; i++)
        if (self->ways[i].run && self->ways[i].last == last)
            return &self->ways[i];
    way *how = &self->ways[self->next];
    self->next = (self->next + 1) % WAYS;
    return how;
}

static PyObject *prepare(RecurringObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (hv_arg_count("prepare", nargs, 6))
        return NULL;
    const long long last = PyLong_AsLongLong(args[1]);
    const size_t counts = PyLong_AsSize_t(args[2]);
    const int expected = PyObject_IsTrue(args[3]); /* then there are counts */
    if (PyErr_Occurred() || begin(self, args[0]))
        return NULL;
    const size_t length = (size_t)self->state.len / sizeof(int64_t); /* STATE and more */
    if ((expected && !counts) || counts > length - COUNTS) {
        PyErr_SetString(PyExc_ValueError, "the state has no such counts");
        return NULL;
    }
    way *how = place_for(self, last);
    forget(how);
    *how = (way){ .run = Py_NewRef(args[4]),
                  .differs = Py_NewRef(args[5]),
                  .last = last,
                  .counts = counts,
                  .version = counts ? ((const int64_t *)self->state.buf)[counts + VERSION] : 0,
                  .expected = expected };
    return Py_NewRef(Py_None);
}

static int traverse(RecurringObject *self, visitproc visit, void *arg)
{
    Py_VISIT(self->otherwise);
    for (size_t i = 0; i < WAYS; i++) {
        Py_VISIT(self->ways[i].run);
        Py_VISIT(self->ways[i].differs);
    }
    return 0;
}

static int clear(RecurringObject *self)
{
    let_go(self);
    Py_CLEAR(self->otherwise);
    return 0;
}

static void dealloc(RecurringObject *self)
{
    PyObject_GC_UnTrack(self);
    clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *otherwise;
    long long signature;
    if ((keywords && PyDict_GET_SIZE(keywords)) ||
        !PyArg_ParseTuple(args, "OL", &otherwise, &signature))
        return NULL;
    RecurringObject *self = (RecurringObject *)type->tp_alloc(type, 0);
    if (self) {
        self->vectorcall = call;
        self->otherwise = Py_NewRef(otherwise);
        self->signature = signature;
    }
    return (PyObject *)self;
}

static PyMethodDef methods[] = {
    { "prepare", (PyCFunction)(void (*)(void))prepare, METH_FASTCALL,
      "prepare(state, last, counts, expected, run, differs)" },
    { NULL, NULL, 0, NULL },
};

static PyMemberDef members[] = {
    { "calls", T_ULONGLONG, offsetof(RecurringObject, calls), READONLY, "calls that ended well" },
    { "nanoseconds", T_ULONGLONG, offsetof(RecurringObject, nanoseconds), READONLY,
      "spent in them" },
    { NULL, 0, 0, 0, NULL },
};

static PyTypeObject recurring_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hvdkit.native._native.Recurring",
    .tp_doc = "Recurring(otherwise, signature)\n--\n\n"
              "Callable (source, target): an all-reduce by messages that comes as it did before.",
    .tp_basicsize = sizeof(RecurringObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_HAVE_GC,
    .tp_new = new,
    .tp_dealloc = (destructor)dealloc,
    .tp_traverse = (traverseproc)traverse,
    .tp_clear = (inquiry)clear,
    .tp_vectorcall_offset = offsetof(RecurringObject, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_methods = methods,
    .tp_members = members,
};

int hv_add_recurring(PyObject *module)
{
    if (PyType_Ready(&recurring_type))
        return -1;
    return PyModule_AddObjectRef(module, "Recurring", (PyObject *)&recurring_type);
}
