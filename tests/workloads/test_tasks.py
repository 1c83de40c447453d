"""Quality by lm-evaluation-harness: a checkpoint, a tokenizer and a task of our own, all local; the accuracy by hand as well."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from effbench import registry
from effbench.errors import MetricError, ModelError
from effbench.models import builders, checkpoints, text
from effbench.planning import techniques
from effbench.schema import ModelRef, Spec
from effbench.workload import BuildContext
from effbench.workloads import _tasks
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


CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
ROLLING = """output_type: loglikelihood_rolling
metric_list: [{metric: bits_per_byte}]"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of choice, the first with a tag; a group of both; a task that gives no accuracy."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in QUESTIONS]
    tasks = {
        "small_choice": (rows, CHOICE + "\ntag: small_tag"),
        "last_choice": (rows[-1:] * 2, CHOICE),
        "words": (rows, ROLLING),
    }
    for name, (content, kind) in tasks.items():
        (folder / f"{name}.jsonl").write_text("\n".join(content))
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\ntest_split: test"
        asked = 'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"'
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}\n{asked}\n{kind}\n")
    (folder / "small_group.yaml").write_text("group: small_group\ntask: [small_choice, last_choice]\n")
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
def by_hand(folder: Path) -> list[bool]:
    """Of which questions the right answer has the larger sum of log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    right = []
    for question, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            start, ids = len(tokenizer(question)["input_ids"]), tokenizer(question + choice, return_tensors="pt")["input_ids"]
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
        right.append(scores.index(max(scores)) == answer)
    return right


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))


@pytest.mark.filterwarnings("ignore")  # the harness and its libraries warn of their own future
@pytest.mark.usefixtures("offline")
def test_accuracy_is_the_one_computed_by_hand_of_a_task_a_tag_and_a_group(checkpoint: Path, task_folder: Path) -> None:
    asked = ("small_choice", "small_tag", "small_group")
    found = figures(spec_of(checkpoint, tasks=asked, task_folder=str(task_folder)))
    right = by_hand(checkpoint)
    share, all_of_group = sum(right) / 4, (sum(right) + 2 * right[-1]) / 6
    assert 0 < share < 1, "a task that every model solves or none would show nothing"
    assert share != all_of_group
    assert [found["tasks"][name]["accuracy"] for name in asked] == pytest.approx([share, share, all_of_group])
    assert [found["tasks"][name]["documents"] for name in asked] == [4, 4, 6]
    error = statistics.stdev(right) / 4**0.5
    assert [found["tasks"][name]["standard_error"] for name in asked] == pytest.approx([error, error, error * 4 / 6])
    assert found["task_accuracy"] == found["quality"] == pytest.approx((2 * share + all_of_group) / 3)
    assert found["figure"] == "task_accuracy of small_choice, small_tag, small_group on 14 documents"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("offline")
def test_tasks_come_before_held_out_text_and_see_the_weights_as_they_are_served(checkpoint: Path, task_folder: Path) -> None:
    spec = spec_of(
        checkpoint, "int8", tasks=("small_choice",), task_folder=str(task_folder), task_limit=2, validation_tokens=512
    )
    found = figures(spec)
    assert found["figure"] == "task_accuracy of small_choice on 2 documents"
    assert 0 < found["next_token_accuracy"] < 1
    zeroed: Any = registry.workload("generate")(spec.params).build(BuildContext(spec=spec, seed=1, clock=lambda: 0.0))
    with torch.no_grad():
        zeroed.model.get_output_embeddings().weight.zero_()
    zeroed.quality()
    assert zeroed.figures["task_accuracy"] == 0.5, "with equal scores the first choice wins, which is right once in two"
    assert zeroed.figures["bits_per_byte"] == pytest.approx(math.log2(272))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("offline")
def test_a_task_that_is_not_there_or_gives_no_accuracy_ends_the_launch_with_the_reason(
    checkpoint: Path, task_folder: Path
) -> None:
    with pytest.raises(ModelError, match=r"knows no task 'smal_choice'. Did you mean: small_choice"):
        figures(spec_of(checkpoint, tasks=("smal_choice",), task_folder=str(task_folder)))
    with pytest.raises(MetricError, match="the task words gives bits_per_byte and no accuracy"):
        figures(spec_of(checkpoint, tasks=("words",), task_folder=str(task_folder)))


def test_of_several_filters_the_first_counts_and_its_own_standard_error() -> None:
    results = {
        "exact_match,strict": 0.2,
        "exact_match_stderr,strict": 0.01,
        "exact_match,lax": 0.9,
        "exact_match_stderr,lax": 0.02,
    }
    assert _tasks._leaf("x", results) == ("exact_match", 0.2, 0.01)
    assert _tasks._leaf("x", {**results, "acc,none": 0.4, "acc_stderr,none": "N/A"}) == ("acc", 0.4, None)


@torch.inference_mode()
def test_held_out_text_goes_through_the_tokenizer_of_a_checkpoint_that_has_one(checkpoint: Path, tmp_path: Path) -> None:
    found = figures(spec_of(checkpoint, validation_tokens=512))
    model, tokenizer = LlamaForCausalLM.from_pretrained(checkpoint), PreTrainedTokenizerFast.from_pretrained(checkpoint)
    pieces = text.read_text("builtin").validation(num_tokens=512, batch_size=1, seq_len=128)
    ids_BT = torch.cat([tokenizer(bytes(p[0, :-1].tolist()).decode(), return_tensors="pt")["input_ids"] for p in pieces])
    logs_BTV, target_BT1 = model(input_ids=ids_BT).logits[:, :-1].log_softmax(-1), ids_BT[:, 1:, None]
    nats = -float(logs_BTV.gather(-1, target_BT1).mean())
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-5), "every token of this tokenizer is a byte"
    assert found["next_token_accuracy"] == pytest.approx(float((logs_BTV.argmax(-1) == target_BT1[..., 0]).float().mean()))
    assert found["figure"] == f"next_token_accuracy on {4 * 127} held-out tokens of its tokenizer"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    assert figures(spec_of(tmp_path, validation_tokens=512))["figure"] == "next_token_accuracy on 512 held-out bytes"


def test_other_tasks_or_another_tokenizer_are_another_case(checkpoint: Path, task_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    shutil.copytree(task_folder, tmp_path / "tasks")

    def identities() -> tuple[str, str]:
        checkpoints._folder_digest.cache_clear()
        given = registry.workload("generate").Params(tasks=("small_choice",), task_folder=str(tmp_path / "tasks"))
        model = ModelRef(name="mine", weights="path", location=str(tmp_path / "model"))
        return given.task_digest, checkpoints.content_digest(model)

    before = identities()
    assert before == identities()
    (tmp_path / "tasks" / "words.jsonl").write_text("{}")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert not set(before) & set(identities())
    planned = spec_of(tmp_path / "model", tasks=("small_choice",), task_folder=str(tmp_path / "tasks"))
    (tmp_path / "tasks" / "words.jsonl").write_text("[]")
    with pytest.raises(ValueError, match="have changed since this was planned"):
        registry.workload("generate")(planned.params)
    with pytest.raises(ValueError, match="there is no folder nowhere of task files"):
        registry.workload("generate").Params(task_folder="nowhere")


def test_what_cannot_be_asked_is_refused_in_a_sentence(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = builders.refusal(spec_of(checkpoint, weights="random", tasks=("arc_easy",)))
    assert random is not None and "no tokenizer" in random and "path or hub" in random
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    bare = builders.refusal(spec_of(tmp_path, tasks=("arc_easy",)))
    assert bare is not None and "holds none of tokenizer.json" in bare and "save_pretrained" in bare
    monkeypatch.setattr("effbench.workloads._tasks.find_spec", lambda name: None)
    absent = builders.refusal(spec_of(checkpoint, tasks=("arc_easy",)))
    assert absent is not None and "pip install 'effbench[eval]'" in absent


@pytest.mark.parametrize("there", [True, False])
def test_a_repository_is_asked_for_its_tokenizer_before_its_weights_are_fetched(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    for cached in (checkpoints._hub_config, checkpoints._hub_has_tokenizer):
        cached.cache_clear()
    asked = []

    def download(repository: str, file: str, revision: str | None) -> str:
        asked.append(file)
        if file != "config.json" and not there:
            raise errors.RemoteEntryNotFoundError.__new__(errors.RemoteEntryNotFoundError)  # as without an HTTP response
        return str(checkpoint / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    spec = replace(spec_of(checkpoint, tasks=("arc_easy",)), model=ModelRef(name="mine", weights="hub", location="owner/name"))
    answer = builders.refusal(spec)
    assert answer is None if there else answer is not None and "owner/name holds none of tokenizer.json" in answer
    assert asked == ["config.json", "tokenizer_config.json"]
