"""Quality by lm-evaluation-harness: a checkpoint, a tokenizer and a task of our own, all local; the accuracy by hand as well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from effbench import registry
from effbench.models import builders
from effbench.planning import techniques
from effbench.schema import ModelRef, Spec
from effbench.workload import BuildContext
from tests.factories import resolved

QUESTIONS = [("the sum of one and two is", [" three", " green"], 0), ("a word for a colour is", [" three", " green"], 1),
             ("one plus one is", [" two", " blue"], 0), ("the sky is", [" two", " blue"], 1)]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("checkpoint")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<end>": len(alphabet)}, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=128, initializer_range=0.2, bos_token_id=None, eos_token_id=256, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "small_choice.yaml").write_text(f"""
task: small_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    return folder


def spec_of(location: Path, *stack: str, weights: str = "path", **params: Any) -> Spec:
    given = {"batch_size": 2, "prompt_tokens": 16, "new_tokens": 4, "validation_tokens": 0, **params}
    spec = resolved("tiny-llama", workload="generate")
    model = ModelRef(name="mine", weights=weights, location=str(location), digest="x") if weights == "path" else spec.model  # type: ignore[arg-type]
    filled = registry.workload("generate").Params(**given).model_dump(mode="json")
    return replace(spec, model=model, params=filled, techniques=techniques(tuple((name, {}) for name in stack), "cpu"))


def figures(spec: Spec) -> dict[str, Any]:
    assert builders.refusal(spec) is None
    session: Any = registry.workload("generate")(spec.params).build(BuildContext(spec=spec, seed=1, clock=lambda: 0.0))
    session.step()
    session.quality()
    found: dict[str, Any] = session.facts()["quality"]
    return found


@torch.inference_mode()
def by_hand(folder: Path) -> float:
    """Share of questions whose right answer has the larger sum of log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    right = 0
    for question, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            start, ids = len(tokenizer(question)["input_ids"]), tokenizer(question + choice, return_tensors="pt")["input_ids"]
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
        right += scores.index(max(scores)) == answer
    return right / len(QUESTIONS)


@pytest.mark.filterwarnings("ignore")  # the harness and its libraries warn of their own future
def test_accuracy_is_the_one_computed_by_hand(
    checkpoint: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    found = figures(spec_of(checkpoint, tasks=("small_choice",), task_folder=str(task_folder)))
    assert found["task_accuracy"] == found["quality"] == by_hand(checkpoint)
    assert 0 < found["quality"] < 1, "a task that every model solves or none would show nothing"
    assert found["figure"] == "task_accuracy of small_choice"
    assert found["tasks"]["small_choice"]["documents"] == len(QUESTIONS)
    both = figures(spec_of(checkpoint, "int8", tasks=("small_choice",), task_folder=str(task_folder), validation_tokens=512))
    assert both["figure"] == "task_accuracy of small_choice", "tasks come before held-out text"
    assert both["bits_per_byte"] > 0


def test_what_cannot_be_asked_is_refused_in_a_sentence(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = builders.refusal(spec_of(checkpoint, weights="random", tasks=("arc_easy",)))
    assert random is not None and "no tokenizer" in random and "path or hub" in random
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    bare = builders.refusal(spec_of(tmp_path, tasks=("arc_easy",)))
    assert bare is not None and "holds none of tokenizer.json" in bare
    monkeypatch.setattr("effbench.workloads._tasks.find_spec", lambda name: None)
    absent = builders.refusal(spec_of(checkpoint, tasks=("arc_easy",)))
    assert absent is not None and "pip install 'effbench[eval]'" in absent
