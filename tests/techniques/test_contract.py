"""Every registered technique on tiny models: what the contract in effbench/technique.py promises.

A new technique is tested here the day its entry point exists. A stack is the technique alone plus the precision of the
device; the workload is `generate` where it supports it, else `finetune`.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from effbench import registry
from effbench.models import builders
from effbench.models.storage import stored
from effbench.schema import Spec, TechniqueRef
from effbench.technique import AXES, Technique
from tests.factories import resolved

SHAPES = ("tiny-llama", "tiny-qwen2", "tiny-mistral")
TECHNIQUES = tuple(registry.entries("technique"))
PAIRS = [pytest.param(t, s, id=f"{t}-{s}") for t in TECHNIQUES for s in SHAPES]
# Largest difference between a cached decode and a full forward, over the standard deviation of the logits.
ROUNDS_ACTIVATIONS = ("int8", "fp8")  # a last bit of bf16 may round to another step of 8 bits
DECODE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


@cache
def spec_of(technique: str, shape: str, trains: bool) -> Spec:
    return resolved(shape, technique, workload="finetune" if trains else "generate")


@cache
def modes(technique: str, shape: str) -> tuple[bool, ...]:
    """The values of `trains` under which this pair can be built."""
    return tuple(trains for trains in (False, True) if builders.refusal(spec_of(technique, shape, trains)) is None)


def built(technique: str, shape: str, *, seed: int = 1, trains: bool | None = None) -> builders.Built:
    can = modes(technique, shape)
    if not can:
        pytest.skip(f"refused: {builders.refusal(spec_of(technique, shape, True))}")
    trains = can[0] if trains is None else trains
    found = builders.build(spec_of(technique, shape, trains), trains=trains, seed=seed, device="cpu")
    if trains:
        for part in found.techniques:
            part.trainable(found.model)
        builders.to_master_weights(found.model)
    return found


def wake(model: torch.nn.Module) -> None:
    """Give weights that start at zero (LoRA's B, biases) a value, so that they take part."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if type(p.data) is torch.Tensor and p.is_floating_point() and not bool(p.any()):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)


def some_bytes(num_rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (num_rows, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("technique", "shape"), PAIRS)
def test_technique_is_supported_or_says_why_not(technique: str, shape: str) -> None:
    for trains in (False, True):
        spec = spec_of(technique, shape, trains)
        own = next(t for t in builders.stack(spec) if t.name == technique)
        answer = own.supports(builders.context(spec))
        assert answer.ok or len(answer.reason) > 20, f"{technique}: a refusal without a usable reason: {answer.reason!r}"
        assert (builders.refusal(spec) is None) == answer.ok


@pytest.mark.parametrize(("technique", "shape"), PAIRS)
def test_forward_is_finite_and_of_the_right_shape(technique: str, shape: str) -> None:
    model = built(technique, shape).model.eval()
    ids_BT = some_bytes()
    with torch.inference_mode(), builders.mixed_precision(model):
        logits_BTV = model(input_ids=ids_BT).logits
    assert logits_BTV.shape == (*ids_BT.shape, model.config.vocab_size)
    assert bool(torch.isfinite(logits_BTV).all())


@pytest.mark.parametrize(("technique", "shape"), PAIRS)
def test_cached_decode_equals_full_forward(technique: str, shape: str) -> None:
    model = built(technique, shape).model.eval()
    wake(model)
    ids_BT, prompt = some_bytes(), 16
    with torch.inference_mode(), builders.mixed_precision(model):
        full_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
        out = model(input_ids=ids_BT[:, :prompt], use_cache=True)
        parts = [out.logits.float()]
        for position in range(prompt, ids_BT.shape[1]):
            step_B1 = ids_BT[:, position : position + 1]
            out = model(input_ids=step_B1, past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits.float())
    difference = float((torch.cat(parts, dim=1) - full_BTV).abs().max() / full_BTV.std())
    allowed = DECODE_TOLERANCE[builders.compute_dtype(model)] * (3 if technique in ROUNDS_ACTIVATIONS else 1)
    print(f"{technique} {shape}: {difference:.2e} of {allowed:.0e} allowed")
    assert difference <= allowed


@pytest.mark.parametrize(("technique", "shape"), PAIRS)
def test_training_gives_finite_gradients_and_lowers_the_loss(technique: str, shape: str) -> None:
    if True not in modes(technique, shape):
        pytest.skip(f"inference only: {builders.refusal(spec_of(technique, shape, True))}")
    model = built(technique, shape, trains=True).model.train()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert {p.dtype for _, p in trained} == {torch.float32}, "trained weights are kept in fp32"
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=1e-3)
    ids_BT, losses = some_bytes(4, 33), []
    for _ in range(4):
        with builders.mixed_precision(model):
            logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        bad = [name for name, p in trained if p.grad is None or not bool(torch.isfinite(p.grad).all())]
        assert not bad
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("technique", "shape"), PAIRS)
def test_same_seed_gives_the_same_weights_and_another_seed_others(technique: str, shape: str) -> None:
    one, same, other = (
        {
            f"{item.name}.{i}": t.detach().clone()
            for item in stored(built(technique, shape, seed=seed).model)
            for i, t in enumerate(item.tensors)
        }
        for seed in (1, 1, 2)
    )
    assert one.keys() == same.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("technique", "shape"), PAIRS)
