"""Every registered technique on tiny models: the contract in effbench/plugins/contract.py, which plugins are held to as well.

A new technique is tested here the day its entry point exists.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from effbench import registry
from effbench.plugins.contract import CLAUSES, SHAPES, Clause, NotAsked

TECHNIQUES = tuple(registry.entries("technique"))
ON_MODELS = [
    pytest.param(clause, technique, shape, id=f"{clause.name}-{technique}-{shape}")
    for clause in CLAUSES
    if clause.on_models
    for technique in TECHNIQUES
    for shape in SHAPES
]
ON_TECHNIQUES = [
    pytest.param(clause, technique, id=f"{clause.name}-{technique}")
    for clause in CLAUSES
    if not clause.on_models
    for technique in TECHNIQUES
]


@pytest.mark.parametrize(("clause", "technique", "shape"), ON_MODELS)
def test_a_technique_keeps_its_promises_on_small_models(clause: Clause, technique: str, shape: str) -> None:
    try:
        clause.check(technique, shape)
    except NotAsked as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(("clause", "technique"), ON_TECHNIQUES)
def test_a_technique_keeps_its_promises_about_itself(clause: Clause, technique: str) -> None:
    clause.check(technique, "")


def test_importing_every_technique_loads_no_torch() -> None:
    program = (
        "from effbench import registry\n"
        "from effbench.plugins.contract import loads_light\n"
        "loads_light(registry.entries('technique'))\n"
        "import sys; heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
