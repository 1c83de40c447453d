"""Text: the same bytes everywhere, parts that never meet, batches that repeat, and refusals that say what to do."""

from __future__ import annotations

import subprocess
import sys
import types
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effbench.errors import MissingExtra, ModelError
from effbench.models import text
from effbench.models.text import read_text, text_digest, text_of
from tests.factories import spec

DOMAINS: tuple[text.Domain, ...] = ("base", "adapt")


def test_builtin_text_is_the_same_bytes_everywhere() -> None:
    """Sizes follow from the listed digests, so another count means another text: change them only with the listing."""
    found = read_text("builtin")
    sizes = {f"{part} {domain}": len(data) for (part, domain), data in found.parts.items()}
    assert sizes == {
        "train base": 3705113,
        "train adapt": 1734614,
        "validation base": 624196,
        "validation adapt": 360954,
    }
    assert found.digest == "240aa452dfd6267826c8ebf44e18f4ebab1134674181aaa2be54eed28ee41a4d"
    assert all(data.dtype == np.uint8 and not data.flags.writeable for data in found.parts.values())


def test_digest_of_the_builtin_text_needs_no_reading() -> None:
    assert text_digest("builtin") == read_text("builtin").digest


def test_parts_and_domains_share_no_file() -> None:
    listing = text._listing()
    assert len({path for _, _, path in listing}) == len(listing)
    assert len({sha256 for sha256, _, _ in listing}) == len(listing)
    families = {domain: {path.partition("/")[0] for _, d, path in listing if d == domain} for domain in DOMAINS}
    assert families["base"] == set(text.FAMILIES["base"])
    assert families["adapt"] == set(text.FAMILIES["adapt"])
    assert not families["base"] & families["adapt"]


def test_no_window_of_the_validation_part_is_in_the_training_part() -> None:
    found = read_text("builtin")
    for domain in DOMAINS:
        train = found.split("train", domain).tobytes()
        windows = islice(found.validation(batch_size=1, seq_len=200, num_tokens=20_000, domain=domain), 100)
        copied = sum(window.astype(np.uint8).tobytes() in train for window in windows)
        assert copied <= 2, "licences and headers may repeat, code must not"


def test_text_is_source_code_in_ascii_mostly() -> None:
    data = read_text("builtin").split("train")
    assert np.mean(data < 128) > 0.99
    assert b"def " in data[:100_000].tobytes()


def test_batches_repeat_for_a_seed_and_differ_for_another() -> None:
    found = read_text("builtin")
    one, same, other = (list(islice(found.batches("train", batch_size=4, seq_len=64, seed=seed), 3)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[0], one[1])
    assert one[0].shape == (4, 65)
    assert one[0].dtype == np.int64
    assert 0 <= one[0].min() <= one[0].max() <= 255


def test_sampler_has_not_changed() -> None:
    """A changed sampler changes every quality figure; results taken before and after must not be compared."""
    batch = next(read_text("builtin").batches("train", batch_size=2, seq_len=16, seed=1))
    assert bytes(batch[0].astype(np.uint8)) == b"eal is True:\n    "


def test_validation_windows_are_fixed_spread_and_hold_no_target_twice() -> None:
    found = read_text("builtin")
    one = np.concatenate(list(found.validation(batch_size=3, seq_len=100, num_tokens=1050)))
    again = np.concatenate(list(found.validation(batch_size=8, seq_len=100, num_tokens=1050)))
    assert one.shape == (10, 101)
    assert np.array_equal(one, again), "the batch size must not change what is asked"
    data = found.split("validation")
    starts = [data.tobytes().index(window.astype(np.uint8).tobytes()) for window in one]
    assert starts == sorted(starts)
    assert min(np.diff(starts)) >= 100
    assert starts[-1] > len(data) * 0.8


def test_whole_validation_part_is_used_when_the_budget_allows() -> None:
    found = read_text("builtin")
    windows = sum(len(batch) for batch in found.validation(batch_size=64, seq_len=512, num_tokens=10**9))
    assert windows == (len(found.split("validation")) - 1) // 512


def test_missing_and_changed_files_name_the_version_and_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_sympy_folder", lambda: tmp_path)
    line = r"found version: 1\.14\.0.*pip install --force-reinstall --no-deps sympy==1\.14\.0"
    with pytest.raises(ModelError, match=rf"accumulationbounds.py is missing.*{line}"):
        text._builtin.__wrapped__()
    (tmp_path / "calculus").mkdir()
    (tmp_path / "calculus" / "accumulationbounds.py").write_text("x = 1\n")
    with pytest.raises(ModelError, match=rf"accumulationbounds.py is another one.*{line}"):
        text._builtin.__wrapped__()


def test_absent_sympy_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="not installed"):
        text._sympy_folder()


