/* The interface of libnvidia-ml.so.1, as far as we use it: signatures and structures follow the bindings of nvidia-ml-py
   13.615.71. Every call first asks whether the world makes it fail now (`rule fail:<what>`). */

#include "device.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int opened, samples_alive;

#define API __attribute__((visibility("default"))) int
#define GUARD(d, what) do { int code_ = refused(d, what); if (code_) return code_; } while (0)

static int refused(const Device *d, const char *what) {
    const Rule *rule;
    char everything[] = "fail:all", one[32];
    if (!opened) return UNINITIALIZED;
    snprintf(one, sizeof one, "fail:%s", what);
    if ((rule = active(d->whole, everything, now())) || (rule = active(d->whole, one, now()))) return rule->code;
    return SUCCESS;
}

static int text(const char *from, char *to, unsigned size) { snprintf(to, size, "%s", from); return SUCCESS; }

API nvmlInitWithFlags(unsigned flags) { (void)flags; int code = opened ? SUCCESS : read_world(); opened += !code; return code; }
API nvmlShutdown(void) { if (!opened) return UNINITIALIZED; opened--; return SUCCESS; }
API fake_nvml_open(void) { return opened; }
API fake_nvml_samples(void) { return samples_alive; }
__attribute__((visibility("default"))) const char *nvmlErrorString(int code) {
    static char message[32];
    snprintf(message, sizeof message, "simulated error %d", code);
    return message;
}

API nvmlSystemGetDriverVersion(char *to, unsigned size) { return text("580.0.fake", to, size); }
API nvmlSystemGetCudaDriverVersion(int *to) { *to = 13000; return SUCCESS; }
API nvmlDeviceGetCount_v2(unsigned *to) { *to = (unsigned)gpu_count; return opened ? SUCCESS : UNINITIALIZED; }

API nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **to) {
    if ((int)index >= gpu_count) return INVALID_ARGUMENT;
    GUARD(gpus[index], "handle");
    *to = gpus[index];
    return SUCCESS;
}

API nvmlDeviceGetHandleByUUID(const char *uuid, Device **to) {
    for (int i = 0; i < gpu_count; i++) {
        GUARD(gpus[i], "handle");
        if (!strcmp(gpus[i]->uuid, uuid)) { *to = gpus[i]; return SUCCESS; }
        for (int k = 0; k < gpus[i]->slices; k++)
            if (!strcmp(gpus[i]->slice[k]->uuid, uuid)) { *to = gpus[i]->slice[k]; return SUCCESS; }
    }
    return NOT_FOUND;
}

API nvmlDeviceGetName(Device *d, char *to, unsigned size) { GUARD(d, "name"); return text(d->name, to, size); }
API nvmlDeviceGetUUID(Device *d, char *to, unsigned size) { GUARD(d, "uuid"); return text(d->uuid, to, size); }
API nvmlDeviceGetVbiosVersion(Device *d, char *to, unsigned size) { GUARD(d, "facts"); return text("96.00.FA.KE.01", to, size); }

typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } PciInfo;
API nvmlDeviceGetPciInfo_v3(Device *d, PciInfo *to) { GUARD(d, "pci"); memset(to, 0, sizeof *to); return text(d->pci, to->bus_id, 32); }

typedef struct { unsigned version; uint64_t total, reserved, free, used; } Memory;
API nvmlDeviceGetMemoryInfo_v2(Device *d, Memory *to) {
    GUARD(d, "memory");
    if (to->version != 0x02000028) return VERSION_MISMATCH;
    to->total = d->memory_total; to->used = d->memory_used; to->reserved = 0; to->free = to->total - to->used;
    return SUCCESS;
}

