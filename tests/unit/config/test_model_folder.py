"""What a model's folder says about an SLM, and that the fleet file goes before it."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from calm_serve.config import Fleet, parse_fleet
from calm_serve.config.model_folder import _TOOL_PARSERS, read_model_folder
from calm_serve.errors import ConfigError
from calm_serve.types import Task

QWEN = "{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}{{ messages }}"
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}
DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}


def make_folder(path: Path, config: Any = None, **files: Any) -> Path:
    """A model's folder; names of `files` have `__` for `.` and `___` for `/`."""
    folder = path / "model"
    folder.mkdir(exist_ok=True)
    content = {"config__json": {"architectures": ["Qwen3ForCausalLM"]} | (config or {}), **files}
    for name, value in content.items():
        file = folder / name.replace("___", "/").replace("__", ".")
        file.parent.mkdir(exist_ok=True)
        file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"12345")
    return folder


def load(folder: Path, **fields: Any) -> Any:
    fleet: Fleet = parse_fleet(
        {"slms": [{"id": "small", "model": "model", **fields}]}, folder.parent
    )
    return fleet.slms[0]


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({}, Task.GENERATE),
        ({"architectures": ["LlavaForConditionalGeneration"]}, Task.GENERATE),
        ({"architectures": ["ChatGLMModel"]}, Task.GENERATE),
        ({"architectures": ["AnArchitectureOfTomorrow"]}, Task.GENERATE),
        ({"architectures": []}, Task.GENERATE),
        ({"architectures": ["BertModel"]}, Task.EMBED),
        (
            {"architectures": ["XLMRobertaForSequenceClassification"], "id2label": {"0": "L"}},
            Task.RERANK,
        ),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 1}, Task.RERANK),
        ({"architectures": ["BertForSequenceClassification"]}, None),
        ({"architectures": ["BertForTokenClassification"]}, None),
        ({"architectures": ["HF_ColBERT"]}, Task.RERANK),
    ],
)
def test_the_task_is_that_of_the_architecture(
    tmp_path: Path, config: dict[str, Any], task: Task | None
) -> None:
    assert read_model_folder(make_folder(tmp_path, config)).task is task


def test_a_generating_architecture_with_pooling_embeds(tmp_path: Path) -> None:
    assert read_model_folder(make_folder(tmp_path, modules__json=[POOLING])).task is Task.EMBED


def test_a_cross_encoder_of_sentence_transformers_ranks(tmp_path: Path) -> None:
    own = {"model_type": "CrossEncoder"}
    folder = make_folder(tmp_path, config_sentence_transformers__json=own)
    assert read_model_folder(folder).task is Task.RERANK


@pytest.mark.parametrize(
    ("engine", "task"),
    [
        ({"convert": "embed"}, Task.EMBED),
        ({"convert": "classify"}, Task.RERANK),
        ({"runner": "pooling"}, Task.EMBED),
        (
            {
                "hf_overrides": {
                    "architectures": ["Qwen3ForSequenceClassification"],
                    "num_labels": 1,
                }
            },
            Task.RERANK,
        ),
    ],
)
def test_engine_arguments_override_the_files(
    tmp_path: Path, engine: dict[str, Any], task: Task
) -> None:
    assert load(make_folder(tmp_path), engine=engine).task is task


def test_a_stated_task_goes_before_the_files(tmp_path: Path) -> None:
    assert load(make_folder(tmp_path), task="embed").task is Task.EMBED
    classifier = make_folder(tmp_path, {"architectures": ["BertForSequenceClassification"]})
    assert load(classifier, task="rerank").task is Task.RERANK
    with pytest.raises(ConfigError, match=r"'small': a model .*set `task`"):
        load(classifier)


@pytest.mark.parametrize(
    ("files", "chat"),
    [
        ({}, False),
        ({"chat_template__jinja": "{{ messages }}"}, True),
        ({"chat_template__json": {"chat_template": "{{ messages }}"}}, True),
        ({"tokenizer_config__json": {"chat_template": "{{ messages }}"}}, True),
        ({"tokenizer_config__json": {"chat_template": None}}, False),
        (
            {
                "tokenizer_config__json": {
                    "chat_template": [{"name": "default", "template": "{{ m }}"}]
                }
            },
            True,
        ),
        ({"tekken__json": {}}, True),
    ],
)
def test_a_model_without_a_chat_template_takes_prompts_only(
    tmp_path: Path, files: dict[str, Any], chat: bool
) -> None:
    folder = make_folder(tmp_path, **files)
    assert load(folder).capabilities.chat is chat
    assert load(folder, engine={"chat_template": "{{ messages }}"}).capabilities.chat
    assert not load(folder, capabilities={"chat": False}).capabilities.chat


