/* Messages of an MPI library that were set up once (MPI_Send_init, MPI_Recv_init), and are sent and
 * received again and again.
 *
 * No header of any MPI is needed for that: MPI_Startall and MPI_Testall take numbers and addresses
 * alone.  Where they are, and how large a request and a status are, mpi4py knows.
 */
#include "pyargs.h"
#include "waiting.h"

typedef int (*start_function)(int, void *);
typedef int (*test_function)(int, void *, int *, void *);

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    start_function start;
    test_function test;
    Py_buffer requests, statuses;
    PyObject *wait;
    int count;
    long looks;
} PersistentObject;

static PyObject *call(PyObject *callable, PyObject *const *Py_UNUSED(args), size_t flags,
                      PyObject *keywords)
{
    PersistentObject *self = (PersistentObject *)callable;
    int error, done = 0;
    if ((keywords && PyTuple_GET_SIZE(keywords)) ||
        hv_arg_count("run", PyVectorcall_NARGS(flags), 0))
        return NULL;
    const char *function = "MPI_Startall";
    Py_BEGIN_ALLOW_THREADS
    error = self->start(self->count, self->requests.buf);
    if (!error) {
        function = "MPI_Testall";
        hv_patience patience = hv_patience_of(self->looks);
        do
            error = self->test(self->count, self->requests.buf, &done, self->statuses.buf);
        while (!done && !error && hv_wait_a_little(&patience));
    }
    Py_END_ALLOW_THREADS
    if (error)
        return PyErr_Format(PyExc_RuntimeError, "%s failed with error %d", function, error);
    return done ? Py_NewRef(Py_None) : PyObject_CallNoArgs(self->wait);
}

static int traverse(PersistentObject *self, visitproc visit, void *arg)
{
    Py_VISIT(self->wait);
    return 0;
}

static int clear(PersistentObject *self)
{
    Py_CLEAR(self->wait);
    return 0;
}

static void dealloc(PersistentObject *self)
{
    PyObject_GC_UnTrack(self);
    clear(self);
    PyBuffer_Release(&self->requests);
    PyBuffer_Release(&self->statuses);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *start, *test, *wait;
    Py_buffer requests, statuses;
    int count;
    long looks;
    if ((keywords && PyDict_GET_SIZE(keywords)) ||
        !PyArg_ParseTuple(args, "OOw*w*ilO", &start, &test, &requests, &statuses, &count, &looks,
                          &wait))
        return NULL;
    void *addresses[] = { PyLong_AsVoidPtr(start), PyLong_AsVoidPtr(test) };
    PersistentObject *self = NULL;
    if (!PyErr_Occurred() && (!addresses[0] || !addresses[1] || count < 1))
        PyErr_SetString(PyExc_ValueError, "there are no functions, or no requests");
    if (!PyErr_Occurred())
        self = (PersistentObject *)type->tp_alloc(type, 0);
    if (!self) {
        PyBuffer_Release(&requests);
        PyBuffer_Release(&statuses);
        return NULL;
    }
    self->vectorcall = call;
    self->start = (start_function)addresses[0];
    self->test = (test_function)addresses[1];
    self->requests = requests;
    self->statuses = statuses;
    self->count = count;
    self->looks = looks;
    self->wait = Py_NewRef(wait);
    return (PyObject *)self;
}

static PyTypeObject persistent_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hvdkit.native._native.Persistent",
    .tp_doc = "Persistent(start, test, requests, statuses, count, looks, wait)\n--\n\n"
              "Callable (): start the requests, look for their end, and then wait() for it.",
    .tp_basicsize = sizeof(PersistentObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_HAVE_GC,
    .tp_new = new,
    .tp_dealloc = (destructor)dealloc,
    .tp_traverse = (traverseproc)traverse,
    .tp_clear = (inquiry)clear,
    .tp_vectorcall_offset = offsetof(PersistentObject, vectorcall),
    .tp_call = PyVectorcall_Call,
};

int hv_add_persistent(PyObject *module)
{
    if (PyType_Ready(&persistent_type))
        return -1;
    return PyModule_AddObjectRef(module, "Persistent", (PyObject *)&persistent_type);
}
