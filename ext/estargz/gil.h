/* How a thread that gave the interpreter's lock up takes it again. PyGILState_Ensure, which Cython's `with gil` means, follows a
 * null pointer once the interpreter has ended, and a daemon thread that builds may come that late: the process ends only after
 * the interpreter. PyEval_RestoreThread, as after any wait of Python's own, ends or stops such a thread.
 *
 * A module that has a `with gil` includes this. All threads that come here are Python's.
 */
#ifndef ESTARGZ_GIL_H
#define ESTARGZ_GIL_H

#include <Python.h>
#include <unistd.h>

#if PY_VERSION_HEX < 0x030D0000
#define PyThreadState_GetUnchecked _PyThreadState_UncheckedGet
#endif

static inline PyGILState_STATE est_take_gil(void) {
    PyThreadState *own = PyGILState_GetThisThreadState();
    while (own == NULL) pause(); /* the interpreter has ended, and the process is about to */
    if (PyThreadState_GetUnchecked() == own) return PyGILState_LOCKED;
    PyEval_RestoreThread(own);
    return PyGILState_UNLOCKED;
}

static inline void est_leave_gil(PyGILState_STATE before) {
    if (before == PyGILState_UNLOCKED) PyEval_SaveThread();
}

#define PyGILState_Ensure est_take_gil
#define PyGILState_Release est_leave_gil

#endif
