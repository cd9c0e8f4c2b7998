/* The short way of a collective: a call like an earlier one, of which all but the array is known.
 *
 * For a few bytes, what Python does to find out what is asked for costs more than the transfer.  So
 * calls are kept here by the array's dtype and shape and by the other arguments, each with what does
 * it; a call that is not known, or finds the lane in use, is the caller's own to make.
 *
 *   take the lane        as Lane.call does: if it is free, and nobody is in it            [1]
 *   say what is done     for those who watch over stalls                                  [2]
 *   do it                a bound collective of the arena; nonzero: signatures differed    [3]
 *   leave the lane
 */
#include "pyargs.h"

enum { MOST_DIMENSIONS = 8, BUCKETS = 512, MOST_ENTRIES = 4096 };

typedef struct {
    PyObject *dtype;
    int dimensions;
    Py_ssize_t shape[MOST_DIMENSIONS];
    uint64_t hash;
} key;

typedef struct entry {
    struct entry *next;
    key key;
    PyObject *arguments; /* a tuple: all but the array */
    PyObject *bound;     /* (array, target): does it */
    PyObject *again;     /* (array): after signatures differed; None: try again, else the result */
    PyObject *plan;      /* what is being done, for whoever asks */
    PyObject *result;    /* arguments of `allocate`, a tuple; None: the array itself */
} entry;

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *array_type, *allocate, *lane, *take, *leave, *group;
    entry *buckets[BUCKETS];
    size_t entries;
} ShortWayObject;

static PyObject *name_dtype, *name_free, *name_doing;

static PyObject *unknown(void) { return Py_NewRef(Py_NotImplemented); }

/* ----------------------------------------------------------------------------------------- keys */

static uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;
}

/* 1 with the key, 0 if the array has none; never leaves an exception. */
static int make_key(PyObject *array, PyObject *const *arguments, Py_ssize_t count, key *made,
                    int *readonly)
{
    Py_buffer view;
    if (PyObject_GetBuffer(array, &view, PyBUF_ND)) { /* not contiguous */
        PyErr_Clear();
        return 0;
    }
    const int fits = view.ndim <= MOST_DIMENSIONS;
    made->dimensions = view.ndim;
    made->hash = (uint64_t)view.ndim;
    for (int i = 0; fits && i < view.ndim; i++) {
        made->shape[i] = view.shape[i];
        made->hash = mix(made->hash, (uint64_t)view.shape[i]);
    }
    *readonly = view.readonly;
    PyBuffer_Release(&view);
    made->dtype = fits ? PyObject_GetAttr(array, name_dtype) : NULL;
    if (!made->dtype) {
        PyErr_Clear();
        return 0;
    }
    made->hash = mix(made->hash, (uint64_t)(uintptr_t)made->dtype);
    for (Py_ssize_t i = 0; i < count; i++) /* names tell calls apart; a string knows its hash */
        if (PyUnicode_CheckExact(arguments[i]))
            made->hash = mix(made->hash, (uint64_t)PyObject_Hash(arguments[i]));
    return 1;
}

/* Of one type, so that 1 is not True.  Only of types whose comparison runs no code of others', which
 * might change what is being searched; anything else is equal to itself alone, as operations are. */
