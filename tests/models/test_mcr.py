"""The compression rate: measured bytes, quality for which higher is better, and nominal sizes apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from effbench import registry
from effbench.errors import MetricError
from effbench.layout import Kind
from effbench.metrics import METRICS, WEIGHT_KINDS, check_quality_figure, metric, quality_figure
from effbench.models import builders, text
from effbench.models.training import Recipe
from effbench.pairing import case_metrics
from effbench.planning import techniques
from effbench.schema import MetricValue
from effbench.workload import BuildContext
from effbench.workloads._training import held_out, with_quality
from tests.factories import resolved, spec, steady

ACCURACY = "next_token_accuracy on 100 held-out bytes"


def row(own: Mapping[str, Any], base: Mapping[str, Any], blocks: int = 2) -> dict[str, MetricValue]:
    pair = [
        [steady(spec(name), 0.1, block=b, **facts) for b in range(blocks)] for name, facts in (("nf4", own), ("bf16", base))
    ]
    return {m.name: m for m in case_metrics(*pair)}


def facts(weight_bytes: int, quality: float, bits: float | None = None, figure: str = ACCURACY) -> dict[str, Any]:
    return {"weight_bytes": weight_bytes, "quality": {"quality": quality, "figure": figure}, "nominal_bits": bits}


def test_it_is_the_paper_s_formula_from_measured_bytes_with_the_figure_named() -> None:
    found = row(facts(300, 0.45, 4), facts(1000, 0.5, 16))
    assert found["mcr"].value == pytest.approx(1000 / 300 * 0.45 / 0.5)
    assert found["mcr"].source == f"stored bytes and {ACCURACY}"
    assert found["mcr_nominal"].value == pytest.approx(4 * 0.45 / 0.5)
    assert METRICS["mcr_nominal"].better == "none", "what the paper printed is shown and never ranked"
    assert found["quality_change"].value == pytest.approx(-0.05), "in points"
    assert found["quality"].ratio == pytest.approx(0.9), "and as a share"


def test_fewer_real_bytes_raise_it_and_nominal_ones_do_not_matter() -> None:
    base = facts(1000, 0.5, 16)
    small, large = (row(facts(size, 0.5, 4), base) for size in (300, 600))
    assert small["mcr"].value == pytest.approx(2 * large["mcr"].value)  # type: ignore[operator]
    assert small["mcr_nominal"].value == large["mcr_nominal"].value
    unnamed = row(facts(300, 0.5), facts(1000, 0.5))
    assert unnamed["mcr"].value is not None
    assert unnamed["mcr_nominal"].reasons == ("no_nominal_bits",)


def test_a_figure_for_which_lower_is_better_is_an_error() -> None:
    for figure in ("perplexity on 100 bytes", "validation_loss on 100 bytes", "bits_per_byte on 100 bytes", "speed"):
        with pytest.raises(MetricError, match="cannot be a quality figure"):
            check_quality_figure(figure)
    assert with_quality({"perplexity": 3.0}, "on text") == {"perplexity": 3.0}, "it is kept as a figure, never as quality"
    stored = row(facts(300, 3.0, figure="perplexity on 100 bytes"), facts(1000, 3.0, figure="perplexity on 100 bytes"))
    assert stored["quality"].value is None
    assert stored["mcr"].reasons == ("quality_not_higher_is_better",)


def asked(**accuracies: float) -> dict[str, Any]:
    tasks = {name: {"figure": "acc", "accuracy": value, "documents": 50} for name, value in accuracies.items()}
    return {"weight_bytes": 1000, "quality": with_quality({"task_accuracy": 0.5, "tasks": tasks}, "of both on 100 documents")}


def test_change_is_absolute_and_relative_of_every_task_and_never_the_same_name() -> None:
    found = row(asked(easy=0.60, hard=0.05), asked(easy=0.63, hard=0.17))
    assert found["quality_change.easy"].value == pytest.approx(-0.03)
    assert found["task_accuracy.easy"].ratio == pytest.approx(0.60 / 0.63)
    assert found["quality_change.hard"].value == pytest.approx(-0.12)
    assert found["task_accuracy.hard"].ratio == pytest.approx(0.05 / 0.17)
    assert found["quality_change.hard"].source == "acc on 50 documents"
    assert metric("task_accuracy.hard").title == "Task accuracy, hard"
    assert metric("task_accuracy.hard").better == metric("quality_change.hard").better == "higher"


def test_the_interval_of_a_change_may_hold_zero_though_every_block_improved() -> None:
    sides = [
        [steady(spec(name), 0.1, block=b, **facts(1000, quality)) for b, quality in enumerate(qualities)]
        for name, qualities in (("nf4", (0.501, 0.52, 0.5005)), ("bf16", (0.5, 0.5, 0.5)))
    ]
    change = {m.name: m for m in case_metrics(*sides)}["quality_change"]
    assert change.value == pytest.approx((0.001 + 0.02 + 0.0005) / 3)
    assert change.lower < 0 < change.upper  # type: ignore[operator]
    assert change.reasons == ()


def test_every_kind_of_module_has_its_row_and_they_add_up() -> None:
    assert set(WEIGHT_KINDS) == set(get_args(Kind))
    model = builders.build(resolved("tiny-llama", "nf4"), trains=False, seed=1, device="cpu").model
    found = {r.name: r for r in steady(spec("nf4"), 0.1, **builders.model_facts(model)).metrics}
    parts = [found[f"weight_bytes_{kind}"].value for kind in WEIGHT_KINDS]
    assert sum(part or 0 for part in parts) == found["weight_bytes"].value == builders.weight_bytes(model)  # type: ignore[arg-type]
    assert found["weight_bytes_attention"].value > 0  # type: ignore[operator]
    assert found["weight_bytes_experts"].reasons == ("no_such_part",)
    assert 4 < found["bits_per_weight"].value < 16  # type: ignore[operator]


def test_fine_tuning_says_what_it_knew_before_and_what_it_forgot() -> None:
    plain = resolved("tiny-llama", "lora", workload="finetune")
    params = {
        **plain.params,
        "batch_size": 4,
        "seq_len": 64,
        "quality_steps": 8,
        "validation_tokens": 1024,
        "learning_rate": 5e-3,
    }
    chosen = replace(plain, params=params)
    figures = []
    for reads_base in (True, False):
        session: Any = registry.workload("finetune")(params).build(BuildContext(spec=chosen, seed=1, clock=lambda: 0.0))
        losses = dict.fromkeys(("adapt", "base"), 0.0)
        for domain in losses:
            found = held_out(session.model, session.source, domain, num_tokens=1024, batch_size=4, seq_len=64)
            losses[domain] = found["validation_loss"]
        session.model.train()
        if not reads_base:
            session._held_out = lambda domain: {"validation_loss": 1.0, "next_token_accuracy": 0.5, "validation_tokens": 1}
        session.quality()
        figures.append((session.figures, losses, session.losses))
    (found, before, steps), (_, _, undisturbed) = figures
    assert found["validation_loss_before"] == pytest.approx(before["adapt"])
    assert found["base_loss_before"] == pytest.approx(before["base"])
    assert found["validation_loss"] < found["validation_loss_before"]
    assert found["base_loss_after"] not in (before["base"], found["validation_loss"])
    assert steps == undisturbed, "looking at held-out text changes no step of training"


def test_the_best_figure_there_is_stands_for_quality() -> None:
    every = {"task_accuracy": 0.4, "next_token_accuracy": 0.5, "bits_per_byte": 2.0}
    assert quality_figure(every) == ("task_accuracy", 0.4)
    assert quality_figure({**every, "task_accuracy": None}) == ("next_token_accuracy", 0.5)
    assert quality_figure({"bits_per_byte": 2.0}) == ("2^-bits_per_byte", 0.25)
    assert quality_figure({"perplexity": 2.0}) is None


@pytest.fixture(scope="module")
def trained() -> Any:
    """A tiny model that has learned a little of the text, with its spec."""
    plain = resolved("tiny-llama", workload="generate")
    chosen = replace(
        plain, techniques=techniques((("fp32", {}),), "cpu"), text="builtin", text_digest=text.text_digest("builtin")
    )
    recipe = Recipe(steps=60)
    model = builders.build(chosen, trains=False, seed=1, device="cpu").model
    optimizer = torch.optim.AdamW(model.float().parameters(), lr=recipe.learning_rate)
    batches = text.text_of(chosen).batches("train", batch_size=4, seq_len=128, seed=0)
    for _ in range(recipe.steps):
        ids_BT = torch.from_numpy(next(batches))
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return chosen, model


def measured(chosen: Any, model: Any) -> dict[str, Any]:
    source = text.text_of(chosen)
    found = held_out(model, source, "base", num_tokens=4096, batch_size=8, seq_len=128)
    return {"weight_bytes": builders.weight_bytes(model), "quality": with_quality(found, "on 4096 held-out bytes")}


def test_noise_on_real_weights_lowers_it(trained: Any) -> None:
    chosen, model = trained
    base = measured(chosen, model)
    generator, rates = torch.Generator().manual_seed(0), []
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    for scale in (0.0, 0.5, 2.0):
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=generator) * plain[name].std() if p.dim() > 1 else torch.zeros(p.shape)
                p.copy_(plain[name] + scale * noise)
        rates.append(row(measured(chosen, model), base)["mcr"].value)
    assert rates[0] == 1.0
    assert rates[0] > 1.05 * rates[1] > 1.05**2 * rates[2]  # type: ignore[operator]
