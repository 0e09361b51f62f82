// A libFuzzer program whose targets are Python functions, so that one process has the fuzzer, the interpreter and the
// instrumented stages. FUZZ_PYTHON names the interpreter whose environment is used, FUZZ_TARGET a target of compiled_targets.py.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

static PyObject *check;
static PyObject *mutate;

static void give_up(const char *what) {
    fprintf(stderr, "FOUND in %s\n", what);
    PyErr_Print();
    fflush(NULL);
    abort();
}

// mutate(data, room) -> bytes: libFuzzer's own mutations, for a part of an input.
static PyObject *plain_mutation(PyObject *module, PyObject *arguments) {
    const char *data;
    Py_ssize_t size, room;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y#n", &data, &size, &room)) {
        return NULL;
    }
    if (size > room || room == 0) {
        return PyBytes_FromStringAndSize(data, size);
    }
    uint8_t *copy = malloc((size_t)room);
    if (copy == NULL) {
        return PyErr_NoMemory();
    }
    memcpy(copy, data, (size_t)size);
    size_t changed = LLVMFuzzerMutate(copy, (size_t)size, (size_t)room);
    PyObject *made = PyBytes_FromStringAndSize((const char *)copy, (Py_ssize_t)changed);
    free(copy);
    return made;
}

static PyMethodDef methods[] = {{"mutate", plain_mutation, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "libfuzzer", NULL, -1, methods, NULL, NULL, NULL, NULL};

static PyObject *make_module(void) { return PyModule_Create(&definition); }

static void start_python(void) {
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    config.install_signal_handlers = 0;
    PyImport_AppendInittab("libfuzzer", make_module);
    PyConfig_SetBytesString(&config, &config.program_name, getenv("FUZZ_PYTHON"));
    PyStatus status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status)) {
        Py_ExitStatusException(status);
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    start_python();
    PyObject *module = PyImport_ImportModule("fuzzing.compiled_targets");
    PyObject *targets = module ? PyObject_GetAttrString(module, "TARGETS") : NULL;
    PyObject *target = targets ? PyMapping_GetItemString(targets, getenv("FUZZ_TARGET")) : NULL;
    check = target ? PyObject_GetAttrString(target, "check") : NULL;
    mutate = check ? PyObject_GetAttrString(target, "mutate") : NULL;
    if (mutate == NULL) {
        give_up("the setting up");
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    PyObject *answer = PyObject_CallFunction(check, "y#", (const char *)data, (Py_ssize_t)size);
    if (answer == NULL) {
        give_up("an input");
    }
    Py_DECREF(answer);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed) {
    PyObject *made = PyObject_CallFunction(mutate, "y#nI", (const char *)data, (Py_ssize_t)size, (Py_ssize_t)max_size, seed);
    char *bytes;
    Py_ssize_t length;
    if (made == NULL || PyBytes_AsStringAndSize(made, &bytes, &length) < 0) {
        give_up("the mutator");
    }
    length = length < (Py_ssize_t)max_size ? length : (Py_ssize_t)max_size;
    memcpy(data, bytes, (size_t)length);
    Py_DECREF(made);
    return (size_t)length;
}
