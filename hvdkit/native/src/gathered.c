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
enum { LAST, CHANGES, TOLD, STATE };

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *otherwise; /* (source, target): the same in Python, which prepares this as well */
    PyObject *exchange, *differs;
    hv_recipe recipe;
    uint64_t signature;
    Py_buffer rows, state;
    int prepared;
    size_t rank, size;
    int64_t last, changes;
    unsigned long long calls, nanoseconds; /* of calls that ended well */
} GatheredObject;

static PyObject *combine(GatheredObject *self, void *target, size_t count)
{
    const size_t stride = (size_t)self->rows.len / self->size;
    const void **sources = PyMem_Malloc(self->size * sizeof *sources);
    if (!sources)
        return PyErr_NoMemory();
    for (size_t rank = 0; rank < self->size; rank++)
        sources[rank] = (char *)self->rows.buf + rank * stride + sizeof(uint64_t);
    hv_reduce_many(&self->recipe, &target, 1, sources, self->size, count); /* [4] */
    PyMem_Free(sources);
    return PyLong_FromLong(0);
}

static PyObject *run(GatheredObject *self, const Py_buffer *source, const Py_buffer *target)
{
    const size_t stride = (size_t)self->rows.len / self->size;
    char *rows = self->rows.buf, *mine = rows + self->rank * stride;
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
    PyObject *done = PyObject_CallNoArgs(self->exchange); /* [3] */
    if (!done)
        return NULL;
    Py_DECREF(done);
    for (size_t rank = 0; rank < self->size; rank++)
        if (memcmp(rows + rank * stride, &self->signature, sizeof self->signature)) {
            done = PyObject_CallNoArgs(self->differs);
            Py_XDECREF(done);
            return done ? PyLong_FromLong(1) : NULL;
        }
    memcpy(&state[LAST], &self->signature, sizeof self->signature);
    return combine(self, target->buf, count);
}

static PyObject *call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    GatheredObject *self = (GatheredObject *)callable;
    const uint64_t began = hv_nanoseconds();
    PyObject *status = NULL;
    if ((keywords && PyTuple_GET_SIZE(keywords)) ||
        hv_arg_count("gathered", PyVectorcall_NARGS(flags), 2))
        return NULL;
    const int64_t *state = self->state.buf;
    if (!self->prepared || state[LAST] != self->last || state[CHANGES] != self->changes) /* [1] */
        status = PyObject_Vectorcall(self->otherwise, args, 2, NULL);
    else {
        Py_buffer source, target;
        if (hv_arg_buffer(args[1], &target, 1))
            return NULL;
        if (!hv_arg_buffer(args[0], &source, 0)) {
            status = run(self, &source, &target);
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

static void let_go(GatheredObject *self)
{
    if (!self->prepared)
        return;
    self->prepared = 0;
    PyBuffer_Release(&self->rows);
    PyBuffer_Release(&self->state);
    Py_CLEAR(self->exchange);
    Py_CLEAR(self->differs);
}

static PyObject *prepare(GatheredObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (hv_arg_count("prepare", nargs, 6))
        return NULL;
    let_go(self);
    const long long last = PyLong_AsLongLong(args[0]);
    const size_t rank = PyLong_AsSize_t(args[1]), size = PyLong_AsSize_t(args[2]);
    if (PyErr_Occurred() || hv_arg_buffer(args[3], &self->state, 1))
        return NULL;
    if (hv_arg_buffer(args[4], &self->rows, 1)) {
        PyBuffer_Release(&self->state);
        return NULL;
    }
    self->exchange = PyObject_GetAttrString(args[5], "run");
    self->differs = PyObject_GetAttrString(args[5], "differ");
    self->prepared = 1;
    if (!self->exchange || !self->differs || rank >= size ||
        self->state.len != STATE * (Py_ssize_t)sizeof(int64_t) || !self->rows.len ||
        (size_t)self->rows.len % (size * sizeof(int64_t))) {
        let_go(self);
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "these are no frames");
        return NULL;
    }
    self->rank = rank;
    self->size = size;
    self->last = last;
    self->changes = ((const int64_t *)self->state.buf)[CHANGES];
    return Py_NewRef(Py_None);
}

static int traverse(GatheredObject *self, visitproc visit, void *arg)
{
    Py_VISIT(self->otherwise);
    Py_VISIT(self->exchange);
    Py_VISIT(self->differs);
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
      "prepare(last, rank, size, state, rows, frame)" },
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
