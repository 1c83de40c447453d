/* GPUs whose true power is known.

   Truth: P(t) piecewise linear, its integral exact. Counter: published every `counter_period` s, integrates the truth or
   only what the sensor saw. Sensor: averages the first `sensor_duty` of each `sensor_period` and holds the value until the
   next one. The world file's format is in __init__.py; the time is a file of one double that the tests advance, or
   CLOCK_MONOTONIC. */

#include "device.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

Device *gpus[MAX_GPUS];
int gpu_count;
static volatile double *simulated_now;
static double real_epoch;

double now(void) {
    if (simulated_now) return *simulated_now;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec - real_epoch;
}

/* ---- the physics ---- */

double true_energy(const Device *d, double t) {
    int low = 0, high = d->points - 1;
    if (t <= d->t[0]) return (t - d->t[0]) * d->p[0];
    if (t >= d->t[high]) return d->energy[high] + (t - d->t[high]) * d->p[high];
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (d->t[middle] <= t) low = middle; else high = middle;
    }
    double width = d->t[high] - d->t[low], share = width > 0 ? (t - d->t[low]) / width : 0;
    double here = d->p[low] + share * (d->p[high] - d->p[low]);
    return d->energy[low] + (t - d->t[low]) * (d->p[low] + here) / 2;
}

static double sensor_value(const Device *d, long n) {
    double from = d->sensor_phase + (double)n * d->sensor_period, to = from + d->sensor_duty * d->sensor_period;
    return (true_energy(d, to) - true_energy(d, from)) / (to - from);
}

static long sensor_index(const Device *d, double t) {                          /* the period whose value is shown at t */
    return (long)floor((t - d->sensor_phase) / d->sensor_period - d->sensor_duty);
}

double sensor_energy(const Device *d, double t) {
    long n = sensor_index(d, t), at = n - d->seen_first;
    double published = d->sensor_phase + ((double)n + d->sensor_duty) * d->sensor_period;
    double before;
    if (at < 0) before = (double)at * d->sensor_period * d->p[0];
    else if (at < d->seen_count) before = d->seen[at];
    else before = d->seen[d->seen_count - 1] + (double)(at - d->seen_count + 1) * d->sensor_period * d->p[d->points - 1];
    return before + (t - published) * sensor_value(d, n);
}

static void prepare(Device *d) {
    d->energy = calloc((size_t)d->points, sizeof(double));
    for (int i = 1; i < d->points; i++)
        d->energy[i] = d->energy[i - 1] + (d->t[i] - d->t[i - 1]) * (d->p[i] + d->p[i - 1]) / 2;
    d->seen_first = sensor_index(d, d->t[0]) - 2;
    d->seen_count = (int)(sensor_index(d, d->t[d->points - 1]) - d->seen_first) + 3;
    d->seen = calloc((size_t)d->seen_count, sizeof(double));
    for (int i = 1; i < d->seen_count; i++)
        d->seen[i] = d->seen[i - 1] + d->sensor_period * sensor_value(d, d->seen_first + i - 1);
}

const Rule *active(const Device *d, const char *kind, double t) {
    for (int i = 0; i < d->rules; i++)
        if (!strcmp(d->rule[i].what, kind) && d->rule[i].from <= t && t < d->rule[i].to) return &d->rule[i];
    return NULL;
}

static double tick(const Device *d, double k) {                                /* with an uneven beat, if the world asks */
    double noise = sin(k * 12.9898) * 43758.5453;
    return d->counter_phase + k * d->counter_period + d->counter_jitter * (2 * (noise - floor(noise)) - 1);
}

static double counter_at(const Device *d, double t) {
    double k = floor((t - d->counter_phase) / d->counter_period) + 1;
    while (tick(d, k) > t) k--;
    double shown = tick(d, k);
    return d->counter_of_sensor ? sensor_energy(d, shown) : true_energy(d, shown);
}

uint64_t counter_mj(const Device *d, double t) {
    const Rule *frozen = active(d, "freeze", t), *reset = active(d, "reset", t);
    if (frozen) t = frozen->from;
    double joules = reset ? counter_at(d, t) - counter_at(d, reset->from) : d->base_j + counter_at(d, t);
    return (uint64_t)llround(1000 * fmax(joules, 0));
}

double sensor_shown(const Device *d, double t) { return sensor_value(d, sensor_index(d, t)); }

