"""The benchmarks of effbench itself: their arithmetic is right, each can be run, and none says more than it knows."""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from benchmarks import bare_loop, beside, common, company, expert_race, harness, launches, quick_suite, run, truth
from benchmarks.common import Figure, Report, Samples, Target, judge, judge_agreement, judge_beside, run_blocks
from benchmarks.energy_truth import percentile_interval
from benchmarks.peers import setup
from effbench import registry
from effbench.probe import Capability, Probe, ProbeContext, ProbeResult
from effbench.protocol import protocol
from effbench.schema import Window
from effbench.stats import Interval
from effbench.store import Store
from effbench.workload import BuildContext, Session, Step
from tests.records import make_launch, make_trace

ROOT = Path(run.__file__).parent
NOT_SCRIPTS = {"__init__", "common", "run", "company", "launches", "bare_loop", "beside", "expert_race"} | {
    "board_cases",
    "board_data",
    "board_viewers",
    "bare_page",
    "screenshots",
}
AT_MOST_ONE = Target(text="at most 1", upper=1.0)
AROUND_ONE = Target(text="within 3 %", lower=1 / 1.03, upper=1.03)


def between(lower: float | None, upper: float | None) -> Interval:
    return Interval(None if lower is None or upper is None else (lower + upper) / 2, lower, upper, 5)


@pytest.mark.parametrize(
    ("lower", "upper", "target", "answer"),
    [
        (0.5, 1.0, AT_MOST_ONE, "met"),
        (0.5, 1.1, AT_MOST_ONE, "undecided here"),
        (1.1, 1.2, AT_MOST_ONE, "missed"),
        (None, None, AT_MOST_ONE, "undecided here"),
        (0.99, 1.02, AROUND_ONE, "met"),
        (0.90, 1.02, AROUND_ONE, "undecided here"),
        (0.90, 0.95, AROUND_ONE, "missed"),
        (1.04, 1.05, AROUND_ONE, "missed"),
        (0.5, 2.0, AROUND_ONE, "undecided here"),
    ],
)
def test_a_target_is_met_or_missed_only_by_the_whole_interval(
    lower: float | None, upper: float | None, target: Target, answer: str
) -> None:
    assert judge(between(lower, upper), target) == answer


def test_what_identical_code_does_not_show_is_not_shown() -> None:
    quiet, noisy, off = between(0.995, 1.005), between(0.9, 1.1), between(1.02, 1.03)
    target = Target(text="", upper=1.01)
    assert judge_beside(between(0.99, 1.005), target, quiet) == "met"
    assert judge_beside(between(0.99, 1.005), target, noisy) == "undecided here"
    assert judge_beside(between(1.02, 1.03), target, quiet) == "missed"
    assert judge_beside(between(1.02, 1.03), target, noisy) == "missed"
    assert judge_beside(between(1.02, 1.03), target, off) == "undecided here"


def test_agreement_is_judged_beyond_the_spread_of_the_aa_but_a_wide_aa_excuses_nothing() -> None:
    quiet, noisy = between(0.98, 1.02), between(0.8, 1.25)
    assert judge_agreement(between(0.99, 1.04), quiet, 0.03) == "met"  # 3 % and a spread of 2 %
    assert judge_agreement(between(0.99, 1.07), quiet, 0.03) == "undecided here"
    assert judge_agreement(between(1.06, 1.09), quiet, 0.03) == "missed"
    assert judge_agreement(between(0.99, 1.01), noisy, 0.03) == "undecided here"
    assert judge_agreement(between(2.5, 3.0), noisy, 0.03) == "missed"
    assert judge_agreement(between(0.99, 1.01), between(None, None), 0.03) == "undecided here"


def test_an_aa_seldom_misses_a_target_of_no_difference() -> None:
    """Noise of 30 % with bursts of five times: identical arms are hardly ever said to differ, nor to be shown equal."""
    random = np.random.default_rng(0)
    answers = []
    for _ in range(300):
        noise = np.exp(random.normal(0, 0.3, (2, 12))) * np.where(random.random((2, 12)) < 0.05, 5.0, 1.0)
        blocks = tuple({"a": {"x_s": a}, "b": {"x_s": b}} for a, b in noise.T)
        answers.append(judge(Samples(blocks).ratio("a", "b", "x_s"), Target(text="", upper=1.01)))
    assert answers.count("missed") <= 0.05 * 300
    assert answers.count("met") <= 0.05 * 300


