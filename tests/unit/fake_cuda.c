/* A CUDA driver without a device, for tests of server/kernels/copy.py: the functions that it calls, with the types of
 * cuda.h where that is installed, so that the compiler checks them. Copies are queued on their stream and happen when
 * it, or an event on it, is waited for; memory is plain memory. fake_* are for the test: fail a function, count calls. */

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if __has_include(<cudaTypedefs.h>)
#include <cudaTypedefs.h>
#else
typedef int CUresult, CUdevice, CUdriverProcAddressQueryResult;
typedef unsigned long long CUdeviceptr;
typedef uint64_t cuuint64_t;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct {
    unsigned int srcAccessOrder;
    struct {
        unsigned int type;
        int id;
    } srcLocHint, dstLocHint;
    unsigned int flags;
} CUmemcpyAttributes;
#endif

enum { NAMES = 32, QUEUE = 4096 };

struct CUctx_st {
    int device;
};
struct CUstream_st {
    int count;
    struct {
        CUdeviceptr target, source;
        size_t size;
    } copies[QUEUE];
};
struct CUevent_st {
    CUstream stream;
};

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER; /* any thread may call a driver */
static struct CUctx_st primary;
static __thread CUcontext current;
static struct {
    const char *name;
    int calls, fail_at, code;
} known[NAMES];
int fake_version = 13000, fake_order, fake_live;

/* The entry of function `name`, made when it is first asked for. */
static int entry(const char *name)
{
    int i = 0;
    while (known[i].name && strcmp(known[i].name, name))
        i++;
    if (!known[i].name) {
        known[i].name = strdup(name);
        known[i].fail_at = -1;
    }
    return i;
}

void fake_reset(void)
{
    for (int i = 0; i < NAMES; i++) {
        known[i].calls = 0;
        known[i].fail_at = -1;
    }
    fake_version = 13000;
}

/* The call of `name` after `calls` more, and every later one, returns `code`. */
void fake_fail(const char *name, int calls, int code)
{
    int i = entry(name);
    known[i].fail_at = known[i].calls + calls;
    known[i].code = code;
}

int fake_calls(const char *name)
{
    return known[entry(name)].calls;
}

static int called(const char *name)
{
    pthread_mutex_lock(&busy);
    int i = entry(name), call = known[i].calls++;
    int code = known[i].fail_at >= 0 && call >= known[i].fail_at ? known[i].code : 0;
    pthread_mutex_unlock(&busy);
    return code;
}

#define CALLED                                                                                                         \
    do {                                                                                                               \
        int code = called(__func__);                                                                                   \
        if (code)                                                                                                      \
            return code;                                                                                               \
    } while (0)
#define CALLED_IN_CONTEXT                                                                                              \
    do {                                                                                                               \
        if (current != &primary)                                                                                       \
            return 201;                                                                                                \
        CALLED;                                                                                                        \
    } while (0)

static void happen(CUstream stream)
{
    pthread_mutex_lock(&busy);
    for (int i = stream->count - 1; i >= 0; i--) /* in no order that a caller may count on */
        memcpy((void *)stream->copies[i].target, (void *)stream->copies[i].source, stream->copies[i].size);
    stream->count = 0;
    pthread_mutex_unlock(&busy);
}

static void queue(CUstream stream, CUdeviceptr target, CUdeviceptr source, size_t size)
{
    pthread_mutex_lock(&busy);
    int i = stream->count++;
    stream->copies[i].target = target;
    stream->copies[i].source = source;
    stream->copies[i].size = size;
    pthread_mutex_unlock(&busy);
}

CUresult cuInit(unsigned int flags)
{
    CALLED;
    return flags ? 1 : 0;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    CALLED;
    *device = ordinal + 7; /* a handle need not be the ordinal */
    return ordinal ? 101 : 0;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    CALLED;
    *context = &primary;
    return device == 7 ? 0 : 101;
}

CUresult cuCtxSetCurrent(CUcontext context)
{
    CALLED;
    current = context;
    return 0;
}

CUresult cuGetErrorName(CUresult error, const char **name)
{
    *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : NULL;
    return error == 2 ? 0 : 1;
}

CUresult cuMemHostRegister_v2(void *address, size_t size, unsigned int flags)
{
    CALLED_IN_CONTEXT;
    return (uintptr_t)address % 4096 || size % 4096 || flags ? 1 : 0;
}

CUresult cuMemHostUnregister(void *address)
{
    CALLED_IN_CONTEXT;
    return address ? 0 : 1;
}

CUresult cuStreamCreate(CUstream *stream, unsigned int flags)
{
    CALLED_IN_CONTEXT;
    *stream = calloc(1, sizeof **stream);
    fake_live++;
    return flags == 1 ? 0 : 1;
}

CUresult cuStreamSynchronize(CUstream stream)
{
    CALLED_IN_CONTEXT;
    happen(stream);
    return 0;
}

CUresult cuStreamDestroy_v2(CUstream stream)
{
    CALLED_IN_CONTEXT;
    free(stream);
    fake_live--;
    return 0;
}

CUresult cuEventCreate(CUevent *event, unsigned int flags)
{
    CALLED_IN_CONTEXT;
    *event = calloc(1, sizeof **event);
    fake_live++;
    return flags == 3 ? 0 : 1;
}

CUresult cuEventRecord(CUevent event, CUstream stream)
{
    CALLED_IN_CONTEXT;
    event->stream = stream;
    return 0;
}

CUresult cuEventSynchronize(CUevent event)
{
    CALLED_IN_CONTEXT;
    happen(event->stream);
    return 0;
}

CUresult cuEventDestroy_v2(CUevent event)
{
    CALLED_IN_CONTEXT;
    free(event);
    fake_live--;
    return 0;
}

CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream)
{
    CALLED_IN_CONTEXT;
    queue(stream, target, source, size);
    return 0;
}

/* As of 12.8. When it is to fail, half of it is queued first. */
static CUresult batch(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes, size_t count,
                      CUmemcpyAttributes *attributes, size_t *firsts, size_t kinds, size_t *failed, CUstream stream)
{
    int code = called("cuMemcpyBatchAsync");
    if (current != &primary)
        return 201;
    if (!stream || !count || kinds != 1 || firsts[0] || attributes->flags)
        return 1;
    fake_order = attributes->srcAccessOrder;
    for (size_t i = 0; i < (code ? count / 2 : count); i++)
        queue(stream, targets[i], sources[i], sizes[i]);
    if (code)
        *failed = count / 2;
    return code;
}

#ifdef CUDA_VERSION
static PFN_cuMemcpyBatchAsync_v12080 checked = batch; /* the compiler compares the types */
#else
static void (*checked)(void) = (void (*)(void))batch;
#endif

CUresult cuGetProcAddress_v2(const char *symbol, void **address, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status)
{
    int found = !strcmp(symbol, "cuMemcpyBatchAsync") && version == 12080 && fake_version >= version && !flags;
    *address = found ? (void *)checked : NULL;
    *status = found ? 0 : 1;
    return found ? 0 : 500;
}
