#include "pyargs.h"

int hv_arg_count(const char *name, Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, %zd given", name, wanted, given);
    return -1;
}

int hv_arg_u64(PyObject *object, uint64_t *value)
{
    *value = PyLong_AsUnsignedLongLong(object);
    return *value == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

int hv_arg_buffer(PyObject *object, Py_buffer *buffer, int writable)
{
    return PyObject_GetBuffer(object, buffer, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE);
}

int hv_arg_dtype(PyObject *object, enum hv_dtype *dtype)
{
    const long code = PyLong_AsLong(object);
    if (code == -1 && PyErr_Occurred())
        return -1;
    if (!hv_itemsize(code)) {
        PyErr_Format(PyExc_ValueError, "unknown dtype code %ld", code);
        return -1;
    }
    *dtype = (enum hv_dtype)code;
    return 0;
}

int hv_arg_op(PyObject *object, enum hv_dtype dtype, enum hv_op *op)
{
    const long code = PyLong_AsLong(object);
    if (code == -1 && PyErr_Occurred())
        return -1;
    const int found = hv_op_of_code(code);
    if (found < 0) {
        PyErr_Format(PyExc_ValueError, "unknown operation code %ld", code);
        return -1;
    }
    if (!hv_is_defined(dtype, (enum hv_op)found)) {
        PyErr_SetString(PyExc_TypeError, "Min and Max are not defined for complex numbers");
        return -1;
    }
    *op = (enum hv_op)found;
    return 0;
}

static int refuse_bool(enum hv_dtype dtype)
{
    if (dtype != HV_BOOL)
        return 0;
    PyErr_SetString(PyExc_TypeError, "bool can be neither divided nor scaled");
    return -1;
}

int hv_arg_divisor(PyObject *object, enum hv_dtype dtype, uint64_t *divisor)
{
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred())
        return -1;
    if (value < 1) {
        PyErr_Format(PyExc_ValueError, "divisor must be 1 or more, not %lld", value);
        return -1;
    }
    *divisor = (uint64_t)value;
    return value == 1 ? 0 : refuse_bool(dtype);
}

int hv_arg_factor(PyObject *object, enum hv_dtype dtype, double *factor)
{
    *factor = PyFloat_AsDouble(object);
    if (*factor == -1.0 && PyErr_Occurred())
        return -1;
    return *factor == 1.0 ? 0 : refuse_bool(dtype);
}

int hv_arg_elements(Py_ssize_t bytes, enum hv_dtype dtype, size_t *count)
{
    const size_t itemsize = hv_itemsize(dtype);
    *count = (size_t)bytes / itemsize;
    if ((size_t)bytes % itemsize == 0)
        return 0;
    PyErr_Format(PyExc_ValueError, "%zd bytes are not a whole number of %zu-byte elements", bytes,
                 itemsize);
    return -1;
}

int hv_arg_recipe(PyObject *const *args, hv_recipe *recipe)
{
    return hv_arg_dtype(args[0], &recipe->dtype) ||
                   hv_arg_op(args[1], recipe->dtype, &recipe->op) ||
                   hv_arg_factor(args[2], recipe->dtype, &recipe->prescale) ||
                   hv_arg_divisor(args[3], recipe->dtype, &recipe->divisor) ||
                   hv_arg_factor(args[4], recipe->dtype, &recipe->postscale)
               ? -1
               : 0;
}
