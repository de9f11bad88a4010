"""What every registered family keeps to, and FLUX's own rules."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path

import pytest

import tetriserve.models
from tetriserve.config import PoolConfig
from tetriserve.core.stages import image_stages
from tetriserve.executor.processes import ProcessStarter
from tetriserve.launch import find_model
from tetriserve.models.family import Family, Guidance
from tetriserve.models.flux.facts import FLUX
from tetriserve.models.registry import FAMILIES, family_of, find_family

MODELS = Path(next(iter(tetriserve.models.__path__)))


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


def test_the_folder_of_a_family_has_its_facts_and_the_adapter_that_it_names(family: Family) -> None:
    module, _, name = family.adapter.partition(":")
    assert module == f"tetriserve.models.{family.name}.adapter"
    assert f"class {name}" in (MODELS / family.name / "adapter.py").read_text()
    assert (MODELS / family.name / "facts.py").is_file()


def test_every_folder_with_facts_is_in_the_list() -> None:
    assert {file.parent.name for file in MODELS.glob("*/facts.py")} == {family.name for family in FAMILIES}


def test_no_pipeline_class_is_served_by_two_families() -> None:
    counts = Counter(name for family in FAMILIES for name in family.pipeline_classes)
    assert max(counts.values()) == 1
    for family in FAMILIES:
        assert [find_family(name) for name in family.pipeline_classes] == [family] * len(family.pipeline_classes)


def test_the_facts_of_a_family_import_no_torch(family: Family) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy'}"
    code = f"import sys, tetriserve.models.{family.name}.facts; print({heavy} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_the_fork_server_loads_the_adapter_of_the_served_family_and_modules_that_exist(family: Family) -> None:
    ProcessStarter([dataclasses.replace(find_model(None), family=family.name)], PoolConfig())
    preloaded = forkserver._forkserver._preload_modules
    assert family.adapter.partition(":")[0] in preloaded
    assert [name for name in preloaded if find_spec(name) is None] == []  # it would start without them, in silence


def test_a_card_that_went_to_another_process_has_its_family_there() -> None:
    card = pickle.loads(pickle.dumps(find_model(None)))
    assert family_of(card) is FLUX


@pytest.mark.parametrize(
    ("guidance", "num_passes"),
    [
        (Guidance(3.5), 1),
        (Guidance(3.5, "rain", 1.0), 1),
        (Guidance(3.5, "", 1.5), 2),
        (Guidance(0.0, "rain", 4.0), 2),
        (Guidance(3.5, None, 4.0), 1),
    ],
)
def test_a_flux_step_has_a_second_pass_with_a_negative_prompt_and_a_scale_above_1(
    guidance: Guidance, num_passes: int
) -> None:
    assert FLUX.stages(find_model(None), 7, guidance) == image_stages(7, num_passes)


def test_a_degree_divides_the_heads() -> None:
    card = find_model(None)
    assert card.num_heads == 8
    assert card.valid_degrees((1, 2, 3, 4, 16)) == (1, 2, 4)
