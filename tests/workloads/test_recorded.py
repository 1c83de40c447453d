"""Routing recorded from a model is that model's own, and its record is made once."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from effbench_kernels import coactivation, greedy, in_order, refine, replicas, route
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from effbench.errors import ModelError, UnknownName
from effbench.models import training, weights
from effbench.models.context import architecture, stack
from effbench.models.text import BUILTIN, read_text
from effbench.modules.moe import Experts
from effbench.workloads import _recorded
from effbench.workloads._recorded import SOURCES, record, recorded, spec_of


def model_of(source: str, steps: int = 3) -> Any:
    """The source's model after a few steps of its training."""
    spec = spec_of(source)
    techniques, config = architecture(stack(spec)), weights.configuration(spec.model)
    for technique in techniques:
        technique.configure(config)
    config.dtype = "float32"
    torch.manual_seed(0)
    recipe = replace(training.RECIPE, steps=steps, warm_up_steps=1)
    return training._train(weights.fresh(spec, config, "cpu", techniques), read_text(BUILTIN), recipe)


@pytest.mark.parametrize("source", SOURCES)
def test_recorded_logits_give_the_experts_that_the_model_chose(source: str) -> None:
    model, text = model_of(source), read_text(BUILTIN)
    chosen: list[torch.Tensor] = []

    def keep(module: Any, inputs: tuple[Any, ...]) -> None:
        chosen.append(inputs[1].expert if isinstance(module, Experts) else inputs[1])

    layers = [module for module in model.modules() if isinstance(module, Experts | OlmoeExperts)]
    for layer in layers:
        layer.register_forward_pre_hook(keep)
    found = record(model, text, "train", num_tokens=2048, seed=3)
    router = _recorded._router(spec_of(source))
    assert len(found) == len(layers) == len(chosen) >= 2
    for logits, own in zip(found, chosen, strict=True):
        assert logits.shape == (2048, 64) and logits.dtype == torch.float32 and not logits.requires_grad
        routed = route(logits, k=router["top_k"], score=router["score"], renorm=router["renorm"]).expert
        assert routed.shape == own.shape == (2048, 8)
        assert torch.equal(routed.sort(1).values, own.sort(1).values)


def test_windows_are_of_the_part_and_the_seed() -> None:
    model, text = model_of("free", steps=1), read_text(BUILTIN)
    once, again, other, held_out = (
        record(model, text, part, num_tokens=300, seed=seed)[0]
        for part, seed in (("train", 1), ("train", 1), ("train", 2), ("validation", 1))
    )
    assert once.shape == (300, 64)
    assert torch.equal(once, again)
    assert not torch.equal(once, other) and not torch.equal(once, held_out)
    assert not any(module._forward_hooks for module in model.modules()), "nothing is left behind"


def test_what_cannot_be_recorded_is_refused() -> None:
    text = read_text(BUILTIN)
    with pytest.raises(UnknownName, match="Unknown recorded routing 'olmoe'"):
        recorded("olmoe")
    with pytest.raises(ModelError, match="at least one token, not 0"):
        record(torch.nn.Linear(2, 2), text, "train", num_tokens=0, seed=0)
    with pytest.raises(ModelError, match="Linear has no router"):
        record(torch.nn.Linear(2, 2), text, "train", num_tokens=5, seed=0)


def test_a_process_that_fails_is_told_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="warning\nthe disk is full\n")
    monkeypatch.setattr(_recorded.subprocess, "run", lambda *args, **more: failed)
    with pytest.raises(ModelError, match="could not be recorded from tiny-llama: the disk is full"):
        recorded()


@pytest.mark.long
def test_the_record_is_made_once_and_placements_gain_on_what_was_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path))
    first = recorded(calibration_tokens=4000, held_out_tokens=3000)
    monkeypatch.setattr(_recorded.subprocess, "run", None)
    again = recorded(calibration_tokens=4000, held_out_tokens=3000)
    assert [path.name.rpartition(".")[2] for path in (tmp_path / "recorded").iterdir()] == ["safetensors"]
    assert (first.top_k, first.score, first.renorm) == (8, "softmax", True)
    for one, other in zip((*first.calibration, *first.held_out), (*again.calibration, *again.held_out), strict=True):
        assert torch.equal(one, other)
    for calibration, held_out in zip(first.calibration, first.held_out, strict=True):
        assert calibration.shape == (4000, 64) and held_out.shape == (3000, 64)
        chosen = route(calibration, 8).expert
        paper = greedy(coactivation(chosen, 64), 4)
        ours = refine(paper, chosen, 4)
        of_order, of_paper, of_ours = (
            float(replicas(route(held_out, 8).expert, place, 4).double().mean()) for place in (in_order(64, 4), paper, ours)
        )
        print(f"C_T held out: in order {of_order:.3f}, greedy {of_paper:.3f}, refined {of_ours:.3f}")
        assert of_paper < 0.9 * of_order and of_ours < of_order
