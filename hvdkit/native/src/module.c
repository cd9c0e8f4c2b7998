/* The Python module hvdkit.native._native: kernels as functions, and the arena. */
#include "pyargs.h"

/* Above this many bytes other Python threads may run meanwhile. */
enum { RELEASE_GIL_ABOVE = 4096 };

PyDoc_STRVAR(reduce_doc,
             "reduce(out, incoming, dtype, op, incoming_first)\n--\n\n"
             "Set out to op(incoming, out) if incoming_first, else op(out, incoming).");

static PyObject *reduce(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer out, in;
    enum hv_dtype dtype;
    enum hv_op op;
    size_t count;
    PyObject *result = NULL;
    if (hv_arg_count("reduce", nargs, 5) || hv_arg_dtype(args[2], &dtype) ||
        hv_arg_op(args[3], dtype, &op))
        return NULL;
    const int incoming_first = PyObject_IsTrue(args[4]);
    if (incoming_first < 0 || hv_arg_buffer(args[0], &out, 1))
        return NULL;
    if (hv_arg_buffer(args[1], &in, 0))
        goto release_out;
    if (hv_arg_elements(out.len, dtype, &count))
        goto release_both;
    if (out.len != in.len) {
        PyErr_Format(PyExc_ValueError, "out has %zd bytes, incoming %zd", out.len, in.len);
        goto release_both;
    }
    PyThreadState *saved = out.len > RELEASE_GIL_ABOVE ? PyEval_SaveThread() : NULL;
    hv_combine(dtype, op, out.buf, incoming_first ? in.buf : out.buf,
               incoming_first ? out.buf : in.buf, count);
    if (saved)
        PyEval_RestoreThread(saved);
    result = Py_NewRef(Py_None);
release_both:
    PyBuffer_Release(&in);
release_out:
    PyBuffer_Release(&out);
    return result;
}

PyDoc_STRVAR(scale_doc, "scale(buffer, dtype, divisor, factor)\n--\n\n"
                        "Divide by divisor, then multiply by factor, in place.");

static PyObject *scale(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer data;
    enum hv_dtype dtype;
    uint64_t divisor;
    double factor;
    size_t count;
    if (hv_arg_count("scale", nargs, 4) || hv_arg_dtype(args[1], &dtype) ||
        hv_arg_divisor(args[2], dtype, &divisor) || hv_arg_factor(args[3], dtype, &factor) ||
        hv_arg_buffer(args[0], &data, 1))
        return NULL;
    const int bad = hv_arg_elements(data.len, dtype, &count);
    if (!bad) {
        PyThreadState *saved = data.len > RELEASE_GIL_ABOVE ? PyEval_SaveThread() : NULL;
        hv_scale(dtype, data.buf, count, divisor, factor);
        if (saved)
            PyEval_RestoreThread(saved);
    }
    PyBuffer_Release(&data);
    return bad ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(convert_doc, "convert(dst, dst_dtype, src, src_dtype)\n--\n\n"
                          "Convert between float16, bfloat16 and float32, or float32 and float64.");

static PyObject *convert(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer dst, src;
    enum hv_dtype to, from;
    size_t dst_count, src_count;
    int known = 1;
    PyObject *result = NULL;
    if (hv_arg_count("convert", nargs, 4) || hv_arg_dtype(args[1], &to) ||
        hv_arg_dtype(args[3], &from) || hv_arg_buffer(args[0], &dst, 1))
        return NULL;
    if (hv_arg_buffer(args[2], &src, 0))
        goto release_dst;
    if (hv_arg_elements(dst.len, to, &dst_count) || hv_arg_elements(src.len, from, &src_count))
        goto release_both;
    if (dst_count != src_count) {
        PyErr_Format(PyExc_ValueError, "dst has %zu elements, src %zu", dst_count, src_count);
        goto release_both;
    }
    Py_BEGIN_ALLOW_THREADS
    known = hv_convert(to, dst.buf, from, src.buf, src_count);
    Py_END_ALLOW_THREADS
    if (known)
        result = Py_NewRef(Py_None);
    else
        PyErr_SetString(PyExc_TypeError, "no conversion between these dtypes");
release_both:
    PyBuffer_Release(&src);
release_dst:
    PyBuffer_Release(&dst);
    return result;
}

PyDoc_STRVAR(copy_doc, "copy(dst, src)\n--\n\nCopy bytes between buffers of equal length.");

static PyObject *copy(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer dst, src;
    PyObject *result = NULL;
    if (hv_arg_count("copy", nargs, 2) || hv_arg_buffer(args[0], &dst, 1))
        return NULL;
    if (hv_arg_buffer(args[1], &src, 0))
        goto release_dst;
    if (dst.len != src.len) {
        PyErr_Format(PyExc_ValueError, "dst has %zd bytes, src %zd", dst.len, src.len);
        goto release_both;
    }
    PyThreadState *saved = dst.len > RELEASE_GIL_ABOVE ? PyEval_SaveThread() : NULL;
    hv_copy(dst.buf, src.buf, (size_t)dst.len);
    if (saved)
        PyEval_RestoreThread(saved);
    result = Py_NewRef(Py_None);
release_both:
    PyBuffer_Release(&src);
release_dst:
    PyBuffer_Release(&dst);
    return result;
}

PyDoc_STRVAR(cpu_features_doc, "cpu_features()\n--\n\nName the variant of the loops in use.");

static PyObject *cpu_features(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return PyUnicode_FromString(hv_variant_name());
}

PyDoc_STRVAR(variants_doc, "variants()\n--\n\nName the variants that run here, plainest first.");

static PyObject *variants(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < hv_variant_count(); i++) {
        PyObject *name = PyUnicode_FromString(hv_variant_at(i));
        if (!name || PyList_Append(list, name))
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

PyDoc_STRVAR(select_variant_doc, "select_variant(name)\n--\n\n"
                                 "Use another variant of the loops, in tests and measurements.");

static PyObject *select_variant(PyObject *Py_UNUSED(module), PyObject *name)
{
    const char *text = PyUnicode_AsUTF8(name);
    if (!text)
        return NULL;
    if (!hv_variant_select(text)) {
        PyErr_Format(PyExc_ValueError, "no variant %R runs here", name);
        return NULL;
    }
    return Py_NewRef(Py_None);
}

#define FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

static PyMethodDef functions[] = {
    { "reduce", FAST(reduce), reduce_doc },
    { "scale", FAST(scale), scale_doc },
    { "convert", FAST(convert), convert_doc },
    { "copy", FAST(copy), copy_doc },
    { "cpu_features", cpu_features, METH_NOARGS, cpu_features_doc },
    { "variants", variants, METH_NOARGS, variants_doc },
    { "select_variant", select_variant, METH_O, select_variant_doc },
#if defined(__linux__)
    { "swap", hv_py_swap, METH_VARARGS,
      "swap(handles, places, header, rows, rank, size, looks)\n--\n\n"
      "Exchange rows over sockets; None if that is done, else how far it is with each." },
#endif
    { NULL, NULL, 0, NULL },
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "Reduction kernels, and the shared-memory arena of the ranks of one node.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__native(void)
{
    hv_variant_select(hv_variant_at(hv_variant_count() - 1));
    PyObject *module = PyModule_Create(&definition);
    if (module && (hv_add_short_way(module) || hv_add_gathered(module) ||
                   hv_add_persistent(module) || hv_add_recurring(module) ||
                   hv_add_schedule(module)))
        Py_CLEAR(module);
#if defined(__linux__)
    if (module && hv_add_arena(module))
        Py_CLEAR(module);
#endif
    return module;
}
