"""Honest bundles that nobody measured: simulated machines, real scheduler, real step loop, real metrics.

    machine (a device, its sensors, its noise) ──▶ Executor ──▶ scheduler.run ──▶ rows, launches, traces

The scheduler draws blocks and orders, `runner._steps` ends windows, `recompute.launch_metrics` and `pairing.case_metrics` make the
numbers; only what a step takes and what a sensor shows is drawn here: log-normal step times with outliers, drift, throttling, level
shifts and launches that differ; counters that update every 0.1 s, sensors of 10 Hz, neighbours that steal time.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from effbench import hardware, scheduler
from effbench.exchange.contents import Contents
from effbench.protocol import Protocol, protocol
from effbench.recompute import launch_metrics
from effbench.runner import Request, _steps, record
from effbench.schema import Case, Launch, ModelRef, Series, Spec, TechniqueRef, Trace, Window, digest

MODELS = {"tiny-llama": 590_464, "small-llama": 4_263_168, "llama-1b": 1_100_048_384}
AXES = {"mha": "attention", "mqa": "attention", "gqa": "attention", "lora": "peft", "full": "peft", "fp32": "precision",
        "bf16": "precision", "fp16": "precision", "nf4": "precision", "int8": "precision", "moe": "ffn"}  # fmt: skip
SLOWER = {"mqa": 0.97, "gqa": 0.99, "lora": 1.1, "nf4": 1.4, "int8": 1.2}
BITS = {"bf16": 16, "fp16": 16, "nf4": 4.7, "int8": 8.4}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device: what it does at most, what its sensors are like, how noisy it is."""

    name: str
    device: str = "cpu"
    cores: int = 8
    memory_gb: float = 64.0
    flops_per_s: float = 2e11  # that a step reaches
    idle_w: float | None = None  # None: no sensor of energy
    busy_w: float = 0.0
    limit_w: float | None = None
    memory_bytes: int = 0
    clock_mhz: int = 1980
    noise: float = 0.05  # of a step, on logarithms
    launch_noise: float = 0.02
    sensor_s: float = 0.1
    stolen: float = 0.0  # share of the cores


GPUS = (
    Machine(name="NVIDIA H200", device="cuda", cores=16, memory_gb=540.0, flops_per_s=2.5e14, idle_w=78, busy_w=560, limit_w=700,
            memory_bytes=150_754_820_096, noise=0.004, launch_noise=0.003),
    Machine(name="NVIDIA H100 80GB HBM3", device="cuda", cores=26, memory_gb=236.0, flops_per_s=2.2e14, idle_w=70, busy_w=610, limit_w=700,
            memory_bytes=85_520_809_984, noise=0.01, launch_noise=0.004, sensor_s=0.025),
    Machine(name="NVIDIA A100-SXM4-80GB", device="cuda", cores=32, memory_gb=500.0, flops_per_s=1e14, idle_w=62, busy_w=330, limit_w=400,
            memory_bytes=85_899_345_920, clock_mhz=1410, noise=0.006, launch_noise=0.006),
    Machine(name="NVIDIA L4", device="cuda", cores=8, memory_gb=32.0, flops_per_s=2.4e13, idle_w=13, busy_w=70.5, limit_w=72,
            memory_bytes=24_152_899_584, clock_mhz=2040, noise=0.02, launch_noise=0.02),
    Machine(name="NVIDIA GeForce RTX 4090", device="cuda", cores=24, memory_gb=63.0, flops_per_s=6e13, idle_w=22, busy_w=390, limit_w=450,
            memory_bytes=25_757_220_864, clock_mhz=3105, noise=0.015, launch_noise=0.01),
    Machine(name="Tesla T4", device="cuda", cores=4, memory_gb=15.6, flops_per_s=1.5e13, idle_w=9, busy_w=66, limit_w=70,
            memory_bytes=15_642_329_088, clock_mhz=1590, noise=0.03, launch_noise=0.03),
)  # fmt: skip
CPUS = (
    Machine(name="AMD EPYC", cores=2, memory_gb=25.3, flops_per_s=8e10),
    Machine(name="Intel Xeon Gold 6248R", cores=8, flops_per_s=3e11, idle_w=55, busy_w=190, noise=0.02, launch_noise=0.01),
    Machine(name="AMD EPYC 7763", cores=4, memory_gb=16.8, flops_per_s=1.2e11, noise=0.12, launch_noise=0.08, stolen=0.03),
    Machine(name="Neoverse-V2", cores=16, memory_gb=120.0, flops_per_s=6e11, noise=0.008, launch_noise=0.005),
)
MACHINES = (*CPUS, *GPUS)


