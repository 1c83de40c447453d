"""Own processes, foreign ones and those nobody can tell apart, from a process table made for the purpose."""

from __future__ import annotations

from pathlib import Path

from effbench.errors import ProbeError
from effbench.probes.gpu.processes import FIRST_NAMESPACE, GpuProcess, ProcessWatch

LAUNCH, CHILD, GRANDCHILD, OTHER = 100, 101, 102, 500


def table(folder: Path, *, first_namespace: bool, outer: int = 0) -> Path:
    """A /proc with our launch, its child and grandchild, and one other process. `outer`: added to numbers further out."""
    for pid, parent in ((1, 0), (LAUNCH, 1), (CHILD, LAUNCH), (GRANDCHILD, CHILD), (OTHER, 1)):
        (folder / str(pid)).mkdir(parents=True)
        numbers = f"{pid}\t{pid + outer}" if outer else str(pid)
        (folder / str(pid) / "status").write_text(f"Name:\tpython\nPPid:\t{parent}\nNSpid:\t{numbers}\n")
    (folder / "self" / "ns").mkdir(parents=True)
    (folder / "self" / "ns" / "pid").symlink_to(FIRST_NAMESPACE if first_namespace else "pid:[4026539999]")
    return folder


def watch(proc: Path, *looks: list[GpuProcess]) -> tuple[ProcessWatch, list[float | str]]:
    """A watch that has looked as often as there are lists, and what each look gave."""
    remaining = iter(looks)
    watching, found = ProcessWatch(LAUNCH, lambda: next(remaining), proc), []
    for _ in looks:
        try:
            found.append(watching.own_bytes())
        except ProbeError as error:
            found.append(error.reason)
    return watching, found


def test_our_whole_tree_is_ours(tmp_path: Path) -> None:
    watching, found = watch(table(tmp_path, first_namespace=True), [(LAUNCH, 10), (GRANDCHILD, 5)], [(CHILD, 7)], [])
    assert found == [15.0, 7.0, 0.0]
    assert watching.reasons() == []


def test_another_process_is_foreign_even_if_it_came_and_went(tmp_path: Path) -> None:
    watching, found = watch(table(tmp_path, first_namespace=True), [(LAUNCH, 10)], [(LAUNCH, 10), (OTHER, 3)], [(LAUNCH, 10)])
    assert found == [10.0, 10.0, 10.0]
    assert watching.reasons() == ["foreign_process"]
    assert watching.others == {OTHER}


def test_in_a_container_numbers_of_the_host_cannot_be_told_apart(tmp_path: Path) -> None:
    watching, found = watch(table(tmp_path, first_namespace=False), [(91234, 10)], [])
    assert found == ["foreign_process_undecidable"] * 2
    assert watching.reasons() == ["foreign_process_undecidable"]


def test_in_a_container_that_speaks_our_numbers_a_foreign_process_is_known(tmp_path: Path) -> None:
    proc = table(tmp_path, first_namespace=False)
    assert watch(proc, [(LAUNCH, 10)])[0].reasons() == []
    assert watch(proc, [(LAUNCH, 10), (91234, 10)])[0].reasons() == ["foreign_process"]


def test_our_own_number_in_an_inner_namespace_is_recognised(tmp_path: Path) -> None:
    watching, found = watch(table(tmp_path, first_namespace=False, outer=7000), [(LAUNCH + 7000, 10)])
    assert found == [10.0]
    assert watching.reasons() == []


def test_without_a_process_table_nothing_can_be_told(tmp_path: Path) -> None:
    assert watch(tmp_path, [(91234, 10)])[0].reasons() == ["foreign_process_undecidable"]
    assert watch(tmp_path)[0].reasons() == ["foreign_process_undecidable"]


def test_a_driver_that_hides_sizes_still_tells_whose_processes_there_are(tmp_path: Path) -> None:
    watching, found = watch(table(tmp_path, first_namespace=True), [(LAUNCH, None), (OTHER, None)])
    assert found == ["not_supported"]
    assert watching.reasons() == ["foreign_process"]