@pytest.mark.parametrize(
    ("key", "verdict", "others_share", "answer"),
    [
        ("launch_s", "missed", 0.02, "missed"),
        ("launch_s", "missed", 0.40, "undecided here"),
        ("launch_s", "met", 0.40, "met"),
        ("ours_over_peer_ratio", "met", 0.40, "undecided here"),
        ("ours_over_peer_ratio", "met", 0.05, "met"),
        ("ours_parent_share", "missed", 0.40, "missed"),
        ("cases_count", "missed", 0.40, "missed"),
        ("step_s", None, 0.40, None),
    ],
)
def test_on_a_busy_machine_being_slow_proves_nothing(key: str, verdict: Any, others_share: float, answer: Any) -> None:
    figure = Figure(key=key, title="", interval=between(1.0, 2.0), verdict=verdict)
    judged = company.on_a_busy_machine(figure, others_share)
    assert judged.verdict == answer
    assert ("busy" in judged.note) == (answer != verdict)


def test_company_is_what_is_busy_and_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    points = iter([(0.0, 100.0, 1.0), (10.0, 115.0, 6.0)])  # 15 s busy in 10 s, 5 s of it ours
    monkeypatch.setattr(company.Company, "_point", staticmethod(lambda: next(points)))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert company.Company().share() == pytest.approx(0.5)
    monkeypatch.undo()
    assert 0.0 <= company.Company().share() <= 1.1


def recording(order: list[str], name: str, value: float = 1.0) -> common.Arm:
    def arm() -> dict[str, float | None]:
        order.append(name)
        return {"x_s": value}

    return arm


def test_a_block_has_each_arm_once_in_an_order_of_its_own_that_the_seed_repeats() -> None:
    def orders(seed: int) -> list[list[str]]:
        seen: list[str] = []
        samples = run_blocks({name: recording(seen, name) for name in "abc"}, blocks=20, seed=seed)
        assert len(samples.blocks) == 20
        return [seen[i : i + 3] for i in range(0, 60, 3)]

    found = orders(1)
    assert all(sorted(block) == ["a", "b", "c"] for block in found)
    assert len({tuple(block) for block in found}) >= 4
    assert {block[0] for block in found} == {"a", "b", "c"}
    assert found == orders(1)
    assert found != orders(2)


def test_a_ratio_is_paired_and_drops_blocks_with_a_side_missing() -> None:
    drift = [1.0, 2.0, 4.0, 8.0]  # the machine slows down: only pairs within a block say anything
    blocks = [{"a": {"x_s": 1.1 * d}, "b": {"x_s": d}} for d in drift]
    ratio = Samples((*blocks, {"b": {"x_s": 9.0}}, {"a": {"x_s": None}, "b": {"x_s": 9.0}})).ratio("a", "b", "x_s")
    assert ratio.value == pytest.approx(1.1)
    assert ratio.n == 4
    assert (ratio.upper or 9) - (ratio.lower or 0) < 1e-9


def test_no_block_begins_that_would_end_too_late_and_expensive_arms_stop_early() -> None:
    now = [0.0]

    def slow() -> dict[str, float | None]:
        now[0] += 10.0
        return {"x_s": 10.0}

    samples = run_blocks({"a": slow, "b": slow}, blocks=50, seed=1, limit_s=100.0, clock=lambda: now[0])
    assert len(samples.blocks) == 5
    now[0] = 0.0
    samples = run_blocks({"a": slow, "b": slow}, blocks=6, seed=1, only_first={"b": 2}, clock=lambda: now[0])
    assert [sorted(block) for block in samples.blocks] == [["a", "b"]] * 2 + [["a"]] * 4


def test_the_last_line_is_json_with_the_figures_of_the_table() -> None:
    figure = common.against("launch_s", "a launch", Interval(0.4, 0.3, 0.5, 7), Target(text="at most 1 s", upper=1.0))
    missing = Figure(key="peer_ratio", title="the peer", interval=common.single(None, "it cannot be installed"))
    report = Report(name="x", compares="a and b", pairs=7, figures=[figure, missing], notes=["a note"])
    out = io.StringIO()
    common.emit(report, {**common.machine(), "others_share": 0.25}, 1.0, out)
    lines = out.getvalue().splitlines()
    last = json.loads(lines[-1])
    assert last["figures"]["launch_s"]["verdict"] == "met"
    assert (last["figures"]["launch_s"]["lower"], last["figures"]["launch_s"]["upper"]) == (0.3, 0.5)
    assert last["figures"]["peer_ratio"]["value"] is None
    assert last["pairs_count"] == 7
    assert last["machine"]["versions"]["torch"]
    shown = "\n".join(lines[:-1])
    assert "0.3 … 0.5" in shown
    assert "a note" in shown
    assert "it cannot be installed" in re.sub(r"[\s│]+", " ", shown)
    with pytest.raises(ValueError, match="unit"):
        Figure(key="launch", title="", interval=common.single(1.0))


