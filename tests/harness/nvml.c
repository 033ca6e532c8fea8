/* A simulated libnvidia-ml.so.1, whose GPUs are the lines of the file NVML_STATE (see simulated_gpus.py):
 *
 *   UUID;board's UUID, or the same;name;bytes;bytes used by process PID;PID;ECC errors;rows pending;rows failed;Xid;MIG;
 *   utilization in percent
 *
 * A line whose UUID differs from its board's is a MIG instance of that board, which has MIG=1. PID 0: no process. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, NO_DRIVER = 9, TIMEOUT = 10, LOST = 15 };
enum { UNKNOWN = 999 };
enum { UNREADABLE_XID = 999999 }; /* makes waiting for events fail, see simulated_gpus.py */
enum { MAX_GPUS = 32 };

typedef struct {
    char uuid[96], board[96], name[96];
    unsigned long long bytes, used, ecc, xid;
    unsigned pid, pending, failed, mig, utilization;
} gpu_t;

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process_t;
typedef struct { void *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } event_t;

static unsigned long long reported[MAX_GPUS]; /* the Xids that were returned as events */

static int read_gpus(gpu_t *gpus) {
    const char *path = getenv("NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    int count = 0;
    if (!file) return -1;
    while (count < MAX_GPUS) {
        gpu_t *gpu = &gpus[count];
        if (fscanf(file, "%95[^;];%95[^;];%95[^;];%llu;%llu;%u;%llu;%u;%u;%llu;%u;%u\n", gpu->uuid, gpu->board, gpu->name,
                   &gpu->bytes, &gpu->used, &gpu->pid, &gpu->ecc, &gpu->pending, &gpu->failed, &gpu->xid,
                   &gpu->mig, &gpu->utilization) != 12)
            break;
        count++;
    }
    fclose(file);
    return count;
}

/* A handle is the number of the line, from 1. */
static int find(void *handle, gpu_t *found) {
    gpu_t gpus[MAX_GPUS];
    int count = read_gpus(gpus), number = (int)(intptr_t)handle;
    if (number < 1 || number > count) return LOST;
    *found = gpus[number - 1];
    return SUCCESS;
}

static int is_board(const gpu_t *gpu) { return strcmp(gpu->uuid, gpu->board) == 0; }

int nvmlInitWithFlags(unsigned flags) {
    gpu_t gpus[MAX_GPUS];
    (void)flags;
    return read_gpus(gpus) < 0 ? NO_DRIVER : SUCCESS;
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : "simulated error"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    gpu_t gpus[MAX_GPUS];
    int lines = read_gpus(gpus);
    *count = 0;
    for (int line = 0; line < lines; line++) *count += is_board(&gpus[line]);
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    gpu_t gpus[MAX_GPUS];
    int lines = read_gpus(gpus);
    for (int line = 0; line < lines; line++)
        if (is_board(&gpus[line]) && index-- == 0) {
            *handle = (void *)(intptr_t)(line + 1);
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    gpu_t gpus[MAX_GPUS];
    int lines = read_gpus(gpus);
    for (int line = 0; line < lines; line++)
        if (strcmp(gpus[line].uuid, uuid) == 0) {
            *handle = (void *)(intptr_t)(line + 1);
            return SUCCESS;
        }
    return LOST;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length) {
    gpu_t gpu;
    int code = find(handle, &gpu);
    if (code == SUCCESS) snprintf(name, length, "%s", gpu.name);
    return code;
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length) {
    gpu_t gpu;
    int code = find(handle, &gpu);
    if (code == SUCCESS) snprintf(uuid, length, "%s", gpu.uuid);
    return code;
}

int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory) {
    gpu_t gpu;
    int code = find(handle, &gpu);
    if (code == SUCCESS) *memory = (memory_t){gpu.bytes, gpu.bytes - gpu.used, gpu.used};
    return code;
}

int nvmlDeviceGetUtilizationRates(void *handle, utilization_t *rates) {
    gpu_t gpu;
    int code = find(handle, &gpu);
    if (code == SUCCESS && !is_board(&gpu)) return NOT_SUPPORTED;
    if (code == SUCCESS) *rates = (utilization_t){gpu.utilization, 0};
    return code;
}

int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    (void)handle;
    *major = 9, *minor = 0;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_t *processes) {
    gpu_t gpu;
    int code = find(handle, &gpu);
    if (code != SUCCESS) return code;
    unsigned space = *count;
    *count = gpu.pid != 0;
    if (gpu.pid == 0) return SUCCESS;
    if (space < 1 || !processes) return INSUFFICIENT_SIZE;
    processes[0] = (process_t){gpu.pid, gpu.used, 0, 0};
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(void *handle, int error, int counter, unsigned long long *count) {
    gpu_t gpu;
    int code = find(handle, &gpu);
    (void)error, (void)counter;
    if (code == SUCCESS) *count = gpu.ecc;
    return code;
}

int nvmlDeviceGetRemappedRows(void *handle, unsigned *corrected, unsigned *uncorrected, unsigned *pending,
                              unsigned *failed) {
    gpu_t gpu;
    int code = find(handle, &gpu);
    if (code == SUCCESS) *corrected = *uncorrected = 0, *pending = gpu.pending, *failed = gpu.failed;
    return code;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    gpu_t gpu;
    int code = find(handle, &gpu);
    if (code == SUCCESS) *current = *pending = gpu.mig;
    return code;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
    (void)handle;
    *count = 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **instance) {
    gpu_t gpus[MAX_GPUS], board;
    int lines = read_gpus(gpus), code = find(handle, &board);
    if (code != SUCCESS) return code;
    for (int line = 0; line < lines; line++)
        if (!is_board(&gpus[line]) && strcmp(gpus[line].board, board.uuid) == 0 && index-- == 0) {
            *instance = (void *)(intptr_t)(line + 1);
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlEventSetCreate(void **events) {
    *events = reported;
    return SUCCESS;
}

int nvmlDeviceRegisterEvents(void *handle, unsigned long long types, void *events) {
    (void)handle, (void)types, (void)events;
    return SUCCESS;
}

int nvmlEventSetWait_v2(void *events, event_t *event, unsigned milliseconds) {
    gpu_t gpus[MAX_GPUS];
    int lines = read_gpus(gpus);
    (void)events, (void)milliseconds;
    for (int line = 0; line < lines; line++)
        if (gpus[line].xid == UNREADABLE_XID) return UNKNOWN;
    for (int line = 0; line < lines; line++)
        if (gpus[line].xid && reported[line] != gpus[line].xid) {
            reported[line] = gpus[line].xid;
            *event = (event_t){(void *)(intptr_t)(line + 1), 8, gpus[line].xid, 0, 0};
            return SUCCESS;
        }
    return TIMEOUT;
}
