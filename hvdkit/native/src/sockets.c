/* Small messages that connected sockets exchange at once, without a round through Python for each
 * look: a header and a row each way, the rows being those of one piece of memory.
 *
 * What comes may be something else, and what is to go may not fit.  Then the caller goes on, from
 * what it is told: how many bytes have gone, and which have come.
 */
#if defined(__linux__)
#include "pyargs.h"
#include "waiting.h"

#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum { HEADER = 16, MOST_PEERS = 16 };

typedef struct {
    int fd, stopped; /* for what is no matter of this function: the end of a connection, say */
    char *row;
    size_t sent, got;
    char header[HEADER];
} peer;

/* The part of a header and a row that is left after `done` bytes; returns the number of pieces. */
static int rest(struct iovec *pieces, char *header, char *row, size_t bytes, size_t done)
{
    if (done >= HEADER) {
        pieces[0] = (struct iovec){ row + (done - HEADER), bytes - (done - HEADER) };
        return 1;
    }
    pieces[0] = (struct iovec){ header + done, HEADER - done };
    pieces[1] = (struct iovec){ row, bytes };
    return 2;
}

static void send_some(peer *to, char *header, char *mine, size_t bytes)
{
    struct iovec pieces[2];
    struct msghdr message = { .msg_iov = pieces };
    message.msg_iovlen = (size_t)rest(pieces, header, mine, bytes, to->sent);
    const ssize_t sent = sendmsg(to->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent > 0)
        to->sent += (size_t)sent;
}

static void receive_some(peer *from, const char *header, size_t bytes)
{
    struct iovec pieces[2];
    struct msghdr message = { .msg_iov = pieces };
    message.msg_iovlen = (size_t)rest(pieces, from->header, from->row, bytes, from->got);
    const ssize_t got = recvmsg(from->fd, &message, MSG_DONTWAIT);
    if (got > 0)
        from->got += (size_t)got;
    from->stopped = got == 0 || (from->got >= HEADER && memcmp(from->header, header, HEADER));
}

/* Whether all is done; if not, that was not to be had soon, or some connection stopped. */
static int run(peer *peers, int count, char *header, char *mine, size_t bytes, long looks)
{
    const size_t whole = HEADER + bytes;
    hv_patience patience = hv_patience_of(looks);
    do {
        int left = 0;
        for (int i = 0; i < count; i++) {
            peer *other = &peers[i];
            if (other->sent < whole)
                send_some(other, header, mine, bytes);
            if (other->got < whole && !other->stopped)
                receive_some(other, header, bytes);
            if (other->stopped)
                return 0;
            left |= other->sent < whole || other->got < whole;
        }
        if (!left)
            return 1;
    } while (hv_wait_a_little(&patience));
    return 0;
}

static PyObject *state_of(const peer *peers, int count)
{
    PyObject *all = PyList_New(count);
    for (int i = 0; all && i < count; i++) {
        const peer *p = &peers[i];
        const size_t in_header = p->got < HEADER ? p->got : HEADER;
        PyObject *state =
            Py_BuildValue("(ny#y#)", (Py_ssize_t)p->sent, p->header, (Py_ssize_t)in_header, p->row,
                          (Py_ssize_t)(p->got - in_header));
        if (!state) {
            Py_CLEAR(all);
            break;
        }
        PyList_SET_ITEM(all, i, state);
    }
    return all;
}

static int fill(peer *peers, PyObject *const tuples[3], const Py_buffer *rows, size_t size)
{
    PyObject *handles = tuples[0], *places = tuples[1], *here = tuples[2];
    const size_t bytes = (size_t)rows->len / size;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(handles); i++) {
        const long fd = PyLong_AsLong(PyTuple_GET_ITEM(handles, i));
        const size_t place = PyLong_AsSize_t(PyTuple_GET_ITEM(places, i));
        const int received = PyObject_IsTrue(PyTuple_GET_ITEM(here, i));
        if (PyErr_Occurred())
            return -1;
        if (place >= size) {
            PyErr_Format(PyExc_ValueError, "there is no row %zu", place);
            return -1;
        }
        peers[i] = (peer){ .fd = (int)fd, .row = (char *)rows->buf + place * bytes };
        peers[i].got = received ? HEADER + bytes : 0;
    }
    return 0;
}

PyObject *hv_py_swap(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *tuples[3], *result = NULL;
    Py_buffer header, rows;
    Py_ssize_t rank, size;
    long looks;
    peer peers[MOST_PEERS];
    if (!PyArg_ParseTuple(args, "O!O!O!y*w*nnl", &PyTuple_Type, &tuples[0], &PyTuple_Type,
                          &tuples[1], &PyTuple_Type, &tuples[2], &header, &rows, &rank, &size,
                          &looks))
        return NULL;
    const Py_ssize_t count = PyTuple_GET_SIZE(tuples[0]);
    if (header.len != HEADER || count > MOST_PEERS || count != PyTuple_GET_SIZE(tuples[1]) ||
        count != PyTuple_GET_SIZE(tuples[2]) || size < 1 || rank < 0 || rank >= size || rows.len % size)
        PyErr_SetString(PyExc_ValueError, "these are no rows to swap");
    else if (!fill(peers, tuples, &rows, (size_t)size)) {
        const size_t bytes = (size_t)(rows.len / size);
        int done;
        Py_BEGIN_ALLOW_THREADS
        done = run(peers, (int)count, header.buf, (char *)rows.buf + rank * (Py_ssize_t)bytes, bytes,
                   looks);
        Py_END_ALLOW_THREADS
        result = done ? Py_NewRef(Py_None) : state_of(peers, (int)count);
    }
    PyBuffer_Release(&header);
    PyBuffer_Release(&rows);
    return result;
}
#endif