def test_weights_and_bytes_are_counted(technique: str, shape: str) -> None:
    model = built(technique, shape).model
    facts = builders.model_facts(model)
    assert 0 < facts["params_active"] <= facts["params_total"]
    assert facts["weight_bytes"] >= facts["params_total"] // 4, "less than two bits a weight"
    assert builders.model_flops_per_token(model, context_len=64, training=True) > builders.model_flops_per_token(
        model, context_len=64, training=False
    )


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_baseline_is_of_the_same_axis_and_can_be_built_where_the_technique_can(technique: str) -> None:
    kind = registry.technique(technique)
    for shape in SHAPES:
        for trains in modes(technique, shape):
            spec = spec_of(technique, shape, trains)
            instance = next(t for t in builders.stack(spec) if t.name == technique)
            other = instance.baseline(spec)
            if instance.is_reference:
                assert other is None, "a reference has no baseline"
                continue
            if other is None:
                continue
            name, params = other
            assert name != technique
            assert registry.technique(name).axis == kind.axis
            filled = registry.technique(name).Params.model_validate(dict(params)).model_dump(mode="json")
            ref = TechniqueRef(name=name, axis=kind.axis, params=filled)
            rest = tuple(t for t in spec.techniques if t.axis != kind.axis)
            assert builders.refusal(replace(spec, techniques=(ref, *rest))) is None


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_following_baselines_ends_at_a_reference(technique: str) -> None:
    seen, name = [technique], technique
    while not registry.technique(name)().is_reference:
        spec = spec_of(name, "tiny-llama", True)
        other = next(t for t in builders.stack(spec) if t.name == name).baseline(spec)
        if other is None:
            break
        name = other[0]
        assert name not in seen, f"baselines go in a circle: {seen}"
        seen.append(name)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_cost_is_positive_where_it_is_given(technique: str) -> None:
    spec = spec_of(technique, "tiny-llama", False)
    own = next(t for t in builders.stack(spec) if t.name == technique)
    cost = own.cost(builders.context(spec))
    if cost is not None:
        assert cost.flops_per_token > 0
        assert cost.source


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_technique_is_documented(technique: str) -> None:
    kind = registry.technique(technique)
    module = sys.modules[kind.__module__]
    assert issubclass(kind, Technique)
    assert kind.name == technique
    assert kind.axis in AXES
    assert kind.summary
    assert not kind.summary.endswith(".")
    assert kind.paper.title
    assert module.__doc__, "a technique's file opens with its paper"
    assert all(word in module.__doc__ for word in ("Paper:", "Changes:", "Should improve:", "Costs:"))
    for name, field in kind.Params.model_fields.items():
        assert field.description, f"parameter {name} is not described"
    assert kind.Params(), "every parameter has a default"


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_technique_imports_no_other_technique(technique: str) -> None:
    module = sys.modules[registry.technique(technique).__module__]
    tree = ast.parse(inspect.getsource(module))
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert not [name for name in imported if name.startswith("effbench.techniques")]


def test_importing_every_technique_loads_no_torch() -> None:
    program = (
        "import sys; from effbench import registry\n"
        "for name in registry.entries('technique'): registry.technique(name)\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