class Clock:
    """The launch's clock: whole ns; reading it takes some."""

    def __init__(self, random: np.random.Generator):
        self.now_ns, self._random = 0, random

    def __call__(self) -> float:
        self.now_ns += int(self._random.integers(60, 400))
        return self.now_ns * 1e-9

    def pass_(self, length_s: float) -> None:
        self.now_ns += max(1, int(length_s * 1e9))


@dataclass
class Noise:
    """Times of steps around a level: log-normal, outliers, slow drift, a throttled stretch, a common swing."""

    random: np.random.Generator
    level_s: float
    sigma: float
    outliers: float = 0.01
    drift: float = 0.0  # of the logarithm, over the first seconds
    throttled_from: int | None = None
    swing: float = 0.0
    count: int = 0
    state: float = 0.0

    def next_s(self) -> float:
        self.count += 1
        self.state = 0.9 * self.state + self.random.normal(0, self.swing)
        scaled = self.random.normal(0, self.sigma) + self.state + self.drift * (1 - math.exp(-self.count / 20))
        if self.random.random() < self.outliers:
            scaled += float(self.random.exponential(0.5))
        if self.throttled_from is not None and self.count > self.throttled_from:
            scaled += 0.2
        return self.level_s * math.exp(scaled)


class Session:
    """What `runner._steps` drives."""

    def __init__(self, clock: Clock, noise: Noise, tokens: int = 0):
        self.clock, self.noise, self.tokens, self.token_s = clock, noise, tokens, list[float]()

    def step(self) -> None:
        length_s = self.noise.next_s()
        if not self.tokens:
            self.clock.pass_(length_s)
            return
        shares = self.noise.random.dirichlet(np.full(self.tokens + 1, 200.0))
        for share in shares[:-1]:
            self.clock.pass_(length_s * share)
            self.token_s.append(self.clock())
        self.clock.pass_(length_s * shares[-1])


@dataclass
class Executor:
    """Runs launches on one simulated machine; its wall clock and the machine's counters go on from one to the next."""

    machine: Machine
    random: np.random.Generator
    wall_s: float = 1.7903e9
    boot: dict[str, float] = field(default_factory=lambda: {"stolen": 88.08, "pressure": 1975.273341, "energy": 1_234_567.89})
    fails: str = ""  # a technique that runs out of memory
    prefix: str = "launch"
    numbers: Any = field(default_factory=itertools.count)

    def renew(self) -> None:
        self.wall_s += 2.0

    def launch(self, request: Request) -> tuple[Launch, Trace]:
        request = replace(request, launch_id=f"{digest([self.prefix, next(self.numbers)])[:32]}")
        self.wall_s += float(self.random.uniform(0.02, 0.4))
        started_at = datetime.fromtimestamp(self.wall_s, UTC).isoformat(timespec="milliseconds")
        if self.fails and self.fails in request.spec.stack:
            self.wall_s += 1.0
            return record(request, "failed", "out_of_memory", started_at=started_at), Trace()
        launch, trace = _Run(self, request, protocol(request.spec.protocol), started_at).done()
        self.wall_s += max(w.end_s for w in launch.windows.values())
        return launch, trace


