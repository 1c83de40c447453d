"""Groups, blocks, pairing and resume, with an executor that only answers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from effbench import scheduler
from effbench.protocol import protocol
from effbench.runner import record
from effbench.schema import Case, ModelRef, Trace
from tests.factories import spec, steady

HERE = scheduler.Environment(env_id="here", hardware="test machine")


class Answering:
    """An executor whose launches succeed, or fail for the stacks named in `broken`."""

    def __init__(self, broken=()):
        self.broken, self.requests, self.renewed = set(broken), [], 0

    def launch(self, request):
        self.requests.append(request)
        if request.spec.stack[0] in self.broken:
            return record(request, "failed", "raised: RuntimeError"), Trace()
        done = steady(request.spec, 0.1, block=request.block)
        return replace(done, launch_id=request.launch_id, block_id=request.block_id), Trace()

    def renew(self):
        self.renewed += 1


def cases(*pairs, **changes):
    return [Case(spec=spec(own, **changes), baseline=spec(base, **changes) if base else None) for own, base in pairs]


def sweep(of, **more):
    return scheduler.Sweep(suite="test", seed=1, cases=of, environment=HERE, **more)


def run(of, executor, **more):
    return list(scheduler.run(sweep(of, **more), executor))


def records(events):
    return {e.record.techniques: e.record for e in events if isinstance(e, scheduler.CaseDone)}


TRIO = (("mha", None), ("gqa", "mha"), ("mqa", "mha"))


def test_specs_that_are_compared_share_a_group_also_through_a_chain():
    found = scheduler.groups(cases(("a", "b"), ("x", "y"), ("b", "c"), ("c", None), ("y", None)))
    assert [[case.spec.stack[0] for case in group] for group in found] == [["a", "b", "c"], ["x", "y"]]


def test_a_block_holds_one_launch_of_each_spec_in_a_seeded_order():
    executor = Answering()
    run(cases(*TRIO), executor)
    blocks = [list(group) for _, group in itertools.groupby(executor.requests, key=lambda r: r.block_id)]
    assert [sorted(r.spec.stack[0] for r in block) for block in blocks] == [["gqa", "mha", "mqa"]] * 3
    again = Answering()
    run(cases(*TRIO), again)
    orders = [[r.spec.stack for r in e.requests] for e in (executor, again)]
    assert orders[0] == orders[1]
    assert len({tuple(r.spec.stack[0] for r in block) for block in blocks}) > 1


def test_both_sides_of_a_pair_get_the_same_seed_and_blocks_get_different_ones():
    executor = Answering()
    run(cases(*TRIO), executor)
    by_block = {b: {r.seed for r in executor.requests if r.block == b} for b in range(3)}
    assert [len(seeds) for seeds in by_block.values()] == [1, 1, 1]
    assert len(set.union(*by_block.values())) == 3


def test_a_row_names_its_launches_and_those_of_its_baseline():
    found = records(run(cases(*TRIO), Answering()))
    assert len(found["mqa",].launch_ids) == len(found["mqa",].baseline_launch_ids) == 3
    assert found["mqa",].baseline_launch_ids == found["mha",].launch_ids
    assert found["mha",].baseline_launch_ids == ()


def test_a_failing_technique_becomes_a_row_and_the_others_go_on():
    executor = Answering(broken={"gqa"})
    found = records(run(cases(*TRIO), executor))
    assert {name[0]: row.status for name, row in found.items()} == {"mha": "ok", "gqa": "failed", "mqa": "ok"}
    assert found["gqa",].reason == "raised: RuntimeError"
    assert sum(r.spec.stack == ("gqa",) for r in executor.requests) == 1  # not tried again in this run


def test_a_failing_baseline_leaves_the_technique_its_own_numbers():
    found = records(run(cases(*TRIO), Answering(broken={"mha"})))
    al = next(m for m in found["mqa",].metrics if m.name == "al_s")
    assert found["mqa",].status == "ok"
    assert (al.value, al.ratio) == (pytest.approx(0.1), None)
    assert "baseline_failed" in al.reasons


def test_a_skipped_case_is_a_row_with_its_reason_and_is_never_launched():
    executor = Answering()
    found = records(run([replace(cases(("mqa", None))[0], skip_reason="does not fit")], executor))
    assert (found["mqa",].status, found["mqa",].reason) == ("skipped", "does not fit")
    assert executor.requests == []


def test_complete_blocks_of_an_earlier_run_count_and_cut_ones_are_run_again():
    first = Answering()
    kept = []
    for event in scheduler.run(sweep(cases(*TRIO)), first):
        if isinstance(event, scheduler.LaunchDone):
            kept.append(event.launch)
        if len(kept) == 5:  # killed in the second block
            break
    second = Answering()
    found = records(run(cases(*TRIO), second, earlier=kept))
    assert len(second.requests) == 6
    assert {launch.launch_id for launch in kept[:3]} <= {i for row in found.values() for i in row.launch_ids}
    assert not {launch.launch_id for launch in kept[3:]} & {i for row in found.values() for i in row.launch_ids}


def test_a_budget_ends_on_a_whole_block():
    times = itertools.count(0.0, 10.0)
    events = run(cases(*TRIO), Answering(), deadline_s=15.0, clock=lambda: next(times))
    launches = [e for e in events if isinstance(e, scheduler.LaunchDone)]
    assert isinstance(events[-1], scheduler.BudgetSpent)
    assert events[-1].cases_left == 3
    assert len(launches) % 3 == 0
    assert not records(events)


def test_publish_starts_a_new_fork_server_for_every_block():
    executor = Answering()
    run(cases(*TRIO, protocol="publish"), executor)
    assert executor.renewed == protocol("publish").blocks


def test_weights_that_cannot_be_trained_fail_every_case_that_stands_on_them():
    class Untrainable(Answering):
        def launch(self, request):
            if request.prepare_only:
                return record(request, "failed", "the text is gone"), Trace()
            return super().launch(request)

    model = ModelRef(name="tiny-llama", weights="trained", digest="d")
    found = records(run(cases(*TRIO, model=model), Untrainable()))
    assert {row.status for row in found.values()} == {"failed"}
    assert {row.reason for row in found.values()} == {"the text is gone"}
