"""prefect.yaml: every deployment loads, takes its parameters, says what it is, and holds no number
that could change a result. No server is started."""

from __future__ import annotations

import zoneinfo
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prefect.exceptions import ParameterTypeError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.schedules import Cron

from artifacts.errors import ConfigError
from artifacts.specs import Config
from flows.settings import load_config, shipped

DECLARED = yaml.safe_load((Path(__file__).parent.parent / "prefect.yaml").read_text())
DEPLOYMENTS = {f"{d['entrypoint'].split('.')[-1]}/{d['name']}": d for d in DECLARED["deployments"]}
NUMBERS = {"concurrency_limit"}  # keys that may hold one
each = pytest.mark.parametrize("name", DEPLOYMENTS)


def flow_of(name: str) -> Flow[Any, Any]:
    return load_flow_from_entrypoint(DEPLOYMENTS[name]["entrypoint"])


def parameter_sets(name: str) -> Iterator[dict[str, Any]]:
    """What the deployment runs with, and what each of its schedules runs with."""
    deployment = DEPLOYMENTS[name]
    own = deployment.get("parameters", {})
    yield own
    for schedule in deployment.get("schedules", []):
        yield own | schedule.get("parameters", {})


def numbers(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a tree of values holds a number."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from numbers(value, (*path, str(key)))
    elif isinstance(tree, list):
        for value in tree:
            yield from numbers(value, path)
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield path


def test_the_deployments_are_these() -> None:
    assert set(DEPLOYMENTS) == {
        "benchmark/organism",
        "benchmark/adhoc",
        "study/ten-models",
        "rebenchmark/weekly",
        "heads/organism",
        "norms/organism",
        "activity/organism",
        "divergence/organism",
    }


@each
def test_the_entry_point_is_the_flow_of_that_name(name: str) -> None:
    assert flow_of(name).name == name.split("/")[0]


@each
def test_every_parameter_set_is_valid(name: str) -> None:
    for parameters in parameter_sets(name):
        assert set(flow_of(name).validate_parameters(parameters)) >= set(parameters)


@each
def test_an_unknown_parameter_is_not(name: str) -> None:
    with pytest.raises(Exception, match="trails"):
        flow_of(name).validate_parameters({"trails": 9})


@each
def test_what_it_is_for_is_said(name: str) -> None:
    assert len(DEPLOYMENTS[name]["description"]) > 20
    assert DEPLOYMENTS[name]["tags"]
    assert DEPLOYMENTS[name]["work_pool"] == {"name": "tribunal"}


@each
def test_schedules_exist_in_their_time_zone(name: str) -> None:
    for schedule in DEPLOYMENTS[name].get("schedules", []):
        assert schedule["timezone"] in zoneinfo.available_timezones()
        assert Cron(schedule["cron"], timezone=schedule["timezone"]).cron == schedule["cron"]
        assert schedule["slug"]


def test_the_weekly_run_is_scheduled_and_never_beside_itself() -> None:
    weekly = DEPLOYMENTS["rebenchmark/weekly"]
    assert weekly["concurrency_limit"] == 1
    assert [s["active"] for s in weekly["schedules"]] == [True]


def test_no_number_can_reach_a_result() -> None:
    found = set(numbers(DECLARED["deployments"]))
    assert {path[-1] for path in found} <= NUMBERS
    for deployment in DEPLOYMENTS.values():
        assert not any("=" in text for text in deployment["parameters"].get("overrides") or [])


def test_names_in_parameters_are_shipped() -> None:
    for deployment in DEPLOYMENTS.values():
        if "config" in deployment["parameters"]:
            assert deployment["parameters"]["config"] in shipped("configs")
        if "plan" in deployment["parameters"]:
            assert deployment["parameters"]["plan"] in shipped("studies")


# The form that Prefect's UI makes of `benchmark/adhoc`


def form() -> dict[str, Any]:
    schema: dict[str, Any] = flow_of("benchmark/adhoc").parameters.model_dump()
    return schema


def filled() -> dict[str, Any]:
    """What a person fills in at least: a model and its prompts."""
    given = load_config("organism").model_dump(mode="json", include={"model", "prompts"})
    return {**given, "search": {"preset": "heretic-1.4.0"}}


def test_the_form_offers_a_name_or_the_typed_config() -> None:
    text, typed = form()["properties"]["config"]["anyOf"]
    assert text["type"] == "string"
    assert typed == {"$ref": "#/definitions/Config"}
    fields = form()["definitions"]["Config"]["properties"]
    assert set(fields) == set(Config.model_fields)
    assert fields["seed"]["type"] == "integer"


def test_the_form_holds_no_value_that_a_preset_decides() -> None:
    definitions = form()["definitions"]
    for table in ("SearchSpec", "SearchSpace", "KernelSpace", "DirectionSpec", "EditSpec"):
        assert "required" not in definitions[table]
        defaults = {k for k, v in definitions[table]["properties"].items() if "default" in v}
        assert {definitions[table]["properties"][k]["default"] for k in defaults} <= {
            "strict",
            None,
        }
    assert definitions["GatesSpec"]["properties"]["max_kl"]["default"] == 0.5  # no preset's


def test_a_filled_form_is_the_config_of_its_preset() -> None:
    schema = form()
    jsonschema.validate({"config": filled()}, schema)
    given = flow_of("benchmark/adhoc").validate_parameters({"config": filled()})["config"]
    named = load_config("organism", ["search.preset=heretic-1.4.0"])
    assert given == named.model_copy(update={"name": "study"})
    assert given.search.objective == "heretic"


def test_a_switch_that_nobody_touched_is_as_the_preset_says() -> None:
    def given(value: bool | None) -> bool:
        config = filled() | {"directions": {"orthogonalize": value}}
        jsonschema.validate({"config": config}, form())
        found = flow_of("benchmark/adhoc").validate_parameters({"config": config})["config"]
        kept: bool = found.directions.orthogonalize
        return kept

    assert (given(None), given(False), given(True)) == (True, False, True)


def test_a_form_that_names_no_preset_that_exists_is_refused() -> None:
    wrong = {**filled(), "search": {"preset": "heretic"}}
    with pytest.raises(ConfigError, match="unknown preset 'heretic'"):
        flow_of("benchmark/adhoc").validate_parameters({"config": wrong})


def test_a_form_without_a_model_is_refused() -> None:
    with pytest.raises((ConfigError, ParameterTypeError), match="model"):
        flow_of("benchmark/adhoc").validate_parameters({"config": {"name": "x"}})