@pytest.mark.parametrize(
    ("model_type", "template", "parser"),
    [
        ("qwen2", QWEN, "hermes"),
        ("qwen3", QWEN, "hermes"),
        ("qwen3_moe", QWEN.replace("<tool_call>", "<tool_call><function="), "qwen3_coder"),
        ("llama", "{{ tools }} Environment: ipython", "llama3_json"),
        ("mistral", "{{ tools }}[TOOL_CALLS]", "mistral"),
        ("granitemoehybrid", "{{ tools }}<tool_call>", "granite4"),
        ("phi3", "{{ tools }}<|tool|>", "phi4_mini_json"),
        ("a_family_of_tomorrow", QWEN, ""),
        ("qwen3", "{{ messages }}", ""),
        ("llama", "{{ tools }}", ""),
    ],
)
def test_tools_are_on_where_template_and_family_allow_it(
    tmp_path: Path, model_type: str, template: str, parser: str
) -> None:
    folder = make_folder(tmp_path, {"model_type": model_type}, chat_template__jinja=template)
    found = load(folder)
    assert (found.capabilities.tools, found.tool_parser) == (bool(parser), parser)
    assert not load(folder, capabilities={"tools": False}).capabilities.tools
    assert load(folder, capabilities={"tools": True}).capabilities.tools


def test_the_operators_tool_parser_goes_before_the_familys(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {"model_type": "qwen3"}, chat_template__jinja=QWEN)
    found = load(folder, engine={"tool_call_parser": "pythonic"})
    assert (found.capabilities.tools, found.tool_parser) == (True, "pythonic")
    assert load(folder, tool_parser="xlam").tool_parser == "xlam"


def test_a_parser_that_is_named_for_a_hub_id_turns_tools_on() -> None:
    slm = {"id": "small", "model": "example/model"}
    assert not parse_fleet({"slms": [slm]}, Path()).slms[0].capabilities.tools
    named = {**slm, "engine": {"tool_call_parser": "hermes"}}
    found = parse_fleet({"slms": [named]}, Path()).slms[0]
    assert (found.capabilities.tools, found.tool_parser) == (True, "hermes")


def test_vllm_has_every_parser_of_the_table() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None  # `make install` installs it
    source = Path(spec.origin).parent / "tool_parsers" / "__init__.py"
    known = {
        key.value
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    assert {parser for *_, parser in _TOOL_PARSERS} <= known


def test_media_are_those_that_the_model_encodes(tmp_path: Path) -> None:
    config = {"vision_config": {}, "video_token_id": 7}
    found = load(make_folder(tmp_path, config)).capabilities
    assert (found.vision, found.video, found.audio) == (True, True, False)


@pytest.mark.parametrize(
    ("config", "files", "engine", "space"),
    [
        ({"hidden_size": 384}, {"modules__json": [POOLING, NORMALIZE]}, {}, "384//normalised"),
        (
            {"hidden_size": 384},
            {
                "modules__json": [POOLING],
                "1_Pooling___config__json": {
                    "pooling_mode_cls_token": True,
                    "pooling_mode_mean_tokens": False,
                },
            },
            {},
            "384/CLS/raw",
        ),
        (
            {"text_config": {"hidden_size": 2048}},
            {
                "modules__json": [POOLING, DENSE],
                "1_Pooling___config__json": {"pooling_mode": "lasttoken"},
                "2_Dense___config__json": {"out_features": 512},
            },
            {},
            "512/LAST/raw",
        ),
        (
            {"hidden_size": 64, "architectures": ["BertModel"]},
            {},
            {"pooler_config": {"pooling_type": "mean", "use_activation": False}},
            "64/MEAN/raw",
        ),
    ],
)
def test_the_vector_space_is_found_in_the_folder(
    tmp_path: Path, config: Any, files: Any, engine: Any, space: str
) -> None:
    folder = make_folder(tmp_path, config, **files)
    assert load(folder, engine=engine).embedding_space == f"{folder}@/{space}"
    stated = {"model": "bge", "revision": "2", "dimensions": 7, "pooling": "MEAN"}
    own = load(folder, engine=engine, embedding={**stated, "normalised": True})
    assert own.embedding_space == "bge@2/7/MEAN/normalised"


def test_two_folders_are_two_spaces_unless_the_fleet_file_says_otherwise(tmp_path: Path) -> None:
    spaces = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        folder = make_folder(tmp_path / name, modules__json=[POOLING])
        spaces |= {load(folder).embedding_space}
        assert load(folder, embedding={"model": "bge"}).embedding_space == "bge@/0//raw"
    assert len(spaces) == 2


def test_what_was_found_survives_the_way_to_other_processes(tmp_path: Path) -> None:
    found = load(make_folder(tmp_path, {"model_type": "qwen3"}, chat_template__jinja=QWEN))
    again = type(found).model_validate(found.model_dump(mode="json"))
    assert again == found
    assert again.capabilities.tools


@pytest.mark.parametrize("name", ["config__json", "modules__json", "tokenizer_config__json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=name.replace("__", ".")):
        load(make_folder(tmp_path, **{name: "{"}))


@pytest.mark.parametrize(
    "fields",
    [
        {"rules": [{"name": "r", "slms": ["small"]}]},
        {"safety": [{"name": "s", "pattern": "x", "slm": "small"}]},
    ],
)
def test_rules_and_safety_name_slms_that_generate(tmp_path: Path, fields: dict[str, Any]) -> None:
    make_folder(tmp_path, modules__json=[POOLING])
    with pytest.raises(ConfigError, match="'small', whose task is embed"):
        parse_fleet({"slms": [{"id": "small", "model": "model"}], **fields}, tmp_path)


def test_a_vector_space_needs_the_task(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task is generate"):
        load(make_folder(tmp_path), embedding={"model": "bge"})
