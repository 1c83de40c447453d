"""The expected peak of tensor bytes against the measured one of a real step, and what follows from its formulas alone."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from effbench import registry
from effbench.flow import Flow, Row
from effbench.layout import Layout, Weight
from effbench.models import weights
from effbench.models.context import layout
from effbench.models.memory import Memory, expected_memory
from effbench.models.shapes import shape_names
from effbench.planning import Options, case_name, plan, techniques
from effbench.schema import Spec
from effbench.suite import read_suite
from effbench.tape import Tape, Value
from effbench.tensors import step_peak_bytes
from effbench.workload import BuildContext
from tests.factories import resolved

ALLOWED = 0.15
CPU_SUITES = sorted(Path("suites/cpu").glob("*.yaml"))
NSA = ("nsa", {"groups": 2, "block": 8, "stride": 4, "select_block": 16, "num_selected": 4, "window": 32})
TRAINING = {"batch_size": 4, "seq_len": 64, "quality_steps": 0}
GENERATION = {"batch_size": 2, "prompt_tokens": 64, "new_tokens": 4, "validation_tokens": 0}


def spec_of(model: str, workload: str, params: dict[str, Any], *stack: Any, **model_changes: Any) -> Spec:
    named = tuple((s, {}) if isinstance(s, str) else s for s in stack)
    plain = resolved(model, workload=workload, **model_changes)
    filled = registry.workload(workload).Params(**params).model_dump(mode="json")
    return replace(plain, params=filled, techniques=techniques(named, "cpu"))


def measured(spec: Spec) -> int:
    """Peak of tensor bytes of the second step of a session."""
    weights.prepare(spec)
    workload = registry.workload(spec.workload)(spec.params)
    session = workload.build(BuildContext(spec=spec, seed=1, clock=time.perf_counter))
    session.step()
    peak = step_peak_bytes(session.step)
    del session
    gc.collect()
    return peak


def compare(spec: Spec) -> float:
    """Measured over expected; what the cases before it have left alive in this process is not of the step."""
    gc.collect()
    others = step_peak_bytes(lambda: None)
    expected = expected_memory(spec)
    assert expected is not None, f"{case_name(spec)} has no expectation"
    found = measured(spec) - others
    print(f"{case_name(spec)}: expected {expected.peak_bytes / 1e6:.3f} MB, measured {found / 1e6:.3f} MB,"
          f" ratio {found / expected.peak_bytes:.3f}")  # fmt: skip
    return found / expected.peak_bytes


STACKS = [
    ("small-llama", "pretrain", TRAINING, ("mha",)),  # six layers, of which two run on the tape
    ("tiny-qwen2", "pretrain", TRAINING, (("gqa", {"groups": 2}), "bf16")),
    ("small-llama", "finetune", {**TRAINING, "activation_checkpointing": True}, ("full",)),
    ("tiny-llama", "pretrain", TRAINING, ("mha", "eager_attention")),
    ("tiny-llama", "pretrain", TRAINING, (("mla", {"kv_rank": 32}),)),
    ("tiny-llama", "pretrain", TRAINING, (NSA,)),
    ("tiny-llama", "pretrain", TRAINING, ("relative_bias",)),
    ("tiny-llama", "pretrain", TRAINING, ("mamba",)),
    ("tiny-llama", "pretrain", TRAINING, ("rwkv",)),
    ("tiny-llama", "pretrain", TRAINING, (("moe", {"experts": 16, "top_k": 3, "shared": 1}),)),
    ("tiny-llama", "pretrain", TRAINING, ("moe", "expert_kernels")),
    ("tiny-mixtral", "pretrain", TRAINING, ("bf16",)),
    ("small-llama", "finetune", TRAINING, (("lora", {"r": 8}),)),
    ("tiny-llama", "finetune", TRAINING, (("lora", {"r": 8}), "bf16")),
    ("tiny-llama", "finetune", TRAINING, (("dora", {"r": 8}),)),
    ("tiny-llama", "finetune", TRAINING, ("nf4", ("lora", {"r": 8}))),
    ("small-llama", "finetune", TRAINING, (("freeze", {"first": 3}),)),
    ("small-llama", "generate", GENERATION, (("gqa", {"groups": 2}),)),
    ("small-llama", "generate", {**GENERATION, "prompt_tokens": 16, "new_tokens": 40}, ("mha",)),  # the last step is the peak
    ("small-llama", "generate", {**GENERATION, "decode_engine": "static"}, ("mha",)),
    ("tiny-mistral", "generate", GENERATION, ("mla", "bf16")),
    ("small-llama", "generate", {**GENERATION, "prompt_tokens": 256}, (NSA,)),
    ("tiny-llama", "generate", GENERATION, ("mamba",)),
    ("tiny-llama", "generate", GENERATION, ("int8",)),
    ("tiny-llama", "generate", GENERATION, ("int4",)),
    ("tiny-mixtral", "generate", GENERATION, ("int4",)),
    ("olmoe-1b-7b-8th", "moe_layer", {"tokens": 64, "mode": "train"}, ("expert_kernels",)),
]  # fmt: skip


def name_of(case: Any) -> str:
    model, workload, params, stack = case
    more = [key for key in ("activation_checkpointing", "decode_engine") if key in params]
    return "-".join([workload, model, *(s if isinstance(s, str) else s[0] for s in stack), *more])


@pytest.mark.parametrize("case", STACKS, ids=name_of)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_a_step_has_as_many_bytes_alive_as_expected(case: Any) -> None:
    model, workload, params, stack = case
    needed = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int4": "torchao"}
    for name in stack:
        if isinstance(name, str) and name in needed:
            pytest.importorskip(needed[name])
    assert compare(spec_of(model, workload, params, *stack)) == pytest.approx(1, abs=ALLOWED)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_every_case_of_the_cpu_suites_is_within_its_bounds() -> None:
    off = []
    for path in (Path("suites/quick.yaml"), *CPU_SUITES):
        for case in plan(read_suite(path), Options()):
            if case.spec.nproc > 1:
                continue  # ranks are launched by tests/workloads/test_expert_parallel.py
            if case.skip_reason is None and not 1 - ALLOWED <= (ratio := compare(case.spec)) <= 1 + ALLOWED:
                off.append(f"{path.name}: {case_name(case.spec)} {ratio:.3f}")
    assert not off


def test_alike_layers_run_twice_count_as_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("small-llama", "pretrain", TRAINING, "mha")
    served = spec_of("small-llama", "generate", GENERATION, "mha")
    again = spec_of("small-llama", "finetune", {**TRAINING, "activation_checkpointing": True}, ("lora", {"r": 8}), "bf16")
    short = [expected_memory(s) for s in (spec, served, again)]
    monkeypatch.setattr(Flow, "_rows", one_by_one(Flow._rows))
    for one, other in zip(short, [expected_memory(s) for s in (spec, served, again)], strict=True):
        assert one is not None and other is not None
        assert one.peak_bytes == pytest.approx(other.peak_bytes, rel=1e-6)


def one_by_one(rows: Any) -> Any:
    def every(flow: Flow) -> list[Row]:
        return [Row(row.first + i, 1, row.cost) for row in rows(flow) for i in range(row.count)]

    return every


def test_states_gradients_and_weights_follow_from_what_is_trained() -> None:
    full = expected_memory(spec_of("tiny-llama", "finetune", TRAINING, "full"))
    lora = expected_memory(spec_of("tiny-llama", "finetune", TRAINING, ("lora", {"r": 8})))
    half = expected_memory(spec_of("tiny-llama", "finetune", TRAINING, "full", "bf16"))
    assert full and lora and half
    trained, adapters = 590464, 2 * 8 * (4 * 256 + 3 * 640)
    assert full.optimizer == 8 * trained
    assert lora.optimizer == 8 * adapters
    assert half.weights == full.weights, "trained weights are kept in fp32"
    assert lora.weights == pytest.approx(full.weights + 4 * adapters)
    assert lora.activations < full.peak_bytes


def test_memory_grows_evenly_with_the_batch() -> None:
    params = {**TRAINING, "batch_size": 1}
    one, two, four = (
        expected_memory(spec_of("qwen2.5-0.5b", "pretrain", {**params, "batch_size": n}, "mha")) for n in (1, 2, 4)
    )
    assert one and two and four
    assert four.peak_bytes - two.peak_bytes == pytest.approx(2 * (two.peak_bytes - one.peak_bytes), rel=0.02)
    assert four.weights == one.weights


@pytest.mark.parametrize("name", shape_names())
def test_every_published_shape_has_an_expectation(name: str) -> None:
    for workload, params, stack in (("finetune", TRAINING, ("lora", "bf16")), ("generate", GENERATION, ("bf16",))):
        spec = spec_of(name, workload, params, *stack)
        found, tensors = expected_memory(spec), layout(spec)
        assert found is not None and tensors is not None, f"{name}: {workload}"
        # Adapted experts are copied by peft, and every copy is kept for the backward pass: twice the bytes.
        assert 1.0 < found.peak_bytes / tensors.stored_bytes() < (2.5 if tensors.num_weights() > 1e9 else 40.0)


def test_a_form_that_nobody_described_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(flow: Flow, *args: Any, **options: Any) -> None:
        flow.tape.weight("model.layers.*.something_else.weight")

    spec = spec_of("tiny-llama", "pretrain", TRAINING, "mha")
    assert isinstance(expected_memory(spec), Memory)
    monkeypatch.setattr(Flow, "train", other)
    assert expected_memory(spec) is None


# The tape itself, on sizes that can be counted by hand.


def tape_of(*weights: Weight, trains: bool = True) -> Tape:
    return Tape(Layout(model_type="", config={"dtype": "float32"}, weights=list(weights)), trains=trains)


def matrix(path: str, out: int, into: int, **changes: Any) -> Weight:
    return Weight(path=f"{path}.weight", kind="attention", shape=(out, into), linear=True, **changes)


def test_what_is_let_go_no_longer_counts() -> None:
    tape = tape_of(trains=False)
    x = tape.new(100)
    y = tape.function(x)
    del x
    assert (tape.total_bytes, tape.peak_bytes) == (400, 800)
    del y
    assert tape.total_bytes == 0


def test_a_linear_layer_keeps_its_input_where_its_weight_is_trained() -> None:
    for trained in (True, False):
        tape = tape_of(matrix("a", 20, 10), matrix("b", 5, 20, trained=trained))
        x = tape.new(70)  # 7 rows
        hidden = tape.linear(x, "a")
        out = tape.linear(hidden, "b")
        del hidden
        kept = 7 * 20 * 4 if trained else 0
        assert tape.total_bytes == 4 * (70 + 7 * 5) + kept
        tape.backward(out)
        assert sum(s.nbytes for s in tape.gradients.values()) == 4 * (200 + (100 if trained else 0))


def test_a_product_keeps_both_factors_and_a_sum_none() -> None:
    tape = tape_of(matrix("a", 10, 10))
    one, other = tape.linear(tape.new(10), "a"), tape.linear(tape.new(10), "a")
    before = tape.total_bytes
    total = tape.add(one, other)
    product = tape.mul(total, one)
    del one, other, total
    assert tape.total_bytes == before + 40 - 40 + 40, "the sum and a factor are kept, the other factor is not; and the product"
    assert product.node is not None


def test_a_second_gradient_is_added_to_the_first_one() -> None:
    tape = tape_of(matrix("a", 10, 10), matrix("b", 10, 10))
    x = tape.linear(tape.new(10), "a")
    out = tape.add(tape.linear(x, "b"), tape.linear(x, "b"))
    del x
    tape.backward(out)
    assert sum(s.nbytes for s in tape.gradients.values()) == 2 * 400, "a weight that is used twice has one gradient"


def test_the_expectation_of_many_cases_is_quick() -> None:
    specs = [spec_of("llama-3.1-8b", "finetune", {"batch_size": n}, "lora", "bf16") for n in range(1, 26)]
    started = time.process_time()
    for spec in specs:
        expected_memory(spec)
    assert (time.process_time() - started) / len(specs) < 0.03


def test_values_that_share_a_storage_are_one() -> None:
    tape = tape_of(trains=False)
    x = tape.new(100)
    parts = tape.split(x, 50, 50)
    assert tape.total_bytes == 400
    del x, parts[0]
    assert tape.total_bytes == 400
    assert isinstance(parts[0], Value)
