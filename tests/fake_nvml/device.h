/* The simulated GPU: what is known of it, and what it shows at a time. See device.c. */

#include <stdint.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       LIBRARY_NOT_FOUND = 12, VERSION_MISMATCH = 25 };
enum { MAX_GPUS = 8, MAX_SLICES = 8, MAX_RULES = 64 };

typedef struct { char what[24]; double from, to; int code; } Rule;             /* fail, freeze, stale, throttle, reset */
typedef struct { unsigned pid; uint64_t bytes; double from, to; int graphics; } Process;
typedef struct Device {
    struct Device *whole;                                                      /* of a slice, else itself */
    unsigned instance;
    char name[96], uuid[96], pci[32];
    uint64_t memory_total, memory_used;
    int split, activity, temperature;
    double base_j, counter_period, counter_phase, counter_jitter, sensor_period, sensor_phase, sensor_duty, idle_w, peak_w;
    int counter_of_sensor, points, rules, processes, slices;
    double *t, *p, *energy;                                                    /* truth: times, watts, joules up to there */
    double *seen; long seen_first; int seen_count;                             /* joules by the sensor at its publications */
    Rule rule[MAX_RULES];
    Process process[MAX_RULES];
    struct Device *slice[MAX_SLICES];
} Device;

extern Device *gpus[MAX_GPUS];
extern int gpu_count;

int read_world(void);                                                          /* of $FAKE_NVML; 0 or an NVML error code */
double now(void);                                                              /* s */
double true_energy(const Device *d, double t);                                 /* J since the first point of the truth */
double sensor_energy(const Device *d, double t);                               /* J, had the sensor's values been true */
double sensor_shown(const Device *d, double t);                                /* W */
uint64_t counter_mj(const Device *d, double t);
const Rule *active(const Device *d, const char *kind, double t);               /* the rule of this kind at t, or NULL */
unsigned throttle_bits(const Device *d, double t);
