/* All steps of a schedule on a short message: hvdkit.collectives.prepared says what they are, and what
 * the marks behind its chunks are for.
 *
 *   copy the chunks into the schedule's own memory, each with the mark of the call    [1]
 *   for each flight: exchange, then combine chunks and marks with those that came      [2]
 *   if all marks are the call's own, copy the chunks out                              [3]
 */
#include "pyargs.h"

#include <string.h>

enum { MARK = sizeof(int64_t), DIFFERENT = 0 };

typedef struct {
    size_t place; /* in the memory */
    size_t start; /* in the message */
    size_t bytes;
} chunk;

typedef struct {
    size_t number; /* of the chunk that is combined with what comes */
    size_t place;  /* where that arrives */
    int first;     /* whether it is the first operand */
} landing;

typedef struct {
    PyObject *exchange;
    size_t count;
    landing *landings;
} flight;

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    Py_buffer memory;
    enum hv_dtype dtype;
    size_t bytes, chunk_count, flight_count;
    chunk *chunks;
    flight *flights;
} ScheduleObject;

/* where the mark of such a chunk is, which begins at `place` */
static size_t mark_of(const chunk *like, size_t place)
{
    return place + (like->bytes + MARK - 1) / MARK * MARK;
}

static int64_t mark_at(const ScheduleObject *self, size_t place)
{
    int64_t mark;
    memcpy(&mark, (char *)self->memory.buf + place, sizeof mark);
    return mark;
}

static void set_mark(ScheduleObject *self, size_t place, int64_t mark)
{
    memcpy((char *)self->memory.buf + place, &mark, sizeof mark);
}

static void combine(ScheduleObject *self, const flight *now, enum hv_op op) /* [2] */
{
    char *memory = self->memory.buf;
    const size_t itemsize = hv_itemsize(self->dtype);
    for (size_t i = 0; i < now->count; i++) {
        const landing *at = &now->landings[i];
        const chunk *part = &self->chunks[at->number];
        char *ours = memory + part->place, *theirs = memory + at->place;
        hv_combine(self->dtype, op, ours, at->first ? theirs : ours, at->first ? ours : theirs,
                   part->bytes / itemsize);
        const size_t mark = mark_of(part, part->place);
        if (mark_at(self, mark) != mark_at(self, mark_of(part, at->place)))
            set_mark(self, mark, DIFFERENT);
    }
}

static int play(ScheduleObject *self, enum hv_op op)
{
    for (size_t i = 0; i < self->flight_count; i++) {
        PyObject *done = PyObject_CallNoArgs(self->flights[i].exchange);
        if (!done)
            return -1;
        Py_DECREF(done);
        combine(self, &self->flights[i], op);
    }
    return 0;
}

static PyObject *reduce(ScheduleObject *self, const hv_recipe *recipe, int64_t mark,
                        const char *source, char *target)
{
    char *memory = self->memory.buf;
    const size_t itemsize = hv_itemsize(self->dtype);
    for (size_t i = 0; i < self->chunk_count; i++) { /* [1] */
        const chunk *part = &self->chunks[i];
        memcpy(memory + part->place, source + part->start, part->bytes);
        if (recipe->prescale != 1.0)
            hv_scale(self->dtype, memory + part->place, part->bytes / itemsize, 1,
                     recipe->prescale);
        set_mark(self, mark_of(part, part->place), mark);
    }
    if (play(self, recipe->op))
        return NULL;
    for (size_t i = 0; i < self->chunk_count; i++) {
        const chunk *part = &self->chunks[i];
        if (mark_at(self, mark_of(part, part->place)) != mark)
            Py_RETURN_FALSE;
    }
    for (size_t i = 0; i < self->chunk_count; i++) /* [3] */
        memcpy(target + self->chunks[i].start, memory + self->chunks[i].place,
               self->chunks[i].bytes);
    if (recipe->divisor != 1 || recipe->postscale != 1.0)
        hv_scale(self->dtype, target, self->bytes / itemsize, recipe->divisor, recipe->postscale);
    Py_RETURN_TRUE;
}

static PyObject *call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *keywords)
{
    ScheduleObject *self = (ScheduleObject *)callable;
    hv_recipe recipe;
    Py_buffer source, target;
    PyObject *result = NULL;
    if ((keywords && PyTuple_GET_SIZE(keywords)) ||
        hv_arg_count("schedule", PyVectorcall_NARGS(flags), 4))
        return NULL;
    if (!PyTuple_Check(args[0]) || PyTuple_GET_SIZE(args[0]) < 5) {
        PyErr_SetString(PyExc_TypeError, "a recipe is a tuple of five or more");
        return NULL;
    }
    const long long mark = PyLong_AsLongLong(args[1]);
    if (PyErr_Occurred() || hv_arg_recipe(&PyTuple_GET_ITEM(args[0], 0), &recipe) ||
        hv_arg_buffer(args[3], &target, 1))
        return NULL;
    if (!hv_arg_buffer(args[2], &source, 0)) {
        if (recipe.dtype != self->dtype || (size_t)source.len != self->bytes ||
            (size_t)target.len != self->bytes)
            PyErr_Format(PyExc_ValueError, "source has %zd bytes, target %zd, the schedule %zu",
                         source.len, target.len, self->bytes);
        else
            result = reduce(self, &recipe, mark, source.buf, target.buf);
        PyBuffer_Release(&source);
    }
    PyBuffer_Release(&target);
    return result;
}

