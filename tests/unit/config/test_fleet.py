"""Configuration: what is refused, in which words, and what files resolve to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from calm_serve import config
from calm_serve.config import (
    BATCHING,
    BatchingProfile,
    ClusterResources,
    Config,
    Fleet,
    Goals,
    Remote,
    Resources,
    SLMSpec,
    check_resources,
    load_args,
    load_fleet,
    parse_fleet,
)
from calm_serve.errors import ConfigError
from calm_serve.testing import make_fleet, make_spec

HUB = "example/model"
MODELS = [c for c in vars(config).values() if isinstance(c, type) and issubclass(c, Config)]


def weights(folder: Path, name: str = "weights") -> Path:
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


def slm(**fields: Any) -> dict[str, Any]:
    return {"id": "small", "model": HUB, **fields}


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_every_field_has_a_description(model: type[Config]) -> None:
    assert [n for n, f in model.model_fields.items() if not f.description] == []


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_every_number_is_bounded_below(model: type[Config]) -> None:
    for name, field in model.model_fields.items():
        if field.annotation in (int, float):
            assert any(hasattr(m, "ge") or hasattr(m, "gt") for m in field.metadata), name


@pytest.mark.parametrize(
    ("data", "unknown", "nearest"),
    [
        ({"slms": [slm(skils=["sql"])]}, "skils", "skills"),
        ({"slms": [slm(resources={"num_cpu": 1})]}, "num_cpu", "num_cpus"),
        ({"slms": [slm(priors={"ttft": 1})]}, "ttft", "ttft_s"),
        ({"slms": [slm()], "rule": []}, "rule", "rules"),
        ({"slms": [slm()], "rules": [{"name": "r", "slm": ["small"]}]}, "slm", "slms"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest_valid_one(
    data: dict[str, Any], unknown: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fleet(data, Path())
    assert f"unknown key {unknown!r}; the nearest valid key is {nearest!r}" in caught.value.message


def test_an_error_in_an_inline_fleet_is_as_precise_as_in_a_file() -> None:
    with pytest.raises(ConfigError, match=r"args\.fleet\.slms\.0.*'skils'.*'skills'"):
        load_args({"fleet": {"slms": [slm(skils=["sql"])]}}, Path())


def test_an_unknown_key_of_the_application_arguments_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"args.*'goal'.*'goals'"):
        load_args({"fleet": {"slms": [slm()]}, "goal": {}}, Path())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"slms": [slm(), slm()]}, "SLM id 'small'"),
        ({"slms": [slm(id="auto")]}, "SLM id 'auto'"),
        ({"slms": [slm(id="Upper case")]}, "slms.0.id"),
        ({"slms": []}, "slms"),
        ({}, "slms"),
        ({"slms": [slm(residency="hot", scaling={"min_replicas": 0})]}, "min_replicas"),
        ({"slms": [slm(scaling={"min_replicas": 3, "max_replicas": 2})]}, "max_replicas"),
        ({"slms": [slm(locality="remote")]}, "remote"),
        ({"slms": [slm(remote={"base_url": "http://x/v1"})]}, "remote"),
        (
            {
                "slms": [
                    slm(
                        locality="remote",
                        remote={"base_url": "http://x/v1"},
                        adapters=[{"name": "a", "path": "x"}],
                    )
                ]
            },
            "a remote SLM has no adapters",
        ),
        (
            {
                "slms": [slm(locality="remote", remote={"base_url": "http://x/v1"})],
                "safety": [{"name": "secrets", "pattern": "key", "slm": "small"}],
            },
            "'secrets' is local_only but 'small' is remote",
        ),
        ({"slms": [slm(context_tokens=1)]}, "context_tokens"),
        ({"slms": [slm(priors={"quality": 1.5})]}, "quality"),
        ({"slms": [slm(priors={"ttft_s": 0})]}, "ttft_s"),
        ({"slms": [slm(batching="fast")]}, "batching"),
        (
            {"slms": [slm(adapters=[{"name": "a", "path": "x"}, {"name": "a", "path": "y"}])]},
            "adapter name 'a'",
        ),
        ({"slms": [slm()], "markers": {"sql": "("}}, "'sql' does not compile"),
        ({"slms": [slm()], "rules": [{"name": "r", "slms": ["smal"]}]}, "nearest is 'small'"),
        (
            {
                "slms": [slm()],
                "markers": {"sql": "select"},
                "rules": [{"name": "r", "marker": "sq", "slms": ["small"]}],
            },
            "unknown marker 'sq'; the nearest is 'sql'",
        ),
        (
            {
                "slms": [slm()],
                "markers": {"sql": "select"},
                "rules": [{"name": "r", "without": ["code"], "slms": ["small"]}],
            },
            "unknown marker 'code'",
        ),
        ({"slms": [slm()], "rules": [{"name": "r", "slms": ["small"]}] * 2}, "rule name 'r'"),
        (
            {"slms": [slm()], "safety": [{"name": "s", "pattern": "x", "slm": "big"}]},
            "unknown SLM 'big'",
        ),
        (
            {"slms": [slm()], "safety": [{"name": "none", "pattern": "x", "slm": "small"}]},
            "safety name 'none'",
        ),
    ],
)
def test_a_wrong_fleet_is_refused_in_one_line_that_names_the_fault(
    data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fleet(data, Path(), "fleet.yaml")
    assert caught.value.message.startswith("fleet.yaml")
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latency_weight_per_s", -0.1),
        ("energy_weight_per_j", 101),
        ("quality_floor", 1.1),
        ("exploration_ratio", 0.6),
        ("exploration_ratio", float("nan")),
    ],
)
def test_goals_out_of_bounds_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        Goals(**{field: value})


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Goals().quality_floor = 0.5  # type: ignore[misc]


def test_memory_may_be_written_with_a_unit() -> None:
    resources = Resources.model_validate({"memory_bytes": "1.5GiB", "kv_cache_bytes": "256MB"})
    assert (resources.memory_bytes, resources.kv_cache_bytes) == (3 << 29, 256_000_000)


@pytest.mark.parametrize("profile", BatchingProfile)
def test_a_batching_profile_feeds_the_engine_and_bounds_the_queue(profile: BatchingProfile) -> None:
    limits = make_spec(batching=profile).limits
    assert limits == BATCHING[profile]
    assert limits.max_num_seqs < limits.max_ongoing_requests < limits.max_queued_requests


@pytest.mark.parametrize(("sequences", "ongoing"), [(1, 2), (4, 5), (16, 20), (64, 80)])
def test_a_replica_takes_few_more_requests_than_its_engine_runs(
    sequences: int, ongoing: int
) -> None:
    limits = make_spec(engine={"max_num_seqs": sequences}).limits
    assert (limits.max_num_seqs, limits.max_ongoing_requests) == (sequences, ongoing)
    assert (
        limits.max_num_batched_tokens == BATCHING[BatchingProfile.BALANCED].max_num_batched_tokens
    )


def test_the_limit_of_a_remote_slm_is_its_own() -> None:
    upstream = {"base_url": "https://up/v1", "max_concurrent_requests": 7}
    limits = make_spec(locality="remote", remote=upstream).limits
    assert (limits.max_num_seqs, limits.max_ongoing_requests) == (7, 7)


def test_prices_of_two_currencies_cannot_be_added_up() -> None:
    def priced(slm_id: str, currency: str) -> SLMSpec:
        prices = {"input_per_million_tokens": 1, "output_per_million_tokens": 2}
        upstream = {"base_url": "https://up/v1", "prices": {**prices, "currency": currency}}
        return make_spec(slm_id, locality="remote", remote=upstream)

    Fleet(slms=(priced("one", "EUR"), priced("two", "EUR")))
    with pytest.raises(ValidationError, match="one currency, but there are EUR, USD"):
        Fleet(slms=(priced("one", "EUR"), priced("two", "USD")))


def test_interactive_batches_and_queues_less_than_extraction() -> None:
    tight, wide = BATCHING[BatchingProfile.INTERACTIVE], BATCHING[BatchingProfile.EXTRACTION]
    assert tight.max_num_seqs < wide.max_num_seqs
    assert tight.max_queued_requests < wide.max_queued_requests


def test_weights_and_predictor_paths_start_at_the_fleet_file(tmp_path: Path) -> None:
    weights(tmp_path)
    (tmp_path / "champion").mkdir()
    file = tmp_path / "fleet.yaml"
    file.write_text("slms: [{id: small, model: weights}]\npredictor: champion\n")
    fleet = load_fleet(file)
    assert fleet.slms[0].model == str(tmp_path / "weights")
    assert fleet.predictor == str(tmp_path / "champion")


def test_a_hub_id_is_left_alone() -> None:
    assert parse_fleet({"slms": [slm()]}, Path()).slms[0].model == HUB


def test_a_remote_model_is_never_looked_for_on_disk(tmp_path: Path) -> None:
    remote = slm(model="gpt", locality="remote", remote={"base_url": "https://x/v1"})
    assert parse_fleet({"slms": [remote]}, tmp_path).slms[0].model == "gpt"


@pytest.mark.parametrize("model", ["./weights", "/nowhere/weights", "../weights", "weights"])
def test_missing_weights_are_named(tmp_path: Path, model: str) -> None:
    with pytest.raises(ConfigError, match=f"SLM 'small': weights not found: {model}"):
        parse_fleet({"slms": [slm(model=model)]}, tmp_path)


@pytest.mark.parametrize(
    ("file", "message"), [("config.json", "no config.json"), ("model.safetensors", "no weights")]
)
def test_an_incomplete_weights_folder_is_refused(tmp_path: Path, file: str, message: str) -> None:
    (weights(tmp_path) / file).unlink()
    with pytest.raises(ConfigError, match=message):
        parse_fleet({"slms": [slm(model="weights")]}, tmp_path)


def test_a_missing_adapter_is_named(tmp_path: Path) -> None:
    weights(tmp_path)
    data = {"slms": [slm(model="weights", adapters=[{"name": "sql", "path": "lora"}])]}
    with pytest.raises(ConfigError, match="adapter 'sql' not found: lora"):
        parse_fleet(data, tmp_path)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert parse_fleet(data, tmp_path).slms[0].adapters[0].path == str(tmp_path / "lora")


def test_a_missing_predictor_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="predictor folder not found: champion"):
        parse_fleet({"slms": [slm()], "predictor": "champion"}, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"slms: [", "not YAML"), (b"\xff\xfe\xff", "not YAML"), (b"- a\n- b\n", "mapping")],
)
def test_an_unreadable_fleet_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_fleet(file)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_fleet_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fleet file not found: .*absent\.yaml"):
        load_args({"fleet": "absent.yaml"}, tmp_path)


def test_a_fleet_may_be_inline_in_the_arguments() -> None:
    args, fleet = load_args({"fleet": {"slms": [slm()]}, "router": {"retries": 1}}, Path())
    assert [s.id for s in fleet.slms] == ["small"]
    assert args.router.retries == 1


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"num_cpus": 5}, "SLM 'small': one replica asks for 5 CPUs, the cluster has 4"),
        ({"num_gpus": 1}, "GPUs"),
        ({"memory_bytes": 9 << 30}, "memory bytes"),
        ({"num_cpus": 3}, "minimum replicas and routers ask for 6 CPUs"),
    ],
)
def test_resources_that_cannot_fit_are_refused(resources: dict[str, Any], message: str) -> None:
    fleet = make_fleet(
        make_spec("small", resources=resources), make_spec("other", resources=resources)
    )
    with pytest.raises(ConfigError, match=message):
        check_resources(fleet, ClusterResources(4, 0, 8 << 30))


def test_remote_slms_and_slms_that_may_be_cold_take_no_resources_at_the_start() -> None:
    cold = make_spec(
        "cold", residency="on_demand", scaling={"min_replicas": 0}, resources={"num_cpus": 4}
    )
    remote = make_spec(
        "remote",
        locality="remote",
        remote={"base_url": "http://x/v1"},
        resources={"num_cpus": 99},
    )
    hot = make_spec("hot", resources={"num_cpus": 4})
    check_resources(Fleet(slms=(cold, remote, hot)), ClusterResources(4, 0, 8 << 30))


def test_the_defaults_of_an_slm_are_valid_on_their_own() -> None:
    spec = SLMSpec(id="small", model=HUB)
    assert SLMSpec.model_validate_json(spec.model_dump_json()) == spec


def remote(**fields: Any) -> Remote:
    return Remote.model_validate({"base_url": "https://up/v1", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": "ftp://x"}, "base_url"),
        ({"dialect": "google"}, "dialect"),
        ({"api_version": "2024-10-21"}, "api_version has no meaning for dialect openai"),
        ({"dialect": "vllm", "api_version": "1"}, "api_version has no meaning for dialect vllm"),
        (
            {"dialect": "azure", "base_url": "https://x/openai"},
            "dialect azure needs api_version, or a base_url that ends in `/v1`",
        ),
        ({"dialect": "azure", "api_version": "1&x=y"}, "api_version"),
        ({"connect_timeout_s": 0}, "connect_timeout_s"),
        ({"first_byte_timeout_s": 0}, "first_byte_timeout_s"),
        ({"idle_timeout_s": 3601}, "idle_timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"max_concurrent_requests": 0}, "max_concurrent_requests"),
        ({"prices": {"input_per_million_tokens": 1.0}}, "output_per_million_tokens"),
        ({"prices": {"input_per_million_tokens": -1, "output_per_million_tokens": 1}}, "prices"),
        (
            {
                "prices": {
                    "input_per_million_tokens": 1,
                    "output_per_million_tokens": 1,
                    "cached_input_per_million_tokens": -1,
                }
            },
            "cached_input_per_million_tokens",
        ),
    ],
)
def test_an_upstream_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        remote(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"dialect": "azure", "api_version": "2024-10-21", "base_url": "https://x/openai"},
        {"dialect": "azure", "base_url": "https://x/openai/v1/"},
        {"dialect": "anthropic"},
        {"dialect": "anthropic", "api_version": "2023-06-01"},
        {"dialect": "openai-reasoning"},
        {"prices": {"input_per_million_tokens": 0, "output_per_million_tokens": 0}},
    ],
)
def test_upstreams_of_every_dialect_can_be_written(fields: dict[str, Any]) -> None:
    assert remote(**fields).timeout_s == 120.0


def test_an_upstream_fails_to_connect_long_before_a_request_times_out() -> None:
    """Otherwise no time is left for another SLM."""
    upstream = remote()
    assert upstream.connect_timeout_s < upstream.first_byte_timeout_s < upstream.timeout_s / 2


def test_a_marker_is_a_pattern_or_a_pattern_with_its_scope() -> None:
    short = make_fleet(markers={"sql": "select"})
    assert short == make_fleet(markers={"sql": {"pattern": "select", "scope": "last_user"}})
    assert make_fleet(markers={"sql": {"pattern": "a", "scope": "all"}}) != short


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ({"pattern": "a", "scop": "all"}, "unknown key 'scop'; the nearest valid key is 'scope'"),
        ({"pattern": "a", "scope": "system"}, "'last_user', 'user' or 'all'"),
        ({"scope": "all"}, "markers.sql.pattern: Field required"),
        ("(", "pattern 'sql' does not compile"),
    ],
)
def test_a_wrong_marker_is_refused_by_its_name(marker: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fleet({"slms": [slm()], "markers": {"sql": marker}}, Path())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("code", "near"), [("en-GB", "en"), ("english", "en"), ("DE", "de"), ("xx", "xh"), ("iw", "wa")]
)
def test_a_language_that_cannot_be_detected_is_refused_with_the_nearest(
    code: str, near: str
) -> None:
    message = f"{code!r} is no language that can be detected.*; the nearest is {near!r}"
    with pytest.raises(ConfigError, match=rf"slms\.0\.languages\.1: {message}"):
        parse_fleet({"slms": [slm(languages=["en", code])]}, Path())
    rule = {"name": "r", "language": code, "slms": ["small"]}
    with pytest.raises(ConfigError, match=message):
        parse_fleet({"slms": [slm()], "rules": [rule]}, Path())