API nvmlDeviceGetEnforcedPowerLimit(Device *d, unsigned *to) { GUARD(d, "facts"); *to = (unsigned)(1000 * d->whole->peak_w); return SUCCESS; }
API nvmlDeviceGetEccMode(Device *d, unsigned *is, unsigned *will) { GUARD(d, "facts"); *is = *will = 1; return SUCCESS; }
API nvmlDeviceGetPersistenceMode(Device *d, unsigned *to) { GUARD(d, "facts"); *to = 1; return SUCCESS; }
API nvmlDeviceGetApplicationsClock(Device *d, unsigned kind, unsigned *to) { (void)kind; (void)to; GUARD(d, "facts"); return NOT_SUPPORTED; }
API nvmlDeviceGetMaxClockInfo(Device *d, unsigned kind, unsigned *to) { GUARD(d, "facts"); *to = kind == 2 ? 3201 : 1980; return SUCCESS; }
API nvmlDeviceGetMigMode(Device *d, unsigned *is, unsigned *will) { GUARD(d, "mig"); *is = *will = (unsigned)d->split; return SUCCESS; }
API nvmlDeviceGetMaxMigDeviceCount(Device *d, unsigned *to) { GUARD(d, "mig"); *to = d->split ? 7 : 0; return SUCCESS; }
API nvmlDeviceGetGpuInstanceId(Device *d, unsigned *to) { GUARD(d, "mig"); *to = d->instance; return d->whole == d ? NOT_SUPPORTED : SUCCESS; }
API nvmlDeviceGetMigDeviceHandleByIndex(Device *d, unsigned index, Device **to) {
    GUARD(d, "mig");
    if ((int)index >= d->slices) return NOT_FOUND;
    *to = d->slice[index];
    return SUCCESS;
}

API nvmlDeviceGetTotalEnergyConsumption(Device *d, uint64_t *to) {
    GUARD(d, "energy");
    if (d->whole->split) return NOT_SUPPORTED;
    *to = counter_mj(d, now());
    return SUCCESS;
}

typedef struct { unsigned field, scope; int64_t stamp, latency; unsigned type, code; union { unsigned u; uint64_t ull; } value; } FieldValue;
API nvmlDeviceGetFieldValues(Device *d, int count, FieldValue *values) {
    double t = now(), moved = t;
    GUARD(d, "fields");
    const Rule *stale = active(d, "stale", t);
    if (stale) t = moved = stale->from;
    if (active(d, "wall", t)) moved += active(d, "wall", t)->code;             /* the driver stamps with wall time */
    for (int i = 0; i < count; i++) {
        FieldValue *v = &values[i];
        char what[32];
        snprintf(what, sizeof what, "field%u:scope%u", v->field, v->scope);
        v->code = (unsigned)refused(d, what);
        v->stamp = 1700000000000000LL + (int64_t)(1e6 * moved);
        v->latency = 0;
        v->type = 1;
        if (v->scope > 1 && !v->code) v->code = NOT_SUPPORTED;
        if (v->code) continue;
        if (v->field == 186) v->value.u = (unsigned)lround(1000 * sensor_shown(d, t));
        else if (v->field == 185) v->value.u = (unsigned)lround(1000 * (sensor_energy(d, t) - sensor_energy(d, t - 1)));
        else v->code = NOT_SUPPORTED;
    }
    return SUCCESS;
}

typedef struct { unsigned gpu, memory; } Utilization;
API nvmlDeviceGetUtilizationRates(Device *d, Utilization *to) {
    GUARD(d, "busy");
    if (d->whole->split) return NOT_SUPPORTED;
    double mean = (true_energy(d, now()) - true_energy(d, now() - 0.2)) / 0.2;
    to->gpu = mean > 1.2 * d->idle_w ? 100 : 0;
    to->memory = 0;
    return SUCCESS;
}

API nvmlDeviceGetClockInfo(Device *d, unsigned kind, unsigned *to) {
    GUARD(d, "clock");
    *to = kind == 2 ? 3201 : throttle_bits(d->whole, now()) & 0xE8 ? 990 : 1980;
    return SUCCESS;
}