def test_any_file_is_a_text(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(bytes(range(256)) * 40)
    found = read_text(str(file))
    assert len(found.split("train")) == 9216
    assert len(found.split("validation")) == 1024
    assert np.array_equal(found.split("train", "adapt"), found.split("train", "base"))
    assert found.digest == text_digest(str(file))


def test_folder_is_a_text_identified_by_content_and_not_by_place(tmp_path: Path) -> None:
    digests = []
    for place in ("one", "two"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "a.txt").write_bytes(b"a" * 100)
        (tmp_path / place / "sub" / "b.txt").write_bytes(b"b" * 50)
        digests.append(text_digest(str(tmp_path / place)))
    assert digests[0] == digests[1]
    found = read_text(str(tmp_path / "one"))
    assert found.split("train").tobytes() == b"a" * 90 + b"b" * 45
    assert found.split("validation").tobytes() == b"a" * 10 + b"b" * 5
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "a.txt").write_bytes(b"A" * 100)
    assert text_digest(str(tmp_path / "three")) not in digests


@pytest.mark.parametrize("content", [b"", b"short"])
def test_too_short_a_text_is_refused_when_windows_are_asked(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "short.txt"
    file.write_bytes(content)
    with pytest.raises(ModelError, match="too few for windows of 65"):
        next(read_text(str(file)).batches("train", batch_size=1, seq_len=64, seed=1))


def test_missing_path_says_what_a_text_can_be(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"There is no text at .*nowhere.*hub:DATASET"):
        read_text(str(tmp_path / "nowhere"))


def test_text_that_changed_since_the_plan_is_refused() -> None:
    planned = spec(text="builtin", text_digest=text_digest("builtin"))
    assert text_of(planned).source == "builtin"
    with pytest.raises(ModelError, match="has changed since this was planned"):
        text_of(spec(text="builtin", text_digest="0" * 64))


def test_data_set_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'effbench\[eval\]'"):
        read_text("hub:someone/without-library")


def stub_datasets(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, configuration: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        calls.append((name, configuration, split, revision, streaming))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    text._hub.cache_clear()
    return calls


def test_data_set_is_read_by_name_configuration_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub_datasets(monkeypatch, [{"text": "x" * 60}, {"text": "y" * 39}])
    found = read_text("hub:owner/name:english@abc")
    assert calls == [("owner/name", "english", "train", "abc", True)]
    assert found.split("train").tobytes() == b"x" * 60 + b"\n" + b"y" * 29
    assert found.split("validation").tobytes() == b"y" * 10


def test_data_set_faults_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_datasets(monkeypatch, [{"content": "x"}])
    with pytest.raises(ModelError, match="no column named text"):
        read_text("hub:owner/no-text")
    stub_datasets(monkeypatch, ConnectionError("no route to host"))
    with pytest.raises(ModelError, match=r"no route to host.*network"):
        read_text("hub:owner/offline")


def test_loading_is_cheap_and_needs_no_torch() -> None:
    """Under 0.2 s on an idle machine; the test allows a loaded one ten times as long."""
    program = (
        "import sys, time; from effbench.models.text import read_text\n"
        "t = time.perf_counter(); read_text('builtin'); s = time.perf_counter() - t\n"
        "assert not {'torch', 'sympy'} & set(sys.modules); assert s < 2, s"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
