"""Weight sources: trained once and kept, checkpoints by folder, the hub's errors in plain words."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from transformers import AutoModelForCausalLM

from effbench.errors import ModelError
from effbench.models import builders, checkpoints, training, weights
from effbench.models.text import read_text
from effbench.schema import ModelRef, Spec
from tests.factories import resolved

SHORT = training.Recipe(steps=6, warm_up_steps=2, seq_len=64, validation_tokens=512)
UNIGRAM_BITS = 4.5  # entropy of single bytes of the built-in text


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> training.Recipe:
    """The recipe of these tests; what stands on trained weights elsewhere uses the real one."""
    for function in (training.trained_digest, training.trained_folder, training.train_once, weights.prepare):
        monkeypatch.setattr(function, "__defaults__", (SHORT,))
    return SHORT


def trained(name: str, *stack: str, **changes: Any) -> Spec:
    return replace(resolved(name, *stack, weights="trained"), threads=1, **changes)


def checkpoint(folder: Path, name: str = "tiny-llama", *stack: str) -> Path:
    builders.build(resolved(name, *stack), trains=False, seed=5, device="cpu").model.save_pretrained(folder)
    return folder


def by_path(folder: Path, *stack: str) -> Spec:
    return resolved("mine", *stack, weights="path", location=str(folder))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(40)[None]).logits.float()  # type: ignore[no-any-return]


def test_trained_digest_follows_shape_architecture_recipe_and_text_and_nothing_else() -> None:
    plain = training.trained_digest(trained("tiny-llama"))
    assert training.trained_digest(trained("tiny-llama", "mha")) == plain, "the shape has one key/value head per query head"
    assert training.trained_digest(trained("tiny-llama", "bf16", seed=9, device="cuda")) == plain
    others = {
        training.trained_digest(trained("tiny-llama", "mqa")),
        training.trained_digest(trained("tiny-llama", "gqa")),
        training.trained_digest(trained("tiny-qwen2")),
        training.trained_digest(trained("tiny-llama", text_digest="1" * 64)),
        training.trained_digest(trained("tiny-llama"), SHORT),
    }
    assert len(others | {plain}) == 6


def test_trained_digest_needs_no_torch() -> None:
    program = (
        "import sys; from tests.factories import resolved; from effbench.models import weights\n"
        "weights.weights_digest(resolved('tiny-llama', 'gqa', weights='trained'))\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_large_shapes_are_not_trained_here() -> None:
    with pytest.raises(ModelError, match=r"494,032,768 parameters; weights are trained here up to 20,000,000.*path or hub"):
        trained("qwen2.5-0.5b")


def test_digest_of_random_weights_is_that_of_the_shape() -> None:
    assert weights.weights_digest(resolved("tiny-llama", "mqa")) == weights.weights_digest(resolved("tiny-llama"))


def test_trained_weights_are_made_once_and_loaded_by_every_build(short: training.Recipe, own_cache: Path) -> None:
    spec = trained("tiny-llama")
    with pytest.raises(ModelError, match="not trained yet"):
        builders.build(spec, trains=False, seed=1, device="cpu")
    weights.prepare(spec)
    folder = training.trained_folder(spec)
    assert folder.parent == own_cache / "trained"
    born = (folder / "model.safetensors").stat().st_mtime_ns
    weights.prepare(spec)
    assert (folder / "model.safetensors").stat().st_mtime_ns == born
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
    one, two = (builders.build(spec, trains=False, seed=seed, device="cpu").model for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)), "the seed plays no part"
    record = json.loads((folder / "recipe.json").read_text())
    assert record["recipe"]["steps"] == short.steps
    assert 0 < record["bits_per_byte"] < 9


@pytest.mark.parametrize("stack", [("mqa", "bf16"), ("gqa",)])
def test_trained_weights_of_tied_and_grouped_shapes_load_in_the_asked_dtype(
    short: training.Recipe, stack: tuple[str, ...]
) -> None:
    spec = trained("tiny-qwen2", *stack)
    weights.prepare(spec)
    model = builders.build(spec, trains=False, seed=1, device="cpu").model
    fresh = builders.build(resolved("tiny-qwen2", *stack), trains=False, seed=short.seed, device="cpu").model
    assert model.dtype == (torch.bfloat16 if "bf16" in stack else torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, fresh.lm_head.weight)


def test_training_is_the_same_twice(short: training.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for place in ("one", "two"):
        monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / place))
        spec = trained("tiny-mistral")
        weights.prepare(spec)
        found.append(builders.build(spec, trains=False, seed=1, device="cpu").model.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_two_that_want_the_same_weights_train_once(short: training.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, count = trained("tiny-llama"), []
    train_into = training._train_into
    monkeypatch.setattr(training, "_train_into", lambda *args: (count.append(1), train_into(*args)))
    threads = [threading.Thread(target=weights.prepare, args=(spec,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1


def test_failed_training_leaves_nothing_half(short: training.Recipe, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_model", fail)
    spec = trained("tiny-llama")
    with pytest.raises(ModelError, match=r"No space left on device\. Set EFFBENCH_CACHE"):
        weights.prepare(spec)
    assert [p.suffix for p in (own_cache / "trained").iterdir()] == [".lock"]


def test_left_overs_of_a_killed_training_are_removed(short: training.Recipe, own_cache: Path) -> None:
    spec = trained("tiny-llama")
    left_over = own_cache / "trained" / f"training-{training.trained_digest(spec)}-killed"
    left_over.mkdir(parents=True)
    weights.prepare(spec)
    assert not left_over.exists()


def test_recipe_learns_clearly_more_than_letter_frequencies(own_cache: Path) -> None:
    """A quarter of the real recipe already beats a unigram model by half a bit."""
    quarter = replace(training.RECIPE, steps=training.RECIPE.steps // 4)
    spec = trained("tiny-llama")
    weights.prepare(spec, quarter)
    record = json.loads((training.trained_folder(spec, quarter) / "recipe.json").read_text())
    print(f"{record['bits_per_byte']:.3f} bits per byte after {quarter.steps} steps in {record['seconds']:.1f} s")
    assert record["bits_per_byte"] < UNIGRAM_BITS - 0.5


def test_rate_warms_up_and_decays() -> None:
    recipe = training.Recipe(steps=100, warm_up_steps=10, learning_rate=1.0, final_share=0.1)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9]
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[9:]))


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-mistral"])
def test_checkpoint_folder_is_loaded_as_it_was_saved(tmp_path: Path, name: str) -> None:
    saved = builders.build(resolved(name), trains=False, seed=5, device="cpu").model
    spec = by_path(checkpoint(tmp_path / "mine", name))
    model = builders.build(spec, trains=False, seed=1, device="cpu").model
    torch.testing.assert_close(logits(model), logits(saved), rtol=0, atol=0)
    assert builders.params_total(model) == builders.params_total(saved)
    half = builders.build(by_path(tmp_path / "mine", "bf16"), trains=False, seed=1, device="cpu").model
    assert half.dtype == torch.bfloat16


def test_checkpoint_with_other_heads_computes_the_same_function_where_heads_are_repeated(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "mine", "tiny-qwen2")  # 2 key/value heads
    native = builders.build(by_path(folder), trains=False, seed=1, device="cpu").model
    mha = builders.build(by_path(folder, "mha"), trains=False, seed=1, device="cpu").model
    mqa = builders.build(by_path(folder, "mqa"), trains=False, seed=1, device="cpu").model
    assert mha.config.num_key_value_heads == 8
    torch.testing.assert_close(logits(mha), logits(native), rtol=1e-5, atol=1e-5)
    assert mqa.config.num_key_value_heads == 1
    assert not torch.allclose(logits(mqa), logits(native), atol=1e-3), "pooling is an approximation"


@pytest.mark.parametrize("technique", ["mla", "nsa"])
def test_attention_that_cannot_be_converted_starts_anew_and_says_so(tmp_path: Path, technique: str) -> None:
    folder = checkpoint(tmp_path / "mine", "tiny-qwen2")
    native = builders.build(by_path(folder), trains=False, seed=1, device="cpu").model.state_dict()
    spec = by_path(folder, technique)
    state = builders.build(spec, trains=False, seed=1, device="cpu").model.state_dict()
    kept = [name for name in state if "self_attn" not in name]
    assert len(kept) > 10
    assert all(torch.equal(state[name], native[name]) for name in kept)
    assert builders.new_weights(spec) == "attention"
    assert builders.new_weights(by_path(folder, "gqa")) == ""
    assert builders.new_weights(resolved("tiny-qwen2", technique)) == "", "random weights are all new, which is no news"


def test_sharded_checkpoint_is_loaded(tmp_path: Path) -> None:
    saved = builders.build(resolved("tiny-llama"), trains=False, seed=5, device="cpu").model
    saved.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = builders.build(by_path(tmp_path), trains=False, seed=1, device="cpu").model
    torch.testing.assert_close(logits(model), logits(saved), rtol=0, atol=0)


def test_trained_folder_is_itself_a_checkpoint(short: training.Recipe) -> None:
    spec = trained("tiny-qwen2")
    weights.prepare(spec)
    ours = builders.build(spec, trains=False, seed=1, device="cpu").model
    theirs = AutoModelForCausalLM.from_pretrained(training.trained_folder(spec))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=0)


def test_digest_of_a_checkpoint_is_of_its_content(tmp_path: Path) -> None:
    one, same = (by_path(checkpoint(tmp_path / place)).model.digest for place in ("one", "two"))
    other = by_path(checkpoint(tmp_path / "three", "tiny-llama", "mqa")).model.digest
    assert one == same != other


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no checkpoint folder .*nowhere"):
        by_path(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        by_path(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        by_path(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"junk")
    spec = by_path(tmp_path / "empty")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        builders.refusal(spec)
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no model_type"):
        builders.refusal(spec)
    with pytest.raises(ModelError, match="need a location"):
        checkpoints.config_values(ModelRef(name="mine", weights="path"))


def test_damaged_checkpoint_is_explained(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "mine")
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match=r"The checkpoint .*mine cannot be loaded"):
        builders.build(by_path(folder), trains=False, seed=1, device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", 64, "holds model.embed_tokens.weight of 256 × 128 and its config.json asks for 256 × 64"),
        ("num_hidden_layers", 3, "holds 2 decoder layers and its config.json says 3"),
        ("intermediate_size", 300, "mlp.gate_proj.weight of 512 × 128 and its config.json asks for 300 × 128"),
        ("num_key_value_heads", 2, "self_attn.k_proj.weight of 128 × 128 and its config.json asks for 32 × 128"),
    ],
)
def test_a_checkpoint_of_another_shape_than_it_says_is_refused_at_plan(
    tmp_path: Path, key: str, value: int, words: str
) -> None:
    spec = by_path(checkpoint(tmp_path))
    assert builders.refusal(spec) is None
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    reason = builders.refusal(spec)
    assert reason is not None
    assert words in reason
    assert "\n" not in reason


def test_vocabulary_without_all_bytes_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "mine")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vocab_size": 100}))
    assert "vocabulary of 100 holds no bytes" in str(builders.refusal(by_path(folder)))


def hub(monkeypatch: pytest.MonkeyPatch, answer: Exception | Path, location: str = "owner/name@v1") -> ModelRef:
    """A model of a hub that answers with an error or with a snapshot."""
    checkpoints._hub_config.cache_clear()
    checkpoints._snapshot.cache_clear()
    calls: list[tuple[Any, ...]] = []

    def download(repository: str, *file: str, revision: str | None, **_: Any) -> str:
        calls.append((repository, revision))
        assert (repository, revision) == ("owner/name", "v1")
        if isinstance(answer, Exception):
            raise answer
        return str(answer / file[0]) if file else str(answer)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return ModelRef(name="mine", weights="hub", location=location)


def of_kind(kind: type[Exception]) -> Exception:
    """An error of the hub library without the HTTP response that it is usually made from."""
    error = kind.__new__(kind)
    error.args = ("said the hub",)
    return error


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (errors.GatedRepoError, "is gated. Accept its licence"),
        (errors.RepositoryNotFoundError, "was not found, or is private"),
        (errors.RevisionNotFoundError, "has no such revision"),
        (errors.RemoteEntryNotFoundError, "lacks a file that a model needs"),
        (errors.LocalEntryNotFoundError, "is not in the local cache and the hub cannot be reached. Download it"),
        (errors.OfflineModeIsEnabled, "is not in the local cache and the hub"),
        (errors.HFValidationError, "is no repository name. Write OWNER/NAME"),
        (RuntimeError, "cannot be had: said the hub"),
    ],
)
def test_hub_errors_say_what_would_work(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], sentence: str) -> None:
    model = hub(monkeypatch, of_kind(kind))
    for ask in (checkpoints.config_values, checkpoints.folder, checkpoints.content_digest):
        with pytest.raises(ModelError) as caught:
            ask(model)
        assert str(caught.value).startswith(f"The repository 'owner/name@v1' {sentence}")


def test_hub_snapshot_is_loaded_like_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = checkpoint(tmp_path / "snapshots" / "c0ffee")
    model = hub(monkeypatch, snapshot)
    spec = replace(resolved("tiny-llama"), model=model)
    assert checkpoints.content_digest(model) == checkpoints.content_digest(replace(model, name="other name"))
    weights.prepare(spec)
    loaded = builders.build(spec, trains=False, seed=1, device="cpu").model
    local = builders.build(by_path(snapshot), trains=False, seed=1, device="cpu").model
    torch.testing.assert_close(logits(loaded), logits(local), rtol=0, atol=0)


def test_offline_hub_is_explained_by_the_real_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = (
        "from effbench.errors import ModelError; from effbench.models import checkpoints; from effbench.schema import ModelRef\n"
        "try: checkpoints.config_values(ModelRef(name='x', weights='hub', location='Qwen/Qwen2.5-0.5B'))\n"
        "except ModelError as error: print(error)"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "the hub cannot be reached. Download it where there is a network" in done.stdout, done.stderr


def test_validation_text_is_not_what_weights_are_trained_on() -> None:
    """What `bits_per_byte` stands on: the validation part of the same domain, never the training part."""
    found = read_text("builtin")
    assert found.split("train").tobytes() != found.split("validation").tobytes()