static int same_argument(PyObject *a, PyObject *b)
{
    if (a == b)
        return 1;
    if (Py_TYPE(a) != Py_TYPE(b) ||
        !(PyUnicode_CheckExact(a) || PyFloat_CheckExact(a) || PyLong_CheckExact(a)))
        return 0;
    return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

static int same_call(const entry *known, const key *asked, PyObject *const *arguments,
                     Py_ssize_t count)
{
    if (known->key.hash != asked->hash || known->key.dtype != asked->dtype ||
        known->key.dimensions != asked->dimensions || PyTuple_GET_SIZE(known->arguments) != count)
        return 0;
    for (int i = 0; i < asked->dimensions; i++)
        if (known->key.shape[i] != asked->shape[i])
            return 0;
    for (Py_ssize_t i = 0; i < count; i++)
        if (!same_argument(PyTuple_GET_ITEM(known->arguments, i), arguments[i]))
            return 0;
    return 1;
}

static entry **find(ShortWayObject *self, const key *asked, PyObject *const *arguments,
                    Py_ssize_t count)
{
    entry **place = &self->buckets[asked->hash % BUCKETS];
    while (*place && !same_call(*place, asked, arguments, count))
        place = &(*place)->next;
    return place;
}

/* -------------------------------------------------------------------------------------- calling */

static int is_true_attribute(PyObject *object, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(object, name);
    Py_XDECREF(value); /* True, if it is that, stays */
    return !value ? -1 : value == Py_True;
}

/* 1 if the lane is this thread's now, 0 if it is not to be had at once. */
static int take_lane(ShortWayObject *self)
{
    const int is_free = is_true_attribute(self->lane, name_free);
    if (is_free <= 0)
        return is_free;
    PyObject *waiting[] = { Py_False };
    PyObject *taken = PyObject_Vectorcall(self->take, waiting, 1, NULL);
    Py_XDECREF(taken);
    return !taken ? -1 : taken == Py_True;
}

/* Whatever has been raised stays raised. */
static void leave_lane(ShortWayObject *self)
{
    PyObject *kind, *value, *traceback;
    PyErr_Fetch(&kind, &value, &traceback);
    PyObject *left = PyObject_CallNoArgs(self->leave);
    if (left) {
        Py_DECREF(left);
        PyErr_Restore(kind, value, traceback);
    } else { /* the lock was not held, which cannot be */
        Py_XDECREF(kind);
        Py_XDECREF(value);
        Py_XDECREF(traceback);
    }
}

static PyObject *transfer(PyObject *array, PyObject *target, PyObject *bound, PyObject *again)
{
    PyObject *buffers[] = { array, target };
    for (;;) {
        PyObject *status = PyObject_Vectorcall(bound, buffers, 2, NULL);
        if (!status)
            return NULL;
        const int differed = PyObject_IsTrue(status);
        Py_DECREF(status);
        if (!differed)
            return Py_NewRef(target);
        PyObject *result = PyObject_CallOneArg(again, array);
        if (result != Py_None)
            return result;
        Py_DECREF(result);
    }
}

static PyObject *run(ShortWayObject *self, PyObject *array, const entry *known)
{
    /* Whoever runs meanwhile may forget the entry. */
    PyObject *bound = Py_NewRef(known->bound), *again = Py_NewRef(known->again);
    PyObject *plan = Py_NewRef(known->plan), *shape = Py_NewRef(known->result);
    PyObject *result = NULL;
    const int taken = take_lane(self); /* [1] */
    if (taken == 0)
        result = unknown();
    else if (taken > 0) {
        PyObject *target = NULL;
        if (!PyObject_SetAttr(self->group, name_doing, plan)) /* [2] */
            target = shape == Py_None ? Py_NewRef(array)
                                      : PyObject_Vectorcall(self->allocate, &PyTuple_GET_ITEM(shape, 0),
                                                            (size_t)PyTuple_GET_SIZE(shape), NULL);
        if (target)
            result = transfer(array, target, bound, again); /* [3] */
        Py_XDECREF(target);
        leave_lane(self);
    }
    Py_DECREF(bound);
    Py_DECREF(again);
    Py_DECREF(plan);
    Py_DECREF(shape);
    return result;
}

static PyObject *call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    ShortWayObject *self = (ShortWayObject *)callable;
    const Py_ssize_t count = PyVectorcall_NARGS(flags) - 1;
    if (count < 0 || (keywords && PyTuple_GET_SIZE(keywords))) {
        PyErr_SetString(PyExc_TypeError, "a short way takes an array and positional arguments");
        return NULL;
    }
    key asked;
    int readonly;
    if (!self->entries || (PyObject *)Py_TYPE(args[0]) != self->array_type ||
        !make_key(args[0], args + 1, count, &asked, &readonly))
        return unknown();
    const entry *known = *find(self, &asked, args + 1, count);
    Py_DECREF(asked.dtype); /* an entry holds it */
    if (!known || (readonly && known->result == Py_None))
        return unknown();
    return run(self, args[0], known);
}

/* ---------------------------------------------------------------------- remembering, forgetting */

static void forget(entry *known)
{
    Py_DECREF(known->key.dtype);
    Py_DECREF(known->arguments);
    Py_DECREF(known->bound);
    Py_DECREF(known->again);
    Py_DECREF(known->plan);
    Py_DECREF(known->result);
    PyMem_Free(known);
}

static PyObject *clear(ShortWayObject *self, PyObject *Py_UNUSED(unused))
{
    self->entries = 0;
    for (size_t i = 0; i < BUCKETS; i++) {
        entry *known = self->buckets[i];
        self->buckets[i] = NULL;
        while (known) {
            entry *next = known->next;
            forget(known); /* may run any Python code, which finds a bucket that is whole */
            known = next;
        }
    }
    return Py_NewRef(Py_None);
}

