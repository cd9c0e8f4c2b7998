/* Arguments from Python, shared by the module's functions and the arena's methods. */
#ifndef HVDKIT_PYARGS_H
#define HVDKIT_PYARGS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

/* Each returns 0, or -1 with an exception set. */
int hv_arg_count(const char *name, Py_ssize_t given, Py_ssize_t wanted);
int hv_arg_u64(PyObject *object, uint64_t *value);
/* A buffer that is contiguous in C order, as all ranks then see it; the caller releases it. */
int hv_arg_buffer(PyObject *object, Py_buffer *buffer, int writable);
int hv_arg_dtype(PyObject *object, enum hv_dtype *dtype);
/* The operation, checked to be defined for the dtype. */
int hv_arg_op(PyObject *object, enum hv_dtype dtype, enum hv_op *op);
/* divisor >= 1 and factors; anything but ones is refused for bool. */
int hv_arg_divisor(PyObject *object, enum hv_dtype dtype, uint64_t *divisor);
int hv_arg_factor(PyObject *object, enum hv_dtype dtype, double *factor);
/* How many elements `bytes` are; a ValueError if not a whole number. */
int hv_arg_elements(Py_ssize_t bytes, enum hv_dtype dtype, size_t *count);

/* dtype, op, prescale, divisor, postscale, in this order. */
int hv_arg_recipe(PyObject *const *args, hv_recipe *recipe);

/* Add a type to the module. */
int hv_add_short_way(PyObject *module);
int hv_add_gathered(PyObject *module);
int hv_add_persistent(PyObject *module);
int hv_add_recurring(PyObject *module);
int hv_add_schedule(PyObject *module);

#if defined(__linux__)
/* Add the type Arena, the exception ArenaError and the function arena_bytes to the module. */
int hv_add_arena(PyObject *module);
PyObject *hv_py_swap(PyObject *module, PyObject *args);
#endif

#endif
