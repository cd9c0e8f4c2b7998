/* The all-reduce of small arrays over messages, made again: hvdkit.collectives.gathered says what it
 * is.  What Python would do for it takes longer than a small message.
 *
 *   is it as last time?    the frames expect this call, in this memory; else Python does it    [1]
 *   put the elements into this rank's frame, behind the signature                             [2]
 *   exchange the frames                                                                       [3]
 *   compare signatures, and combine everybody's elements                                      [4]
 */
#include "pyargs.h"
#include "waiting.h"

#include <string.h>
#include <structmember.h>

/* What hvdkit.collectives.frames keeps in its `state`. */
enum { LAST, CHANGES, TOLD, STATE }; /* and marks of frames that were sent in vain */

/* After so many other calls this one is known at a time: in a loop it comes after itself, and at its
 * beginning after what was before. */
enum { WAYS = 4 };

/* What is done where the call comes after `last`. */
typedef struct {
    PyObject *exchange, *differs; /* NULL: nothing is known */
    Py_buffer rows;
    int64_t last;
    size_t mark; /* in the state; 0: none */
} way;

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *otherwise; /* (source, target): the same in Python, which prepares this as well */
    hv_recipe recipe;
    uint64_t signature;
    Py_buffer state;
    int prepared;
    size_t rank, size;
    int64_t changes; /* of the state, to which all ways belong */
    way ways[WAYS];
    size_t next; /* the way that makes room for another */
    unsigned long long calls, nanoseconds; /* of calls that ended well */
} GatheredObject;

static PyObject *combine(GatheredObject *self, const way *how, void *target, size_t count)
{
    const size_t stride = (size_t)how->rows.len / self->size;
    const void **sources = PyMem_Malloc(self->size * sizeof *sources);
    if (!sources)
        return PyErr_NoMemory();
    for (size_t rank = 0; rank < self->size; rank++)
        sources[rank] = (char *)how->rows.buf + rank * stride + sizeof(uint64_t);
    hv_reduce_many(&self->recipe, &target, 1, sources, self->size, count); /* [4] */
    PyMem_Free(sources);
    return PyLong_FromLong(0);
}

static PyObject *run(GatheredObject *self, const way *how, const Py_buffer *source,
                     const Py_buffer *target)
{
    const size_t stride = (size_t)how->rows.len / self->size;
    char *rows = how->rows.buf, *mine = rows + self->rank * stride;
    int64_t *state = self->state.buf;
    size_t count;
    if (source->len != target->len || (size_t)source->len > stride - sizeof(uint64_t)) {
        PyErr_Format(PyExc_ValueError, "source has %zd bytes, target %zd", source->len, target->len);
        return NULL;
    }
    if (hv_arg_elements(target->len, self->recipe.dtype, &count))
        return NULL;
    memcpy(mine, &self->signature, sizeof self->signature); /* [2] */
    memcpy(mine + sizeof self->signature, source->buf, (size_t)source->len);
    state[TOLD]++;
    PyObject *done = PyObject_CallNoArgs(how->exchange); /* [3] */
    if (!done)
        return NULL;
    Py_DECREF(done);
    for (size_t rank = 0; rank < self->size; rank++)
        if (memcmp(rows + rank * stride, &self->signature, sizeof self->signature)) {
            done = PyObject_CallNoArgs(how->differs);
            Py_XDECREF(done);
            return done ? PyLong_FromLong(1) : NULL;
        }
    if (how->mark)
        state[how->mark] = 0;
    memcpy(&state[LAST], &self->signature, sizeof self->signature);
    return combine(self, how, target->buf, count);
}

/* What to do after the call that was the last one; NULL: ask Python. */
static const way *known(const GatheredObject *self)
{
    const int64_t *state = self->state.buf;
    if (!self->prepared || state[CHANGES] != self->changes)
        return NULL;
    for (size_t i = 0; i < WAYS; i++)
        if (self->ways[i].exchange && self->ways[i].last == state[LAST])
            return &self->ways[i];
    return NULL;
}

static PyObject *call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    GatheredObject *self = (GatheredObject *)callable;
    const uint64_t began = hv_nanoseconds();
    PyObject *status = NULL;
    if ((keywords && PyTuple_GET_SIZE(keywords)) ||
        hv_arg_count("gathered", PyVectorcall_NARGS(flags), 2))
        return NULL;
    const way *how = known(self); /* [1] */
    if (!how)
        status = PyObject_Vectorcall(self->otherwise, args, 2, NULL);
    else {
        Py_buffer source, target;
        if (hv_arg_buffer(args[1], &target, 1))
            return NULL;
        if (!hv_arg_buffer(args[0], &source, 0)) {
            status = run(self, how, &source, &target);
            PyBuffer_Release(&source);
        }
        PyBuffer_Release(&target);
    }
    if (status && PyLong_AsLong(status) == 0) {
        self->calls++;
        self->nanoseconds += hv_nanoseconds() - began;
    }
    return status;
}

