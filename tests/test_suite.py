"""Suites: what is read, and that every fault names file, line, key, what was given and what would work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench.errors import SuiteError
from effbench.suite import read_suite

GOOD = """\
name: test
protocol: quick
cases:
  - workload: generate
    params: {batch_size: 2}
    model: [tiny-llama, tiny-qwen2]
    techniques:
      - mha
      - gqa: {groups: 2}
      - [mqa, bf16]
"""


@pytest.fixture
def written(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "suite.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def faults(path: Path) -> str:
    with pytest.raises(SuiteError) as caught:
        read_suite(path)
    return str(caught.value)


def test_a_suite_is_models_times_stacks(written):
    suite = read_suite(written(GOOD))
    stacks = [(model, [name for name, _ in stack]) for _, _, model, stack in suite.stacks()]
    assert stacks[:3] == [("tiny-llama", ["mha"]), ("tiny-llama", ["gqa"]), ("tiny-llama", ["mqa", "bf16"])]
    assert len(stacks) == 6


def test_the_suites_of_the_repository_are_sound():
    paths = sorted(Path("suites").rglob("*.yaml"))
    assert paths
    for path in paths:
        read_suite(path)


@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        (("workload: generate", "workload: genrate"), 4, ["cases[0].workload", "'genrate'", "Did you mean: generate?"]),
        (("- mha", "- mhaa"), 8, ["cases[0].techniques[0]", "'mhaa'", "Did you mean: mha"]),
        (("batch_size: 2", "batchsize: 2"), 5, ["batchsize", "Did you mean: batch_size?"]),
        (("batch_size: 2", "batch_size: 0"), 5, ["cases[0].params.batch_size", "given: 0", "greater than or equal to 1"]),
        (("batch_size: 2", "batch_size: two"), 5, ["cases[0].params.batch_size", "given: 'two'"]),
        (("{groups: 2}", "{group: 2}"), 9, ["'group'", "Did you mean: groups?"]),
        (("protocol: quick", "protocol: quik"), 2, ["protocol", "'quik'", "Did you mean: quick?"]),
        (("[mqa, bf16]", "[mqa, mha]"), 10, ["'mqa' and 'mha'", "attention", "one technique per axis"]),
        (("name: test", "nam: test"), 1, ["'nam'", "Did you mean: name?"]),
        (("name: test", "name: a b"), 1, ["name", "given: 'a b'"]),
        (("model: [", "modell: ["), 6, ["'modell'", "Did you mean: model?"]),
        (("cases:", "cases: []\nother:"), 3, ["cases"]),
    ],
)
def test_a_fault_names_file_line_key_what_was_given_and_what_would_work(written, change, line, says):
    path = written(GOOD.replace(*change))
    text = faults(path)
    assert any(part.startswith(f"{path}:{line}: ") for part in text.splitlines()), text
    for word in says:
        assert word in text


def test_all_faults_are_named_at_once(written):
    text = faults(written(GOOD.replace("- mha", "- mhaa").replace("bf16", "bf61")))
    assert len(text.splitlines()) == 2


def test_duplicate_keys_are_refused_with_their_line(written):
    assert ":3:" in faults(written("name: a\ncases: []\nname: b\n"))


def test_yaml_1_2_numbers_and_words_are_what_they_say(written):
    text = GOOD.replace("workload: generate", "workload: pretrain").replace("{batch_size: 2}", "{learning_rate: 1e-4}")
    suite = read_suite(written(text))
    assert suite.file.cases[0].params["learning_rate"] == 1e-4


def test_weights_from_a_folder_need_a_location(written):
    text = GOOD.replace("model: [tiny-llama, tiny-qwen2]", "model: mine\n    weights: path")
    assert "location" in faults(written(text))


def test_a_missing_suite_names_its_neighbours(tmp_path, written):
    written(GOOD)
    assert "Did you mean: suite.yaml?" in faults(tmp_path / "suit.yaml")


@pytest.mark.parametrize(
    "document",
    [b"", b"\xff\xfe", b"- a\n- b\n", b"name: [", b"name: !!python/object:os.system x\ncases: []", b"\0", b"a: &a [*a]",
     b"name: test\ncases: 3\n", b"{" * 5000, b"? [a]: b\n", b"name: 2020-13-45\ncases: [1]", b"<<: 3\nname: x"],
)  # fmt: skip
def test_a_malformed_document_is_one_explanation(written, document):
    text = faults(written(document))
    assert "Traceback" not in text
    assert re.match(r".*suite\.yaml|The suite", text)


def test_aliases_of_aliases_do_not_fill_the_memory(written):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert "at most" in faults(written("\n".join(lines)))


def test_an_enormous_suite_is_refused_before_it_is_parsed(written):
    assert "at most" in faults(written(b"#" * ((1 << 20) + 1)))


def read_or_explained(path: Path) -> None:
    """Anything but a suite or an explanation fails the test."""
    problems = ["read"]
    try:
        read_suite(path)
    except SuiteError as error:
        problems = list(error.problems)
    assert all(problems)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["mha", "quick"])
)
keys = st.sampled_from(["name", "cases", "workload", "model", "techniques", "params", "protocol", "seed", "baseline", "zzz"])
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=20
)


@settings(max_examples=150, deadline=None)
@given(document=documents)
def test_any_document_is_read_or_explained(tmp_path_factory, document):
    import json

    path = tmp_path_factory.mktemp("fuzz") / "suite.yaml"
    path.write_text(json.dumps(document))
    read_or_explained(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_good_suite_is_read_or_explained(tmp_path_factory, data):
    damaged_suite(tmp_path_factory, data)


@pytest.mark.long
@settings(max_examples=20_000, deadline=None)
@given(data=st.data())
def test_much_more_damage_to_a_good_suite_is_read_or_explained(tmp_path_factory, data):
    damaged_suite(tmp_path_factory, data)


def damaged_suite(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A good suite with a few bytes removed or put in is read, or explained."""
    text = bytearray(GOOD.encode())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path = tmp_path_factory.mktemp("fuzz") / "suite.yaml"
    path.write_bytes(bytes(text))
    read_or_explained(path)