class _Run:
    """One launch."""

    def __init__(self, executor: Executor, request: Request, rules: Protocol, started_at: str):
        self.machine, self.random, self.request, self.rules, self.started_at = (
            executor.machine,
            executor.random,
            request,
            rules,
            started_at,
        )
        self.boot, self.clock, self.windows = executor.boot, Clock(executor.random), dict[str, Window]()
        self.spec, self.facts = request.spec, {**facts_of(request.spec, executor.machine), "seed": request.seed}
        self.series: list[Series] = []

    def phase(self, name: str, length_s: float) -> None:
        start_s = self.clock()
        self.clock.pass_(length_s)
        self.windows[name] = Window(start_s=start_s, end_s=self.clock())

    def done(self) -> tuple[Launch, Trace]:
        random, machine, rules, spec = self.random, self.machine, self.rules, self.spec
        trains = spec.workload in ("pretrain", "finetune")
        level_s = self.facts["step_flops"] / machine.flops_per_s * math.exp(random.normal(0, machine.launch_noise))
        noise = Noise(
            random,
            level_s,
            machine.noise,
            drift=float(random.choice([0.0, 0.0, 0.03])),
            swing=float(random.choice([0.0, machine.noise / 4])),
        )
        if random.random() < 0.06:
            noise.throttled_from = int(random.integers(5, 60))
        session = Session(self.clock, noise, spec.params.get("new_tokens", 0) if spec.workload == "generate" else 0)
        self.phase("build", float(random.uniform(0.1, 2.0)))
        self.phase("check", float(random.uniform(0.05, 0.3)))
        if trains:
            self.phase("quality", spec.params["quality_steps"] * level_s * 1.2)
        self.phase("open_probes", 0.4 if machine.device == "cuda" else 0.001)
        if machine.idle_w is not None:
            self.phase("idle_before", rules.idle_s)
        start_s = self.clock()
        warm_up = _steps(session, self.clock, rules.warm_up_s, rules.warm_up_steps, rules.window_limit_s)[0]  # type: ignore[arg-type]
        self.windows["warm_up"] = Window(start_s=start_s, end_s=self.clock())
        session.token_s = []
        self.clock.pass_(2e-4)
        points = [self.clock()]
        self.clock.pass_(float(random.uniform(5e-5, 4e-4)))
        start_s = self.clock()
        steps, ended_by = _steps(session, self.clock, rules.window_s, rules.window_steps, rules.window_limit_s)  # type: ignore[arg-type]
        self.windows["window"] = Window(start_s=start_s, end_s=self.clock(), ended_by=ended_by)
        self.clock.pass_(float(random.uniform(1e-4, 8e-4)))
        points.append(self.clock())
        if machine.idle_w is not None:
            self.phase("idle_after", rules.idle_s)
        self.phase("close_probes", 0.35 if machine.device == "cuda" else 0.015)
        if not trains:
            self.phase("quality", 0.1)
        self.phase("collect", 0.003)
        self.phase("track", 0.1)
        self._keep("warm_up_step", "s", "process", "perf_counter", warm_up[:, 0], warm_up[:, 1])
        self._keep("step", "s", "process", "perf_counter", steps[:, 0], steps[:, 1])
        if session.tokens:
            count = np.full(len(session.token_s), float(spec.params["batch_size"]))
            self._keep("token", "tokens", "process", "host clock", np.array(session.token_s), count)
        if trains:
            self._losses(len(warm_up) + len(steps))
        self._host(points)
        self._memory()
        if machine.device == "cuda":
            self._gpu()
        elif machine.idle_w is not None:
            self._rapl()
        reasons = ("cpu_contended",) if self.facts["other_cpu_share"] > 0.10 else ()
        trace = Trace(series=tuple(self.series))
        metrics = launch_metrics(spec=spec, windows=self.windows, facts=self.facts, trace=trace, reasons=reasons)
        known = {"windows": self.windows, "facts": self.facts, "reasons": reasons, "metrics": metrics}
        return record(self.request, "ok", started_at=self.started_at, **known), trace

    def _keep(self, name: str, unit: str, scope: str, source: str, t_s: np.ndarray, values: np.ndarray) -> None:
        self.series.append(Series(name=name, unit=unit, scope=scope, source=source, t_s=t_s, values=np.asarray(values, float)))

    def _losses(self, measured: int) -> None:
        """Losses that fall and scatter, and the figures of quality that go with them."""
        spec, random = self.spec, self.random
        first = spec.params["quality_steps"]
        count = first + measured
        losses = [2.0 + 3.5 * math.exp(-k / 15) + float(random.normal(0, 0.12)) for k in range(count)]
        validation = 2.0 + 3.5 * math.exp(-first / 15) + float(random.normal(0, 0.05))
        right = round(8192 * (0.22 + 0.4 / validation + float(random.normal(0, 0.004))))
        found = {
            "train_loss": sum(losses[first - 5 : first]) / 5, "quality_steps": first, "validation_loss": validation,
            "bits_per_byte": validation / math.log(2), "perplexity": math.exp(validation), "next_token_accuracy": right / 8192,
            "validation_tokens": 8192,
        }  # fmt: skip
        figure = {"quality": right / 8192, "figure": "next_token_accuracy on 8192 held-out bytes"}
        self.facts |= {"losses": losses[:1000], "quality": found | figure}

    def _host(self, points: Sequence[float]) -> None:
        """CPU time and what the host's counters say at the window's borders."""
        random, machine, threads = self.random, self.machine, self.spec.threads
        busy = float(random.uniform(0.88, 1.0)) if machine.device == "cpu" else float(random.uniform(0.4, 1.0)) / threads
        spent_s = [round(1e9 * t * busy * threads * (0.9 if k == 0 else 1.0)) * 1e-9 for k, t in enumerate(points)]
        spent_s[1] = max(spent_s[0], min(spent_s[1], spent_s[0] + threads * (points[1] - points[0])))
        spent_s = [round(s * 1e9) * 1e-9 for s in spent_s]
        length_s = points[1] - points[0]
        self._keep(
            "process_cpu_time", "s", "process", "CLOCK_PROCESS_CPUTIME_ID, getrusage", np.array(points), np.array(spent_s)
        )
        for name, key, quantum, share in (
            ("host_stolen_time", "stolen", 100, machine.stolen * machine.cores),
            ("host_pressure_some", "pressure", 10**6, float(random.uniform(0, 0.05))),
        ):
            before = self.boot[key] + share * points[0] * float(random.uniform(0.2, 1.0))
            after = before + share * length_s * float(random.uniform(0.5, 1.2))
            values = np.floor(np.array([before, after]) * quantum) / quantum
            self._keep(name, "s", "host", "/proc/stat" if key == "stolen" else "/proc/pressure/cpu", np.array(points), values)
            self.boot[key] = after + share * 0.2
        self.facts["other_cpu_share"] = float(random.exponential(0.02))

    def _sampled(self, period_s: float, late_s: float, start_s: float, end_s: float, marks: Sequence[float]) -> np.ndarray:
        """Times of readings on a schedule, each a little late, and one more at each border asked for."""
        due = np.arange(start_s + period_s, end_s, period_s)
        due = due[self.random.random(len(due)) > 0.004]  # a late reading skips
        t_s = np.sort(
            np.concatenate([[start_s], due + self.random.exponential(late_s, len(due)), *([m + 5e-4] for m in marks), [end_s]])
        )
        return np.rint(t_s * 1e9) * 1e-9

    def _memory(self) -> None:
        window = self.windows["window"]
        start_s = self.windows["open_probes"].end_s
        t_s = self._sampled(0.1, 4e-4, start_s, window.end_s + 2e-3, [])
        base = self.facts["weight_bytes"] * 1.4 + 4e7
        pages = np.rint((base + np.abs(self.random.normal(0, 5e6, len(t_s))).cumsum() % 3e7) / 4096) * 4096
        self._keep("process_memory", "B", "process", "/proc/self/statm", t_s, pages)
        self.facts["host_memory_peak_bytes"] = int(pages.max() + 4096 * self.random.integers(1000, 9000))
        self.facts["host_private_bytes"] = int(pages[-1])

    def _power(self) -> tuple[np.ndarray, np.ndarray]:
        """The true power every ms of the launch, in W."""
        machine, random = self.machine, self.random
        assert machine.idle_w is not None
        t_s = np.arange(0, max(w.end_s for w in self.windows.values()), 1e-3)
        steps = next(s for s in self.series if s.name == "step")
        busy = (t_s > self.windows["warm_up"].start_s) & (t_s < self.windows["window"].end_s)
        level = machine.busy_w * math.exp(float(random.normal(0, 0.01)))
        slow = np.repeat(random.normal(0, 0.015, len(t_s) // 50 + 1), 50)[: len(t_s)]
        phase = 0.04 * np.sin(2 * np.pi * t_s / float(np.median(steps.values)))
        watts = np.where(busy, level * (1 + slow + phase), machine.idle_w * (1 + 0.1 * slow))
        return t_s, np.minimum(watts, 1.02 * (machine.limit_w or np.inf))

    def _gpu(self) -> None:
        machine, random, window = self.machine, self.random, self.windows["window"]
        fine_s, watts = self._power()
        energy_j = np.concatenate([[0.0], np.cumsum(watts[:-1] * 1e-3)])
        opened_s = self.windows["open_probes"].start_s + 0.02
        burst_s = opened_s + np.arange(0, 0.3, 0.0021)
        closed_s = self.windows["close_probes"].end_s - 0.01
        slow_s = self._sampled(0.025, 2e-4, opened_s + 0.31, closed_s, [window.start_s - 8e-4, window.end_s])
        t_s = np.rint(np.concatenate([burst_s, slow_s]) * 2e9) * 0.5e-9
        period_s = 0.1 * (1 + float(random.normal(0, 1e-4)))
        phase_s = float(random.uniform(0, 0.1))
        updated_s = np.floor((t_s + phase_s) / period_s) * period_s - phase_s
        counter = np.floor((self.boot["energy"] + np.interp(updated_s, fine_s, energy_j)) * 1000) / 1000
        self._keep("gpu_energy_counter", "J", "gpu", "nvml:total_energy_consumption", t_s, counter)
        self.boot["energy"] += float(energy_j[-1]) + (machine.idle_w or 0) * 0.2
        shown_s = np.floor(slow_s / machine.sensor_s) * machine.sensor_s
        seen_s = np.rint(slow_s * 2e9) * 0.5e-9
        instant = np.rint(np.interp(shown_s, fine_s, watts) * 1000) / 1000
        trailing = np.interp(shown_s, fine_s, energy_j) - np.interp(shown_s - 1, fine_s, energy_j)
        self._keep("gpu_power_instant", "W", "gpu", "nvml:field186:scope0", seen_s, instant)
        self._keep("gpu_power_average", "W", "gpu", "nvml:field185:scope0", seen_s, np.rint(trailing * 1000) / 1000)
        seldom_s = seen_s[::4]
        busy = (seldom_s > self.windows["warm_up"].start_s) & (seldom_s < window.end_s)
        hot = np.rint(45 + 14 * (1 - np.exp(-np.maximum(0, seldom_s - self.windows["warm_up"].start_s) / 8)))
        peak = int(self.facts["weight_bytes"] * 3 + 2e9)
        rows: Mapping[str, tuple[str, np.ndarray]] = {
            "gpu_busy": ("ratio", np.where(busy, np.rint(random.uniform(94, 100, len(busy))), 0) / 100),
            "gpu_memory_used": ("B", np.full(len(busy), peak + 900_000_000.0)),
            "gpu_clock_sm": ("MHz", np.where(busy, machine.clock_mhz - 15 * random.integers(0, 8, len(busy)), 345)),
            "gpu_clock_memory": ("MHz", np.full(len(busy), 2619.0)),
            "gpu_temperature": ("°C", hot),
            "gpu_throttle": ("bits", np.where(busy & (random.random(len(busy)) < 0.3), 4.0, 0.0)),
            "gpu_sm_activity": ("ratio", np.where(busy, random.uniform(0.6, 0.9, len(busy)), 0.0)),
        }
        for name, (unit, values) in rows.items():
            self._keep(name, unit, "gpu", "nvml", seldom_s, values)
        self.facts |= {
            "gpu_name": machine.name, "gpu_memory_total_bytes": machine.memory_bytes, "gpu_power_limit_w": machine.limit_w,
            "gpu_max_clock_sm_mhz": machine.clock_mhz, "gpu_max_clock_memory_mhz": 2619,
            "gpu_sampler_reads": len(t_s), "gpu_failed_reads": {}, "counter_period_s": period_s, "gpu_power_scope": "gpu",
            "allocated_peak_bytes": peak - 400_000_000, "reserved_peak_bytes": peak,
        }  # fmt: skip

    def _rapl(self) -> None:
        fine_s, watts = self._power()
        energy_j = np.concatenate([[0.0], np.cumsum(watts[:-1] * 1e-3)])
        window = self.windows["window"]
        marks = [window.start_s - 4e-4, window.end_s]
        t_s = self._sampled(0.1, 3e-4, self.windows["open_probes"].end_s, self.windows["idle_after"].end_s + 1e-3, marks)
        values = np.floor(np.interp(t_s, fine_s, energy_j) * 1e6) * 1e-6
        self._keep("rapl_energy", "J", "package", "powercap: package-0", t_s, values)


def facts_of(spec: Spec, machine: Machine) -> dict[str, Any]:
    """What a workload would say of itself and its model."""
    names = [t.name for t in spec.techniques]
    width = next((n for n in names if n in BITS), "fp32")
    total = MODELS[spec.model.name] - (
        MODELS[spec.model.name] // 40 if "mqa" in names else MODELS[spec.model.name] // 80 if "gqa" in names else 0
    )
    adapter = total // 100 if "lora" in names else 0
    stored = int(total * BITS.get(width, 32) / 8) + 64
    params = spec.params
    flops_per_token = 6.0 * total if spec.workload in ("pretrain", "finetune") else 2.0 * total
    if spec.workload == "generate":
        tokens, samples, kind = params["batch_size"] * params["new_tokens"], params["batch_size"], "it"
        flops = flops_per_token * (tokens + params["batch_size"] * params["prompt_tokens"])
    else:
        tokens, samples = params["batch_size"] * params["seq_len"], params["batch_size"]
        kind, flops = {"pretrain": "tt", "finetune": "st"}[spec.workload], flops_per_token * tokens
    row = hardware.device(machine.name)
    rates = dict(row.flops_per_s) if row else {}
    facts: dict[str, Any] = {
        "step_tokens": tokens, "step_samples": samples, "throughput": kind, "step_bytes": None,
        "step_flops": flops * math.prod(SLOWER.get(n, 1.0) for n in names), "seed": 0, "params_total": total, "params_active": total,
        "params_trainable": 0 if spec.workload == "generate" else adapter or total, "weight_bytes": stored + 4 * adapter,
        "weight_bytes_by_kind": {"attention": stored // 3, "feed_forward": stored - stored // 3, "adapter": 4 * adapter},
        "bits_per_weight": 8 * stored / total, "compute_dtype": width if width in ("bf16", "fp16") else "bf16" if width in BITS else "fp32",
        "threads": spec.threads, "cores": machine.cores, "cpu_model": machine.name if machine.device == "cpu" else "AMD EPYC 9554",
        "peaks": {
            "matrix_flops_per_s": {"bf16": machine.flops_per_s * 1.9, "fp32": machine.flops_per_s * 1.4} if row is None else
            {k: 0.78 * v for k, v in rates.items()},
            "copy_bytes_per_s": 0.9 * row.memory_bytes_per_s if row else 4e10, "calibrated_at": "2026-09-24T01:18:56+00:00",
            "datasheet_flops_per_s": rates, "datasheet_bytes_per_s": row.memory_bytes_per_s if row else None,
        },
    }  # fmt: skip
    if spec.workload == "generate":
        cached = params["batch_size"] * (params["prompt_tokens"] + params["new_tokens"] - 1)
        facts |= {
            "kv_cached_tokens": cached,
            "kv_cache_bytes": cached * 1536,
            "requested_new_tokens": params["new_tokens"],
            "quality": {},
        }
    if machine.idle_w is None:
        facts["energy_reasons"] = ["rapl_missing"]
    return facts


def spec_of(
    workload: str, stack: Sequence[str], machine: Machine, *, model: str, protocol_name: str, seed: int, step_s: float
) -> Spec:
    """A spec whose step takes about `step_s` on this machine."""
    precision = "bf16" if machine.device == "cuda" else "fp32"
    names = [*stack, *([] if any(AXES[s] == "precision" for s in stack) else [precision])]
    refs = [
        TechniqueRef(name=n, axis=AXES[n], identity=f"effbench:{n}@0.1.0+{digest(n)[:12]}", filled_in=n not in stack)
        for n in names
    ]
    per_token = MODELS[model] * (2.0 if workload == "generate" else 6.0)
    tokens = max(8, int(step_s * machine.flops_per_s / per_token))
    if workload == "generate":
        params = {
            "batch_size": max(1, tokens // 24),
            "prompt_tokens": 16,
            "new_tokens": 8,
            "decode_engine": "auto",
            "validation_tokens": 8192,
        }
    else:
        params = {
            "batch_size": max(1, tokens // 32),
            "seq_len": 32,
            "quality_steps": 20,
            "learning_rate": 1e-3,
            "validation_tokens": 8192,
        }
    return Spec(
        workload=workload, params=params, model=ModelRef(name=model, digest=digest(model)), techniques=tuple(refs), text="builtin",
        text_digest="24" * 32, seed=seed, device=machine.device, threads=min(4, machine.cores), protocol=protocol_name, time_limit_s=300.0,
        workload_identity=f"effbench:{workload}@0.1.0+171595a340ab",
    )  # fmt: skip


def environment(machine: Machine) -> scheduler.Environment:
    """As `provenance.environment` has it."""
    cpu = machine.name if machine.device == "cpu" else "AMD EPYC 9554"
    name = f"{cpu} · {machine.cores} cores" if machine.device == "cpu" else machine.name
    packages = {"numpy": "2.4.6", "torch": "2.13.0"}
    driver = "570.86.15" if machine.device == "cuda" else None
    identity = {"source": "ab" * 32, "python": "3.11.9", "packages": packages, "device": name, "driver": driver,
                "power_limit_w": machine.limit_w and float(machine.limit_w), "cpu": cpu, "cores": machine.cores}  # fmt: skip
    provenance = {
        "effbench_version": "0.1.0", "source_digest": "ab" * 32, "git_commit": None, "python": "3.11.9", "platform": "Linux-6.8-x86_64",
        "device_name": name, "driver": driver, "cuda": "12.8" if driver else None,
        "power_limit_w": None if machine.limit_w is None else str(float(machine.limit_w)), "cpu": cpu, "cores": str(machine.cores),
        "memory_gb": f"{machine.memory_gb:.1f}", "packages": json.dumps(packages, sort_keys=True), "details": "{}",
    }  # fmt: skip
    provenance = {k: v for k, v in provenance.items() if v is not None}
    return scheduler.Environment(env_id=digest(identity), hardware=name, provenance=provenance)


STACKS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "pretrain": (("mha",), ("mqa",), ("gqa",)), "finetune": (("full",), ("lora",)), "generate": (("mha",), ("mqa",), ("nf4",)),
}  # fmt: skip


def bundle(
    seed: int,
    machine: Machine | None = None,
    *,
    workload: str = "",
    protocol_name: str = "quick",
    fails: str = "",
    step_s: float | None = None,
) -> Contents:
    """One submission: a workload on a machine, each stack compared with the first one. The same seed gives the same bundle."""
    random = np.random.default_rng([seed, 20_261])
    machine = machine or MACHINES[seed % len(MACHINES)]
    workload = workload or ("pretrain", "finetune", "generate")[seed % 3]
    model = "llama-1b" if machine.device == "cuda" else ("tiny-llama", "small-llama")[seed % 2]
    step_s = step_s or float(random.choice([0.012, 0.03, 0.05, 0.2]))
    common: dict[str, Any] = {"model": model, "protocol_name": protocol_name, "seed": seed % 7, "step_s": step_s}
    specs = [spec_of(workload, stack, machine, **common) for stack in STACKS[workload]]
    reference = Case(spec=specs[0])
    cases = [reference, *(replace(Case(spec=s, baseline=specs[0]), baseline_case_id=reference.case_id) for s in specs[1:])]
    executor = Executor(
        machine,
        random,
        wall_s=1.7903e9 + 5000 * seed + float(random.uniform(0, 900)),
        fails=fails,
        prefix=f"{seed} {machine.name}",
    )
    sweep = scheduler.Sweep(suite="cpu/attention", seed=seed, cases=cases, environment=environment(machine))
    rows, launches, traces = [], {}, {}
    for event in scheduler.run(sweep, executor):
        if isinstance(event, scheduler.LaunchDone):
            launches[event.launch.launch_id], traces[event.launch.launch_id] = event.launch, event.trace
        elif isinstance(event, scheduler.CaseDone):
            rows.append(replace(event.record, run_id=digest([seed, event.record.case_id])[:32]))
    return Contents(manifest={}, cases=tuple(rows), launches=launches, traces=traces)
