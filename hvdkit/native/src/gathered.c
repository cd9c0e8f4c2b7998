/* The all-reduce of small arrays in frames: hvdkit.collectives.gathered says what it is.
 *
 *   put the elements into this rank's frame, behind the signature    [1]
 *   exchange the frames                                              [2]
 *   compare signatures, and combine everybody's elements             [3]
 */
#include "pyargs.h"

#include <string.h>

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *exchange;
    hv_recipe recipe;
    uint64_t signature;
    Py_buffer rows;
    size_t rank, size;
    const void **sources; /* everybody's elements */
} GatheredObject;

static PyObject *reduce(GatheredObject *self, const Py_buffer *source, const Py_buffer *target)
{
    const size_t stride = (size_t)self->rows.len / self->size;
    char *rows = self->rows.buf, *mine = rows + self->rank * stride;
    void *result = target->buf;
    size_t count;
    if (source->len != target->len || (size_t)source->len > stride - sizeof(uint64_t)) {
        PyErr_Format(PyExc_ValueError, "source has %zd bytes, target %zd", source->len, target->len);
        return NULL;
    }
    if (hv_arg_elements(target->len, self->recipe.dtype, &count))
        return NULL;
    memcpy(mine, &self->signature, sizeof self->signature); /* [1] */
    memcpy(mine + sizeof self->signature, source->buf, (size_t)source->len);
    PyObject *done = PyObject_CallNoArgs(self->exchange); /* [2] */
    if (!done)
        return NULL;
    Py_DECREF(done);
    for (size_t rank = 0; rank < self->size; rank++)
        if (memcmp(rows + rank * stride, &self->signature, sizeof self->signature))
            Py_RETURN_FALSE;
    hv_reduce_many(&self->recipe, &result, 1, self->sources, self->size, count); /* [3] */
    Py_RETURN_TRUE;
}

static PyObject *call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    GatheredObject *self = (GatheredObject *)callable;
    PyObject *result = NULL;
    Py_buffer source, target;
    if ((keywords && PyTuple_GET_SIZE(keywords)) ||
        hv_arg_count("gathered", PyVectorcall_NARGS(flags), 2) ||
        hv_arg_buffer(args[1], &target, 1))
        return NULL;
    if (!hv_arg_buffer(args[0], &source, 0)) {
        result = reduce(self, &source, &target);
        PyBuffer_Release(&source);
    }
    PyBuffer_Release(&target);
    return result;
}

static int traverse(GatheredObject *self, visitproc visit, void *arg)
{
    Py_VISIT(self->exchange);
    return 0;
}

static int clear(GatheredObject *self)
{
    Py_CLEAR(self->exchange);
    return 0;
}

static void dealloc(GatheredObject *self)
{
    PyObject_GC_UnTrack(self);
    clear(self);
    PyMem_Free(self->sources);
    PyBuffer_Release(&self->rows);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *recipe, *exchange;
    Py_buffer rows;
    Py_ssize_t rank, size;
    if ((keywords && PyDict_GET_SIZE(keywords)) ||
        !PyArg_ParseTuple(args, "O!w*nnO", &PyTuple_Type, &recipe, &rows, &rank, &size, &exchange))
        return NULL;
    GatheredObject *self = (GatheredObject *)type->tp_alloc(type, 0);
    if (!self) {
        PyBuffer_Release(&rows);
        return NULL;
    }
    self->vectorcall = call;
    self->rows = rows;
    self->rank = (size_t)rank;
    self->size = (size_t)size;
    if (rank < 0 || rank >= size || !rows.len || rows.len % (size * (Py_ssize_t)sizeof(int64_t)))
        PyErr_SetString(PyExc_ValueError, "these are no frames");
    else if (!hv_arg_count("recipe", PyTuple_GET_SIZE(recipe), 6) &&
             !hv_arg_recipe(&PyTuple_GET_ITEM(recipe, 0), &self->recipe) &&
             !hv_arg_u64(PyTuple_GET_ITEM(recipe, 5), &self->signature)) {
        self->sources = PyMem_Calloc((size_t)size, sizeof *self->sources);
        if (self->sources) {
            const size_t stride = (size_t)rows.len / self->size;
            for (size_t i = 0; i < self->size; i++)
                self->sources[i] = (char *)rows.buf + i * stride + sizeof(uint64_t);
            self->exchange = Py_NewRef(exchange);
            return (PyObject *)self;
        }
        PyErr_NoMemory();
    }
    Py_DECREF(self);
    return NULL;
}

static PyTypeObject gathered_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hvdkit.native._native.Gathered",
    .tp_doc = "Gathered(recipe, rows, rank, size, exchange)\n--\n\n"
              "Callable (source, target): a small all-reduce in frames; whether all are alike.",
    .tp_basicsize = sizeof(GatheredObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_HAVE_GC,
    .tp_new = new,
    .tp_dealloc = (destructor)dealloc,
    .tp_traverse = (traverseproc)traverse,
    .tp_clear = (inquiry)clear,
    .tp_vectorcall_offset = offsetof(GatheredObject, vectorcall),
    .tp_call = PyVectorcall_Call,
};

int hv_add_gathered(PyObject *module)
{
    if (PyType_Ready(&gathered_type))
        return -1;
    return PyModule_AddObjectRef(module, "Gathered", (PyObject *)&gathered_type);
}