static PyObject *remember(ShortWayObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (hv_arg_count("remember", nargs, 6))
        return NULL;
    if (!PyTuple_Check(args[1]) || (args[5] != Py_None && !PyTuple_Check(args[5]))) {
        PyErr_SetString(PyExc_TypeError, "arguments and result must be tuples");
        return NULL;
    }
    PyObject *const *arguments = &PyTuple_GET_ITEM(args[1], 0);
    const Py_ssize_t count = PyTuple_GET_SIZE(args[1]);
    key asked;
    int readonly;
    if ((PyObject *)Py_TYPE(args[0]) != self->array_type ||
        !make_key(args[0], arguments, count, &asked, &readonly))
        return Py_NewRef(Py_None);
    if (self->entries >= MOST_ENTRIES)
        Py_DECREF(clear(self, NULL));
    entry **place = find(self, &asked, arguments, count);
    entry *made = PyMem_Malloc(sizeof *made), *old = *place;
    if (!made) {
        Py_DECREF(asked.dtype);
        return PyErr_NoMemory();
    }
    *made = (entry){ .next = old ? old->next : NULL,
                     .key = asked,
                     .arguments = Py_NewRef(args[1]),
                     .bound = Py_NewRef(args[2]),
                     .plan = Py_NewRef(args[3]),
                     .again = Py_NewRef(args[4]),
                     .result = Py_NewRef(args[5]) };
    *place = made;
    self->entries += !old;
    if (old)
        forget(old);
    return Py_NewRef(Py_None);
}

/* ------------------------------------------------------------------------------------- the type */

static int traverse(ShortWayObject *self, visitproc visit, void *arg)
{
    Py_VISIT(self->array_type);
    Py_VISIT(self->allocate);
    Py_VISIT(self->lane);
    Py_VISIT(self->take);
    Py_VISIT(self->leave);
    Py_VISIT(self->group);
    for (size_t i = 0; i < BUCKETS; i++)
        for (const entry *known = self->buckets[i]; known; known = known->next) {
            Py_VISIT(known->key.dtype);
            Py_VISIT(known->arguments);
            Py_VISIT(known->bound);
            Py_VISIT(known->again);
            Py_VISIT(known->plan);
            Py_VISIT(known->result);
        }
    return 0;
}

static int clear_references(ShortWayObject *self)
{
    Py_DECREF(clear(self, NULL));
    Py_CLEAR(self->array_type);
    Py_CLEAR(self->allocate);
    Py_CLEAR(self->lane);
    Py_CLEAR(self->take);
    Py_CLEAR(self->leave);
    Py_CLEAR(self->group);
    return 0;
}

static void dealloc(ShortWayObject *self)
{
    PyObject_GC_UnTrack(self);
    clear_references(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static int init(ShortWayObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = { "array_type", "allocate", "lane", "group", NULL };
    PyObject *array_type, *allocate, *lane, *group;
    if (self->group) {
        PyErr_SetString(PyExc_ValueError, "the short way is initialised already");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO", names, &array_type, &allocate, &lane,
                                     &group))
        return -1;
    self->take = PyObject_GetAttrString(lane, "take");
    self->leave = PyObject_GetAttrString(lane, "leave");
    if (!self->take || !self->leave)
        return -1;
    self->array_type = Py_NewRef(array_type);
    self->allocate = Py_NewRef(allocate);
    self->lane = Py_NewRef(lane);
    self->group = Py_NewRef(group);
    self->vectorcall = call;
    return 0;
}

static PyMethodDef methods[] = {
    { "remember", (PyCFunction)(void (*)(void))remember, METH_FASTCALL,
      "remember(array, arguments, bound, plan, again, result)" },
    { "clear", (PyCFunction)clear, METH_NOARGS, "Forget every call." },
    { NULL, NULL, 0, NULL },
};

static PyTypeObject short_way_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hvdkit.native._native.ShortWay",
    .tp_doc = "ShortWay(array_type, allocate, lane, group)\n--\n\n"
              "Callable (array, *arguments): a call like one that was remembered, else NotImplemented.",
    .tp_basicsize = sizeof(ShortWayObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)init,
    .tp_dealloc = (destructor)dealloc,
    .tp_traverse = (traverseproc)traverse,
    .tp_clear = (inquiry)clear_references,
    .tp_vectorcall_offset = offsetof(ShortWayObject, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_methods = methods,
};

int hv_add_short_way(PyObject *module)
{
    name_dtype = PyUnicode_InternFromString("dtype");
    name_free = PyUnicode_InternFromString("free");
    name_doing = PyUnicode_InternFromString("doing");
    if (!name_dtype || !name_free || !name_doing || PyType_Ready(&short_way_type))
        return -1;
    return PyModule_AddObjectRef(module, "ShortWay", (PyObject *)&short_way_type);
}
