/* Small messages that connected sockets exchange at once, without a round through Python for each
 * look: at most a header and its bytes each way, of one piece of memory.
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
    char *bytes;
    size_t length, done; /* with the header; a length of 0: there is no message */
} message;

typedef struct {
    int fd, stopped; /* for what is no matter of this function: the end of a connection, say */
    message out, in;
    const char *headers; /* of `out`, and what that of `in` should be */
    char header[HEADER];
} peer;

/* What is left of a message; returns the number of pieces. */
static int rest(struct iovec *pieces, char *header, const message *m)
{
    const size_t left = m->length - m->done;
    if (m->done >= HEADER) {
        pieces[0] = (struct iovec){ m->bytes + (m->done - HEADER), left };
        return 1;
    }
    pieces[0] = (struct iovec){ header + m->done, HEADER - m->done };
    pieces[1] = (struct iovec){ m->bytes, m->length - HEADER };
    return 2;
}

static void send_some(peer *to)
{
    struct iovec pieces[2];
    struct msghdr header = { .msg_iov = pieces };
    header.msg_iovlen = (size_t)rest(pieces, (char *)to->headers, &to->out);
    const ssize_t sent = sendmsg(to->fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent > 0)
        to->out.done += (size_t)sent;
}

static void receive_some(peer *from)
{
    struct iovec pieces[2];
    struct msghdr header = { .msg_iov = pieces };
    header.msg_iovlen = (size_t)rest(pieces, from->header, &from->in);
    const ssize_t got = recvmsg(from->fd, &header, MSG_DONTWAIT);
    if (got > 0)
        from->in.done += (size_t)got;
    from->stopped = got == 0 || (from->in.done >= HEADER &&
                                 memcmp(from->header, from->headers + HEADER, HEADER));
}

/* Whether all is done; if not, that was not to be had soon, or some connection stopped. */
static int run(peer *peers, int count, long looks)
{
    hv_patience patience = hv_patience_of(looks);
    do {
        int left = 0;
        for (int i = 0; i < count; i++) {
            peer *other = &peers[i];
            if (other->out.done < other->out.length)
                send_some(other);
            if (other->in.done < other->in.length)
                receive_some(other);
            if (other->stopped)
                return 0;
            left |= other->out.done < other->out.length || other->in.done < other->in.length;
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
        const size_t in_header = p->in.done < HEADER ? p->in.done : HEADER;
        const char *come = p->in.length ? p->in.bytes : ""; /* of NULL, None would be made */
        PyObject *state =
            Py_BuildValue("(ny#y#)", (Py_ssize_t)p->out.done, p->header, (Py_ssize_t)in_header, come,
                          (Py_ssize_t)(p->in.done - in_header));
        if (!state) {
            Py_CLEAR(all);
            break;
        }
        PyList_SET_ITEM(all, i, state);
    }
    return all;
}

/* `place`: an offset and a length, -1 if there is no message. */
static int set(message *m, const int64_t *place, const Py_buffer *memory)
{
    if (place[1] < 0)
        return 0;
    if (place[0] < 0 || place[0] > memory->len || place[1] > memory->len - place[0])
        return -1;
    *m = (message){ (char *)memory->buf + place[0], HEADER + (size_t)place[1], 0 };
    return 0;
}

static int fill(peer *peers, PyObject *handles, PyObject *here, const Py_buffer buffers[3])
{
    const char *headers = buffers[0].buf;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(handles); i++) {
        int64_t places[4];
        memcpy(places, (const char *)buffers[1].buf + i * (Py_ssize_t)sizeof places, sizeof places);
        const long fd = PyLong_AsLong(PyTuple_GET_ITEM(handles, i));
        const int received = PyObject_IsTrue(PyTuple_GET_ITEM(here, i));
        if (PyErr_Occurred())
            return -1;
        peers[i] = (peer){ .fd = (int)fd, .headers = headers + 2 * HEADER * i };
        if (set(&peers[i].out, places, &buffers[2]) || set(&peers[i].in, places + 2, &buffers[2])) {
            PyErr_Format(PyExc_ValueError, "message %zd is not in the memory", i);
            return -1;
        }
        if (received)
            peers[i].in.done = peers[i].in.length;
    }
    return 0;
}

PyObject *hv_py_swap(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *handles, *here, *result = NULL;
    Py_buffer buffers[3]; /* headers, places, memory */
    long looks;
    peer peers[MOST_PEERS];
    if (!PyArg_ParseTuple(args, "O!O!y*y*w*l", &PyTuple_Type, &handles, &PyTuple_Type, &here,
                          &buffers[0], &buffers[1], &buffers[2], &looks))
        return NULL;
    const Py_ssize_t count = PyTuple_GET_SIZE(handles);
    if (count > MOST_PEERS || count != PyTuple_GET_SIZE(here) ||
        buffers[0].len != count * 2 * HEADER ||
        buffers[1].len != count * 4 * (Py_ssize_t)sizeof(int64_t))
        PyErr_SetString(PyExc_ValueError, "these are no messages to swap");
    else if (!fill(peers, handles, here, buffers)) {
        int done;
        Py_BEGIN_ALLOW_THREADS
        done = run(peers, (int)count, looks);
        Py_END_ALLOW_THREADS
        result = done ? Py_NewRef(Py_None) : state_of(peers, (int)count);
    }
    for (int i = 0; i < 3; i++)
        PyBuffer_Release(&buffers[i]);
    return result;
}
#endif
