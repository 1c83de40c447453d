"""Every reason code that a record can carry, and its one sentence: the single table behind docs, doctor and boards.

A missing number carries the code that says why. A number that is there may carry remarks; a fault makes an energy reading
invalid. Codes are kept for good: records on disk use them.
"""

from __future__ import annotations

# Of an energy reading, or of a GPU probe's flags: the reading is invalid.
FAULTS = {
    "not_covered": "the samples do not reach from before the window's start to after its end",
    "sampling_gap": "two neighbouring samples in the window are further apart than the protocol allows",
    "window_too_short": "the window holds fewer updates of the sensor than the protocol asks for",
    "energy_missing": "there is neither an energy counter nor instant power",
    "counter_reset": "the energy counter fell: the driver was reloaded or the GPU was reset",
    "counter_frozen": "the energy counter stopped updating",
    "mig": "the GPU is split by MIG: power and energy exist for the whole GPU only",
    "foreign_process": "another process was on the GPU",
    "temperature_drift": "the GPU's temperature moved by more than the protocol's band over the window",
    "throttled": "the GPU slowed down because of heat or a power brake",
    "device_lost": "the GPU or its driver went away",
    "device_order_unknown": "the GPUs differ and CUDA's order of them is not NVML's: set CUDA_DEVICE_ORDER=PCI_BUS_ID",
    "nvml_missing": "libnvidia-ml or the NVIDIA driver is not there",
    "nvml_error": "NVML answered with an error",
    "no_device": "no GPU is visible",
    "sampler_died": "the sampling process ended before it delivered",
    "sampler_hung": "the sampling process did not answer and was killed",
}

# Of these, the ones that spoil the whole launch, times included: its status is `invalid` and it is measured again.
SPOILING = ("foreign_process", "throttled", "device_lost")

# Of an energy reading or a GPU probe's flags: the reading stays valid, and says so.
REMARKS = {
    "stale_samples": "the driver served the same power sample again; repeats were dropped and may leave a gap",
    "samples_lost": "some readings of a sensor failed; the facts say how many",
    "counter_missing": "there is no energy counter: the energy is the integral of instant power alone",
    "power_missing": "there is no instant power: the energy is the counter's, checked by nothing",
    "methods_disagree": "energy by counter and by integral of power differ by more than 5 %",
    "sensor_duty_unknown": "which share of the time the power sensor sees is not calibrated, so agreement is no proof",
    "idle_missing": "no idle stretch was measured, so there is no net energy",
    "module_scope": "the sensor covers the whole module (CPU, GPU, memory): never compare with the joules of a GPU alone",
    "foreign_process_undecidable": "processes on the GPU cannot be told apart from ours across PID namespaces",
    "power_capped": "the GPU ran at its power limit",
    "clocks_limited": "a setting (application clocks, sync boost, display) or the board held the clocks down",
    "mask_truncated": "CUDA_VISIBLE_DEVICES names a device that is not there; CUDA ignores it and what follows",
    "no_permission": "the driver does not let this user read the sensor",
    "not_supported": "this device or driver does not have the sensor",
}

# Of the host's probes.
HOST = {
    "stolen_time": "the hypervisor gave more than 5 % of this machine's CPU time to others",
    "cpu_contended": "other processes took more than 10 % of the cores that this one may use",
    "cpu_quota": "the control group's CPU quota stopped the launch for more than 5 % of the window",
    "stolen_not_readable": "/proc/stat cannot be read",
    "pressure_missing": "the kernel keeps no /proc/pressure/cpu",
    "rapl_missing": "the kernel offers no RAPL energy counter (a virtual machine, or a CPU without one)",
    "rapl_not_permitted": "RAPL energy counters are there, but readable by root only",
    "rapl_lost": "a RAPL energy counter could no longer be read",
    "birth_not_taken": "the launch did not note its memory at birth, so host memory has no zero",
    "peak_not_reset": "/proc/self/clear_refs may not be written, so the peak of the window is not known",
    "private_not_readable": "/proc/self/smaps_rollup is not there or not readable",
    "allocator_not_loaded": "no CUDA device of torch was in use at the window",
    "memory_sampler_died": "the process that samples host memory ended before it delivered",
    "memory_sampler_hung": "the process that samples host memory did not answer and was killed",
    "nothing_to_replay": "no recording was given",
    "recording_damaged": "the recording cannot be read",
}

# Of a metric, where nothing was wrong with a sensor.
METRIC = {
    "not_this_workload": "this kind of work does not give this metric",
    "no_gpu": "the case ran on a CPU",
    "no_energy_sensor": "no sensor of this machine gives energy",
    "no_power_sensor": "no sensor of this machine gives instant power",
    "not_sampled": "the sensor gave no samples over the window",
    "no_steps": "no step was completed in the window",
    "no_flop_model": "the workload states no FLOPs or bytes for a step",
    "not_calibrated": "this device's own rates are not measured: run `effbench doctor --calibrate`",
    "no_datasheet": "the device is not in hardware.py, and a peak is never guessed",
    "not_taken": "the workload took no such figure",
    "oversubscribed": "fewer cores or GPUs than processes: bytes and rows count, times would not mean anything",
    "no_such_part": "the model has no module of this kind",
    "tensors_not_tracked": "the step under the tensor tracker failed, or was not made",
    "no_memory_model": "what this model or work keeps in memory is not known before it runs",
    "no_baseline": "the case is its own reference",
    "no_quality": "no quality figure on both sides, so a compression rate would mean nothing",
    "quality_not_higher_is_better": "the quality figure is one for which lower is better, or unknown: it measures no quality",
    "no_nominal_bits": "the number formats of the two sides state no nominal bits",
    "quality_not_comparable": "the two sides name different quality figures",
    "baseline_failed": "the baseline has no value in the same block",
    "no_launch": "no launch of this case succeeded",
    "one_block": "an interval needs two blocks or more",
    "no_blocks": "no block has a value",
    "not_finite": "a block gave a value that is not finite, and was left out",
    "not_all_positive": "a block is zero or negative: the mean and interval are on the plain scale",
    "baseline_not_positive": "the baseline is zero or negative in a block: there is no ratio",
    "not_positive": "a ratio needs positive values on both sides",
    "not_a_number": "the value is not finite",
    "host_bound": "the GPU idled for more than 0.2 of the steps: Python was measured, not the technique",
    "estimate": "computed, not measured",
    "new_weights": "the loaded weights of a replaced part cannot be converted: that part started from new weights",
    "missing_in_some_blocks": "some blocks have no value",
}

REASONS = {**METRIC, **HOST, **REMARKS, **FAULTS}


def is_fault(code: str) -> bool:
    """Whether this code makes an energy reading invalid. Codes of other tables say nothing about energy: False."""
    return code in FAULTS