static int traverse(ScheduleObject *self, visitproc visit, void *arg)
{
    for (size_t i = 0; i < self->flight_count; i++)
        Py_VISIT(self->flights[i].exchange);
    return 0;
}

static int clear(ScheduleObject *self)
{
    const size_t count = self->flight_count;
    self->flight_count = 0;
    for (size_t i = 0; i < count; i++) {
        Py_CLEAR(self->flights[i].exchange);
        PyMem_Free(self->flights[i].landings);
    }
    return 0;
}

static void dealloc(ScheduleObject *self)
{
    PyObject_GC_UnTrack(self);
    clear(self);
    PyMem_Free(self->flights);
    PyMem_Free(self->chunks);
    PyBuffer_Release(&self->memory);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* whether a chunk of such a length, with its mark, lies in the memory from `place` on */
static int lies_within(const ScheduleObject *self, const chunk *like, size_t place)
{
    const size_t length = (size_t)self->memory.len;
    return place % MARK == 0 && place <= length && like->bytes <= length &&
           mark_of(like, place) + MARK <= length;
}

static int take_chunks(ScheduleObject *self, PyObject *chunks)
{
    const Py_ssize_t count = PyTuple_GET_SIZE(chunks);
    self->chunks = PyMem_Calloc((size_t)count + 1, sizeof *self->chunks);
    if (!self->chunks) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t place, bytes;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(chunks, i), "nn", &place, &bytes))
            return -1;
        chunk *part = &self->chunks[i];
        *part = (chunk){ .place = (size_t)place, .start = self->bytes, .bytes = (size_t)bytes };
        if (place < 0 || bytes < 0 || !lies_within(self, part, part->place) ||
            part->bytes % hv_itemsize(self->dtype)) {
            PyErr_SetString(PyExc_ValueError, "a chunk is not in the memory");
            return -1;
        }
        self->bytes += part->bytes;
        self->chunk_count++;
    }
    return 0;
}

static int take_landing(ScheduleObject *self, PyObject *given, landing *at)
{
    Py_ssize_t number, place;
    if (!PyArg_ParseTuple(given, "nnp", &number, &place, &at->first))
        return -1;
    at->number = (size_t)number;
    at->place = (size_t)place;
    if (number < 0 || at->number >= self->chunk_count || place < 0 ||
        !lies_within(self, &self->chunks[at->number], at->place)) {
        PyErr_SetString(PyExc_ValueError, "there is no such chunk, or it is not in the memory");
        return -1;
    }
    return 0;
}

static int take_flights(ScheduleObject *self, PyObject *flights)
{
    const Py_ssize_t count = PyTuple_GET_SIZE(flights);
    self->flights = PyMem_Calloc((size_t)count + 1, sizeof *self->flights);
    if (!self->flights) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *exchange, *landings;
        flight *now = &self->flights[i];
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(flights, i), "OO!", &exchange, &PyTuple_Type,
                              &landings))
            return -1;
        now->count = (size_t)PyTuple_GET_SIZE(landings);
        now->landings = PyMem_Calloc(now->count + 1, sizeof *now->landings);
        if (!now->landings) {
            PyErr_NoMemory();
            return -1;
        }
        now->exchange = Py_NewRef(exchange);
        self->flight_count++;
        for (size_t k = 0; k < now->count; k++)
            if (take_landing(self, PyTuple_GET_ITEM(landings, (Py_ssize_t)k), &now->landings[k]))
                return -1;
    }
    return 0;
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    Py_buffer memory;
    PyObject *dtype, *chunks, *flights;
    if ((keywords && PyDict_GET_SIZE(keywords)) ||
        !PyArg_ParseTuple(args, "w*OO!O!", &memory, &dtype, &PyTuple_Type, &chunks, &PyTuple_Type,
                          &flights))
        return NULL;
    ScheduleObject *self = (ScheduleObject *)type->tp_alloc(type, 0);
    if (!self) {
        PyBuffer_Release(&memory);
        return NULL;
    }
    self->vectorcall = call;
    self->memory = memory;
    if (!hv_arg_dtype(dtype, &self->dtype) && !take_chunks(self, chunks) &&
        !take_flights(self, flights))
        return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static PyTypeObject schedule_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "hvdkit.native._native.Schedule",
    .tp_doc = "Schedule(memory, dtype, chunks, flights)\n--\n\n"
              "Callable (recipe, mark, source, target): all its steps; whether all marks are alike.",
    .tp_basicsize = sizeof(ScheduleObject),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_HAVE_GC,
    .tp_new = new,
    .tp_dealloc = (destructor)dealloc,
    .tp_traverse = (traverseproc)traverse,
    .tp_clear = (inquiry)clear,
    .tp_vectorcall_offset = offsetof(ScheduleObject, vectorcall),
    .tp_call = PyVectorcall_Call,
};

int hv_add_schedule(PyObject *module)
{
    if (PyType_Ready(&schedule_type))
        return -1;
    return PyModule_AddObjectRef(module, "Schedule", (PyObject *)&schedule_type);
}