static void forget(way *how)
{
    if (!how->exchange)
        return;
    PyBuffer_Release(&how->rows);
    Py_CLEAR(how->differs);
    Py_CLEAR(how->exchange);
}

static void let_go(GatheredObject *self)
{
    for (size_t i = 0; i < WAYS; i++)
        forget(&self->ways[i]);
    if (self->prepared)
        PyBuffer_Release(&self->state);
    self->prepared = 0;
}

/* Take the state as it is now: what was known of an earlier one is of no use. */
static int begin(GatheredObject *self, PyObject *state)
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

static PyObject *prepare(GatheredObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (hv_arg_count("prepare", nargs, 7))
        return NULL;
    const long long last = PyLong_AsLongLong(args[0]);
    const size_t mark = PyLong_AsSize_t(args[1]);
    const size_t rank = PyLong_AsSize_t(args[2]), size = PyLong_AsSize_t(args[3]);
    if (PyErr_Occurred() || begin(self, args[4]))
        return NULL;
    way *how = &self->ways[self->next];
    self->next = (self->next + 1) % WAYS;
    forget(how);
    Py_buffer rows;
    if (hv_arg_buffer(args[5], &rows, 1))
        return NULL;
    PyObject *exchange = PyObject_GetAttrString(args[6], "run");
    PyObject *differs = exchange ? PyObject_GetAttrString(args[6], "differ") : NULL;
    if (!differs || rank >= size || !rows.len || (size_t)rows.len % (size * sizeof(int64_t)) ||
        mark >= (size_t)self->state.len / sizeof(int64_t)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "these are no frames");
        Py_XDECREF(exchange);
        Py_XDECREF(differs);
        PyBuffer_Release(&rows);
        return NULL;
    }
    self->rank = rank;
    self->size = size;
    *how = (way){
        .exchange = exchange, .differs = differs, .rows = rows, .last = last, .mark = mark
    };
    return Py_NewRef(Py_None);
}

static int traverse(GatheredObject *self, visitproc visit, void *arg)
{
    Py_VISIT(self->otherwise);
    for (size_t i = 0; i < WAYS; i++) {
        Py_VISIT(self->ways[i].exchange);
        Py_VISIT(self->ways[i].differs);
    }
    return 0;
}

static int clear(GatheredObject *self)
{
    let_go(self);
    Py_CLEAR(self->otherwise);
    return 0;
}

static void dealloc(GatheredObject *self)
{
    PyObject_GC_UnTrack(self);
    clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *otherwise, *recipe;
    hv_recipe made;
    uint64_t signature;
    if ((keywords && PyDict_GET_SIZE(keywords)) ||
        !PyArg_ParseTuple(args, "OO!", &otherwise, &PyTuple_Type, &recipe) ||
        hv_arg_count("recipe", PyTuple_GET_SIZE(recipe), 6) ||
        hv_arg_recipe(&PyTuple_GET_ITEM(recipe, 0), &made) ||
        hv_arg_u64(PyTuple_GET_ITEM(recipe, 5), &signature))
        return NULL;
    GatheredObject *self = (GatheredObject *)type->tp_alloc(type, 0);
    if (self) {
        self->vectorcall = call;
        self->otherwise = Py_NewRef(otherwise);
        self->recipe = made;
        self->signature = signature;
    }
    return (PyObject *)self;
}

static PyMethodDef methods[] = {
    { "prepare", (PyCFunction)(void (*)(void))prepare, METH_FASTCALL,
      "prepare(last, mark, rank, size, state, rows, frame)" },
    { NULL, NULL, 0, NULL },
};

static PyMemberDef members[] = {
    { "calls", T_ULONGLONG, offsetof(GatheredObject, calls), READONLY, "calls that ended well" },
    { "nanoseconds", T_ULONGLONG, offsetof(GatheredObject, nanoseconds), READONLY, "spent in them" },
    { NULL, 0, 0, 0, NULL },
};

static PyTypeObject gathered_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hvdkit.native._native.Gathered",
    .tp_doc = "Gathered(otherwise, recipe)\n--\n\n"
              "Callable (source, target): an all-reduce by messages like one before.",
    .tp_basicsize = sizeof(GatheredObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_HAVE_GC,
    .tp_new = new,
    .tp_dealloc = (destructor)dealloc,
    .tp_traverse = (traverseproc)traverse,
    .tp_clear = (inquiry)clear,
    .tp_vectorcall_offset = offsetof(GatheredObject, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_methods = methods,
    .tp_members = members,
};

int hv_add_gathered(PyObject *module)
{
    if (PyType_Ready(&gathered_type))
        return -1;
    return PyModule_AddObjectRef(module, "Gathered", (PyObject *)&gathered_type);
}