unsigned throttle_bits(const Device *d, double t) {
    unsigned bits = 0;
    for (int i = 0; i < d->rules; i++)
        if (!strcmp(d->rule[i].what, "throttle") && d->rule[i].from <= t && t < d->rule[i].to) bits |= (unsigned)d->rule[i].code;
    return bits;
}

/* ---- reading the world ---- */

static void set(Device *d, const char *key, const char *value) {
    double number = atof(value);
    if (!strcmp(key, "name")) snprintf(d->name, sizeof d->name, "%s", value);
    else if (!strcmp(key, "uuid")) snprintf(d->uuid, sizeof d->uuid, "%s", value);
    else if (!strcmp(key, "pci")) snprintf(d->pci, sizeof d->pci, "%s", value);
    else if (!strcmp(key, "memory_total")) d->memory_total = strtoull(value, NULL, 10);
    else if (!strcmp(key, "memory_used")) d->memory_used = strtoull(value, NULL, 10);
    else if (!strcmp(key, "split")) d->split = (int)number;
    else if (!strcmp(key, "activity")) d->activity = (int)number;
    else if (!strcmp(key, "base_j")) d->base_j = number;
    else if (!strcmp(key, "idle_w")) d->idle_w = number;
    else if (!strcmp(key, "peak_w")) d->peak_w = number;
    else if (!strcmp(key, "counter_period")) d->counter_period = number;
    else if (!strcmp(key, "counter_phase")) d->counter_phase = number;
    else if (!strcmp(key, "counter_jitter")) d->counter_jitter = number;
    else if (!strcmp(key, "counter_of_sensor")) d->counter_of_sensor = (int)number;
    else if (!strcmp(key, "sensor_period")) d->sensor_period = number;
    else if (!strcmp(key, "sensor_phase")) d->sensor_phase = number;
    else if (!strcmp(key, "sensor_duty")) d->sensor_duty = number;
    else { fprintf(stderr, "fake_nvml: unknown key %s\n", key); abort(); }
}

static void add_slice(Device *d, const char *line) {
    Device *part = calloc(1, sizeof(Device));
    sscanf(line, "slice %95s %u %lu %lu", part->uuid, &part->instance, &part->memory_total, &part->memory_used);
    snprintf(part->name, sizeof part->name, "%.80s MIG", d->name);
    part->whole = d;
    part->activity = d->activity;
    d->slice[d->slices++] = part;
}

int read_world(void) {
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512], word[256], clock[256] = "real";
    Device *d = NULL;
    if (!file) return LIBRARY_NOT_FOUND;
    gpu_count = 0;
    while (fgets(line, sizeof line, file)) {
        double t, p, from, to;
        int code;
        unsigned pid;
        unsigned long bytes;
        line[strcspn(line, "\n")] = 0;
        if (sscanf(line, "clock %255s %lf", clock, &real_epoch) >= 1) continue;
        if (!strcmp(line, "gpu")) { d = gpus[gpu_count++] = calloc(1, sizeof(Device)); d->whole = d; }
        else if (sscanf(line, "set %255s", word) == 1) set(d, word, line + 5 + strlen(word));
        else if (sscanf(line, "p %lf %lf", &t, &p) == 2) {
            if (d->points % 1024 == 0) {
                d->t = realloc(d->t, sizeof(double) * (size_t)(d->points + 1024));
                d->p = realloc(d->p, sizeof(double) * (size_t)(d->points + 1024));
            }
            d->t[d->points] = t;
            d->p[d->points++] = p;
        } else if (sscanf(line, "rule %255s %lf %lf %d", word, &from, &to, &code) == 4) {
            Rule *rule = &d->rule[d->rules++];
            snprintf(rule->what, sizeof rule->what, "%.23s", word);
            rule->from = from; rule->to = to; rule->code = code;
        } else if (sscanf(line, "process %u %lu %lf %lf %255s", &pid, &bytes, &from, &to, word) == 5)
            d->process[d->processes++] = (Process){pid, bytes, from, to, !strcmp(word, "graphics")};
        else if (!strncmp(line, "slice ", 6)) add_slice(d, line);
        else { fprintf(stderr, "fake_nvml: cannot read: %s\n", line); abort(); }
    }
    fclose(file);
    for (int i = 0; i < gpu_count; i++) prepare(gpus[i]);
    simulated_now = NULL;
    if (strcmp(clock, "real")) {
        int descriptor = open(clock, O_RDONLY);
        simulated_now = mmap(NULL, sizeof(double), PROT_READ, MAP_SHARED, descriptor, 0);
        close(descriptor);
    }
    return SUCCESS;
}