typedef struct { unsigned version, sensor; int celsius; } Temperature;
API nvmlDeviceGetTemperatureV(Device *d, Temperature *to) { GUARD(d, "temperatureV"); to->celsius = 45; return SUCCESS; }
API nvmlDeviceGetTemperature(Device *d, unsigned sensor, unsigned *to) { (void)sensor; GUARD(d, "temperature"); *to = 45; return SUCCESS; }
API nvmlDeviceGetCurrentClocksEventReasons(Device *d, uint64_t *to) { GUARD(d, "throttle"); *to = throttle_bits(d->whole, now()); return SUCCESS; }

typedef struct { uint64_t reference, violation; } ViolationTime;
API nvmlDeviceGetViolationStatus(Device *d, unsigned policy, ViolationTime *to) {
    GUARD(d, "violation");
    double total = 0;
    for (int i = 0; i < d->rules; i++)
        if (policy == 1 && !strcmp(d->rule[i].what, "violation") && d->rule[i].from < now())
            total += fmin(now(), d->rule[i].to) - d->rule[i].from;
    *to = (ViolationTime){(uint64_t)(1e6 * now()), (uint64_t)(1e9 * total)};
    return SUCCESS;
}

typedef struct { unsigned pid; uint64_t bytes; unsigned instance, compute; } ProcessInfo;
static int processes(Device *d, unsigned *count, ProcessInfo *to, int graphics) {
    unsigned room = *count, found = 0;
    GUARD(d, "processes");
    for (int i = 0; i < d->whole->processes; i++) {
        const Process *p = &d->whole->process[i];
        if (p->graphics != graphics || now() < p->from || now() >= p->to) continue;
        if (to && found < room) to[found] = (ProcessInfo){p->pid, p->bytes, 0, 0};
        found++;
    }
    *count = found;
    return found > (to ? room : 0) ? INSUFFICIENT_SIZE : SUCCESS;
}
API nvmlDeviceGetComputeRunningProcesses_v3(Device *d, unsigned *count, ProcessInfo *to) { return processes(d, count, to, 0); }
API nvmlDeviceGetGraphicsRunningProcesses_v3(Device *d, unsigned *count, ProcessInfo *to) { return processes(d, count, to, 1); }

typedef struct { double t; const Device *of; } Sample;
typedef struct { unsigned id, code; double value; const char *names[3]; } Metric;
typedef struct { unsigned version, count; Sample *first, *second; Metric metric[1]; } MetricsGet;
typedef struct { unsigned version, supported; } Support;
API nvmlGpmQueryDeviceSupport(Device *d, Support *to) { GUARD(d, "activity"); to->supported = (unsigned)d->activity; return SUCCESS; }
API nvmlGpmSampleAlloc(Sample **to) { *to = calloc(1, sizeof(Sample)); samples_alive++; return SUCCESS; }
API nvmlGpmSampleFree(Sample *sample) { free(sample); samples_alive--; return SUCCESS; }
API nvmlGpmSampleGet(Device *d, Sample *to) {
    GUARD(d, "activity");
    if (d->split) return NOT_SUPPORTED;
    *to = (Sample){now(), d};
    return SUCCESS;
}
API nvmlGpmMigSampleGet(Device *d, unsigned instance, Sample *to) {
    GUARD(d, "activity");
    if (!d->split || !instance) return INVALID_ARGUMENT;
    *to = (Sample){now(), d};
    return SUCCESS;
}
API nvmlGpmMetricsGet(MetricsGet *get) {
    const Device *d = get->first->of;
    double length = get->second->t - get->first->t;
    if (get->version != 1 || length <= 0) return INVALID_ARGUMENT;
    double mean = (true_energy(d, get->second->t) - true_energy(d, get->first->t)) / length;
    double active_share = (mean - d->idle_w) / (d->peak_w - d->idle_w);
    for (unsigned i = 0; i < get->count; i++) {
        char what[32];
        snprintf(what, sizeof what, "activity%u", get->metric[i].id);
        get->metric[i].code = (unsigned)refused(d, what);
        get->metric[i].value = 100 * active_share / (get->metric[i].id == 2 ? 1 : 2);
    }
    return SUCCESS;
}