def test_the_fixed_cost_of_a_launch_is_what_is_not_the_measurement() -> None:
    names = ("build", "warm_up", "window", "idle_before", "idle_after", "quality", "collect")
    windows = {name: Window(start_s=float(i), end_s=float(i + 1)) for i, name in enumerate(names)}
    timed = launches.Timed(launch=make_launch(windows=windows), trace=make_trace(), wall_s=7.25)
    assert timed.fixed_s == pytest.approx(2.25)
    assert timed.phase_s("build") == 1.0
    assert timed.phase_s("check") is None


def test_a_run_of_the_suite_has_its_blocks_as_replicas(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for block, end_s in enumerate((10.0, 11.0, 9.0)):
        windows = {"build": Window(start_s=0.0, end_s=1.0), "window": Window(start_s=1.0, end_s=end_s)}
        store.write_launch(make_launch(f"launch-{block}", block=block, windows=windows), make_trace())
    inside_s = quick_suite._block_times(store)
    assert inside_s == [10.0, 11.0, 9.0]
    total = quick_suite._total(40.0, inside_s)
    assert total.value == 40.0
    assert total.n == 3
    assert 30.0 < (total.lower or 0) < 40.0 < (total.upper or 0) < 55.0
    assert quick_suite._total(40.0, [30.0]).lower is None


def test_the_interval_of_a_percentile_covers_it() -> None:
    random = np.random.default_rng(0)
    intervals = [percentile_interval(random.random(200), 0.95) for _ in range(100)]
    covered = sum((i.lower or 1.0) <= 0.95 <= (i.upper or 0.0) for i in intervals)
    assert covered >= 88
    assert percentile_interval(random.random(10), 0.95).upper is None


def test_every_script_is_listed_and_says_what_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.stem for path in ROOT.glob("*.py")} - NOT_SCRIPTS == set(run.SCRIPTS)
    for name in run.SCRIPTS:
        script = importlib.import_module(f"benchmarks.{name}")
        assert len(script.__doc__.splitlines()) >= 5
        assert callable(script.run)
    assert run.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(run.SCRIPTS)


def test_an_unknown_name_is_refused_with_near_misses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["launch_cots"]) == 2
    assert "Did you mean: launch_cost" in capsys.readouterr().err


def test_the_peer_is_pinned_exactly() -> None:
    pins = [line for line in setup.PINS.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z_-]+==[0-9.]+", pin) for pin in pins)
    assert {"optimum-benchmark==0.6.0", "transformers==4.57.6"} <= set(pins)
    assert pins[0] == next(
        line for line in (ROOT.parent / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    )


def test_a_cuda_build_of_torch_is_refused_before_it_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offers(*requirements: str) -> None:
        answer = json.dumps({"install": [{"metadata": {"requires_dist": ["sympy", *requirements]}}]})
        monkeypatch.setattr(setup, "_pip", lambda *arguments: answer)

    offers()
    setup._refuse_gpu_build("torch==1")
    offers("nvidia-cublas==13; platform_system == 'Linux'")
    with pytest.raises(setup.PeerUnavailable, match="CUDA build"):
        setup._refuse_gpu_build("torch==1")


def point(*ratios: float) -> expert_race.Point:
    return expert_race.Point("p", "grouped_mm", [1.0] * len(ratios), list(ratios), [1.0, 1.01, 0.99])


def test_a_point_is_slower_only_where_that_is_shown_among_all_points() -> None:
    clear, hint, faster = point(0.80, 0.81, 0.79, 0.80), point(0.90, 0.93, 0.95, 0.91), point(1.5, 1.6, 1.4)
    assert expert_race.shown_slower([clear, faster]) == {0}
    assert expert_race.shown_slower([hint]) == {0}
    assert expert_race.shown_slower([hint, *[faster] * 30]) == set(), "of many points one looks slow by chance"
    assert expert_race.shown_slower([point(0.5, 0.5, 0.5)]) == set(), "no spread, no test"


def test_the_mean_over_points_is_geometric_and_no_surer_than_they_are() -> None:
    mean = expert_race.geometric_mean([point(1.9, 2.0, 2.1), point(0.48, 0.5, 0.52)])
    assert mean.value == pytest.approx(1.0, rel=0.01)
    assert mean.lower is not None
    assert mean.upper is not None
    assert mean.lower < 0.99 < 1.01 < mean.upper


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for what transformers has renamed
def test_the_bare_training_loop_does_the_steps_of_the_workload(tmp_path: Path) -> None:
    spec = harness.finetune_spec(launches.save_checkpoint(tmp_path / "tiny"))
    losses: list[float] = []
    bare = bare_loop.finetuning(str(tmp_path / "tiny"), bare_loop.order_of(spec, tmp_path / "tiny"), losses)
    session: Any = registry.workload("finetune")(spec.params).build(BuildContext(spec=spec, seed=spec.seed, clock=lambda: 0.0))
    session.check()
    for index in range(4):
        session.step()
        assert bare(index)["step_s"] > 0
    assert session.losses == pytest.approx(losses, rel=1e-5)
    assert len(set(losses)) == 4


def test_windows_of_the_runner_and_of_a_bare_loop_take_turns_with_probes_on_ours_alone() -> None:
    done: list[str] = []

    class Slow(Session):
        step_work = Step(tokens=1, samples=1)

        def check(self) -> None:
            """Nothing can be wrong here."""

        def step(self) -> None:
            done.append("ours")
            time.sleep(0.02)

        def facts(self) -> dict[str, Any]:
            return {}

    class Watching(Probe):
        name = "watching"
        devices = ("cpu",)

        @classmethod
        def capabilities(cls) -> list[Capability]:
            return []

        def __enter__(self) -> Self:
            done.append("on")
            return self

        def __exit__(self, *_: object) -> None:
            done.append("off")

        def result(self) -> ProbeResult:
            raise AssertionError("nothing asks for it")

    def call(index: int) -> None:
        done.append("bare")
        time.sleep(0.01)

    rules = replace(protocol("smoke"), window_s=0.05, window_steps=3, warm_up_s=0.0, warm_up_steps=1, idle_s=0.0)
    context = ProbeContext(device="cpu", pid=1, threads=1, clock=time.perf_counter)
    rounds = beside.measured(Slow(), call, lambda: [Watching(context)], rules, rounds=5, seed=1)
    assert [done.count(word) for word in ("on", "off")] == [5, 5]
    between, found = False, set()
    for word in done:
        between = {"on": True, "off": False}.get(word, between)
        found.add((word, between))
    assert found == {("on", True), ("ours", True), ("off", False), ("bare", False)}
    ratios = beside.ratios(rounds, "generate")
    assert np.median(ratios["ours_generate_ratio"]) == pytest.approx(2.0, rel=0.4)
    assert np.median(ratios["again_generate_ratio"]) == pytest.approx(1.0, rel=0.4)


def test_the_harness_is_cheap_only_where_the_whole_interval_and_its_aa_say_so() -> None:
    def verdict(ours: float, again: float) -> Any:
        noise = np.linspace(0.997, 1.003, 9)
        blocks = tuple(
            {"block": {"generate_s": 1.0, "again_generate_ratio": again * n, "ours_generate_ratio": ours * n}} for n in noise
        )
        samples = Samples(blocks)
        return truth.figures(samples, "generate_s", "generate", harness.TARGET.text, harness._judge)[-1].verdict

    assert [verdict(1.01, 1.0), verdict(1.05, 1.0), verdict(1.02, 1.0)] == ["met", "missed", "undecided here"]
    assert [verdict(1.01, 1.03), verdict(1.05, 1.05)] == ["undecided here"] * 2


SCRIPTS = [
    "probe_overhead",
    "listing",
    "truth",
    "harness",
    "experts_forward",
    "experts_training",
    "experts_quantised",
    "experts_gpu",
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_and_a_tiny_run_claims_nothing(name: str) -> None:
    command = [sys.executable, str(ROOT / "run.py"), name, "--tiny", "--blocks", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert last["bench"] == name
    assert last["pairs_count"] >= 1
    assert any(figure["value"] for figure in last["figures"].values())
    assert not any("verdict" in figure for figure in last["figures"].values())
