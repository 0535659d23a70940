"""What a model's folder says about an SLM: its task, chat template, tool parser, vector space.

Only JSON files and the chat template are read, as vLLM reads them: `config.json`, the modules of
Sentence Transformers, the tokenizer's configuration. What a fleet file states goes before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm_serve.config.fleet import Capabilities, EmbeddingSpace, SLMSpec
from calm_serve.errors import ConfigError
from calm_serve.types import Task

# Ends of architecture names and what vLLM runs them as; the first that fits counts.
_TASKS_BY_SUFFIX = (
    ("ForCausalLM", Task.GENERATE),
    ("ForConditionalGeneration", Task.GENERATE),
    ("LMHeadModel", Task.GENERATE),
    ("ChatModel", Task.GENERATE),
    ("Generation", Task.GENERATE),
    ("EmbeddingModel", Task.EMBED),
    ("EmbedModel", Task.EMBED),
    ("ForTextEncoding", Task.EMBED),
    ("ForMaskedLM", Task.EMBED),
    ("ColBERT", Task.RERANK),
    ("ForRanking", Task.RERANK),
    ("ForRetrieval", Task.RERANK),
)
_CLASSIFIER = "ForSequenceClassification"
# Generating architectures of vLLM whose names end like those of encoders, or like nothing known.
_GENERATING = frozenset(
    (
        *("ChatGLMModel", "MiDashengLMModel", "MiniCPMO", "MiniCPMV", "MossAudioModel"),
        *("HfMoondream", "NVLM_D", "Ovis", "Ovis2_5", "Phi4ForCausalLMV", "Qwen2_5OmniModel"),
        *("UltravoxModel", "Llama_Nemotron_Nano_VL"),
    )
)
_NOT_SERVED = ("Classification", "RewardModel", "ForRewardModeling")
_ENCODER = "Model"  # such as BertModel; after all others

# vLLM's tool parser by the start of `model_type` and a mark of the chat template, first match. Only
# families whose template shows which format the model was trained for; a guess would turn tool
# calls into text. Qwen2.5-Coder has Qwen's template, but writes another format: state
# `capabilities.tools: false` for it.
_TOOL_PARSERS = (
    ("qwen3", "<function=", "qwen3_coder"),
    ("qwen", "<tool_call>", "hermes"),
    ("smollm3", "<tool_call>", "hermes"),
    ("llama4", "tools", "llama4_pythonic"),
    ("llama", "<tool_call>", "hermes"),
    ("llama", "ipython", "llama3_json"),
    ("mi", "[TOOL_CALLS]", "mistral"),  # mistral, mistral3, mixtral, ministral
    ("phi3", "<|tool|>", "phi4_mini_json"),
    ("granite", "<|tool_call|>", "granite"),
    ("granite", "<tool_call>", "granite4"),
    ("gemma3", "<start_function_call>", "functiongemma"),
    ("gemma4", "<|tool_call>", "gemma4"),
    ("lfm2", "tools", "lfm2"),
    ("internlm2", "<|plugin|>", "internlm"),
    ("jamba", "<tool_calls>", "jamba"),
    ("ernie4_5", "<tool_call>", "ernie45"),
    ("glm4", "<arg_key>", "glm45"),
    ("hunyuan", "<tool_calls>", "hunyuan_a13b"),
    ("olmo3", "<function_calls>", "olmo3"),
    ("apertus", "<|tools_prefix|>", "apertus"),
    ("seed_oss", "<seed:tool_call>", "seed_oss"),
    ("gpt_oss", "tools", "openai"),
)
_TAKES_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the files of a model say about it."""

    task: Task | None  # None for an architecture whose task is none of those that are served
    architecture: str
    has_chat_template: bool
    takes_tools: bool  # the chat template mentions tools
    tool_parser: str | None  # of the model's family; None when unknown
    vision: bool
    video: bool
    audio: bool
    dimensions: int  # of its vectors, 0 when unknown
    pooling: str  # "" when no file states it
    normalised: bool


def read_model_folder(folder: Path, engine: Mapping[str, Any] | None = None) -> ModelFacts:
    """Read the model in `folder`. `engine` are vLLM's arguments, which override its files.

    Raises ConfigError for a file that is not JSON or cannot be read.
    """
    engine = engine or {}
    config = _read_json(folder / "config.json")
    overrides = engine.get("hf_overrides")
    if isinstance(overrides, Mapping):
        config = {**config, **overrides}
    modules = _modules(folder)
    architecture = next(iter(config.get("architectures") or ()), "")
    template = _chat_template(folder, engine.get("chat_template"))
    takes_tools = bool(_TAKES_TOOLS.search(template))
    pooling, dimensions, normalised = _pooling(folder, modules, config, engine)
    return ModelFacts(
        task=_task(architecture, config, modules, folder, engine),
        architecture=architecture,
        has_chat_template=bool(template),
        takes_tools=takes_tools,
        tool_parser=_tool_parser(str(config.get("model_type", "")), template),
        vision="vision_config" in config,
        video=not {"video_token_id", "video_token_index"}.isdisjoint(config),
        audio="audio_config" in config,
        dimensions=dimensions,
        pooling=pooling,
        normalised=normalised,
    )


def complete_spec(slm: SLMSpec, folder: Path, where: str) -> SLMSpec:
    """Return `slm` with what its entry leaves out and `folder` tells; `where` prefixes errors.

    Raises ConfigError for unreadable files, and for a model whose task is not served.
    """
    facts = read_model_folder(folder, slm.engine)
    stated = slm.model_fields_set
    if "task" not in stated and facts.task is None:
        raise ConfigError(
            f"{where}: a model of architecture {facts.architecture!r} does nothing that is served; "
            "set `task` (generate, embed or rerank) if it does"
        )
    task = slm.task if "task" in stated else facts.task
    parser = slm.tool_parser
    if not parser and facts.takes_tools:
        parser = str(slm.engine.get("tool_call_parser") or facts.tool_parser or "")
    found: dict[str, Any] = {
        "chat": facts.has_chat_template,
        "tools": facts.takes_tools and bool(parser),
        "vision": facts.vision,
        "video": facts.video,
        "audio": facts.audio,
    }
    update: dict[str, Any] = {
        "task": task,
        "tool_parser": parser,
        "capabilities": _fill(slm.capabilities, found),
    }
    if task is Task.EMBED:
        space = {
            "dimensions": facts.dimensions,
            "pooling": facts.pooling,
            "normalised": facts.normalised,
        }
        update["embedding"] = _fill(slm.embedding, space)
    return slm.model_copy(update=update)


def complete_hub_spec(slm: SLMSpec) -> SLMSpec:
    """Return `slm`, whose files are not here; an operator who names a tool parser wants tools."""
    parser = slm.tool_parser or str(slm.engine.get("tool_call_parser") or "")
    capabilities = _fill(slm.capabilities, {"tools": bool(parser)})
    return slm.model_copy(update={"tool_parser": parser, "capabilities": capabilities})


def _fill(
    section: Capabilities | EmbeddingSpace, found: Mapping[str, Any]
) -> Capabilities | EmbeddingSpace:
    """Return `section` with values for the fields that were not stated."""
    new = {name: value for name, value in found.items() if name not in section.model_fields_set}
    return section.model_copy(update=new)


def _task(
    architecture: str,
    config: Mapping[str, Any],
    modules: list[Mapping[str, Any]],
    folder: Path,
    engine: Mapping[str, Any],
) -> Task | None:
    convert = engine.get("convert")
    if convert in ("embed", "classify"):
        return Task.EMBED if convert == "embed" else Task.RERANK
    if _read_json(folder / "config_sentence_transformers.json").get("model_type") == "CrossEncoder":
        return Task.RERANK
    if any(_is(module, "Pooling") for module in modules):
        return Task.EMBED
    if engine.get("runner") == "pooling" and not architecture.endswith(_CLASSIFIER):
        return Task.EMBED
    if architecture.endswith(_CLASSIFIER):
        # A reranker has one score, and vLLM scores with no more. transformers assumes two labels.
        labels = config.get("num_labels") or len(config.get("id2label") or ()) or 2
        return Task.RERANK if labels == 1 else None
    if architecture in _GENERATING:
        return Task.GENERATE
    for suffix, task in _TASKS_BY_SUFFIX:
        if architecture.endswith(suffix):
            return task
    if architecture.endswith(_NOT_SERVED):
        return None
    return Task.EMBED if architecture.endswith(_ENCODER) else Task.GENERATE


def _pooling(
    folder: Path,
    modules: list[Mapping[str, Any]],
    config: Mapping[str, Any],
    engine: Mapping[str, Any],
) -> tuple[str, int, bool]:
    """Return pooling, dimensions and whether vectors are normalised."""
    text = config.get("text_config")
    sizes = {**config, **text} if isinstance(text, Mapping) else config
    named = (sizes.get(name) for name in ("hidden_size", "d_model", "n_embd", "dim"))
    dimensions = next((int(size) for size in named if isinstance(size, int)), 0)
    # Without modules of its own, vLLM normalises; with them, only where one of them says so.
    normalised = not modules or any(_is(module, "Normalize") for module in modules)
    pooling = ""
    for module in modules:
        own = _read_json(folder / str(module.get("path", "")) / "config.json")
        if _is(module, "Pooling"):
            modes = [key for key, value in own.items() if value is True and "pooling_mode_" in key]
            if isinstance(own.get("pooling_mode"), str):
                modes = [own["pooling_mode"]]
            pooling = "+".join(sorted(map(_pooling_name, modes)))
        elif _is(module, "Dense") and isinstance(own.get("out_features"), int):
            dimensions = own["out_features"]
    chosen = engine.get("pooler_config")
    if isinstance(chosen, Mapping):
        named_by_operator = chosen.get("pooling_type") or chosen.get("seq_pooling_type")
        pooling = str(named_by_operator or pooling).upper()
        if isinstance(chosen.get("use_activation"), bool):
            normalised = chosen["use_activation"]
    return pooling, dimensions, normalised


def _pooling_name(mode: str) -> str:
    name = mode.removeprefix("pooling_mode_").partition("_")[0]
    return "LAST" if name == "lasttoken" else name.upper()


def _modules(folder: Path) -> list[Mapping[str, Any]]:
    found = _read_json(folder / "modules.json", list)
    return [module for module in found if isinstance(module, Mapping)]


def _is(module: Mapping[str, Any], kind: str) -> bool:
    return str(module.get("type", "")).rpartition(".")[2] == kind


def _chat_template(folder: Path, override: object) -> str:
    """Return the text of the chat template, all of them if there are several; "" for none."""
    if isinstance(override, str) and override:
        path = Path(override).expanduser()
        return _read_text(path) if len(override) < 1024 and path.is_file() else override
    if text := _read_text(folder / "chat_template.jinja"):
        return text
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _read_json(folder / name).get("chat_template")
        if isinstance(found, str):
            return found
        if isinstance(found, list):  # named ones, such as "default" and "tool_use"
            return "\n".join(str(t.get("template", "")) for t in found if isinstance(t, Mapping))
    # Mistral's own tokenizer formats messages and tools without a template.
    return "tools [TOOL_CALLS]" if (folder / "tekken.json").is_file() else ""


def _tool_parser(model_type: str, template: str) -> str | None:
    if not _TAKES_TOOLS.search(template):
        return None
    for family, mark, parser in _TOOL_PARSERS:
        if model_type.startswith(family) and mark in template:
            return parser
    return None


def _read_json(path: Path, kind: type = dict) -> Any:
    """Return the JSON in `path`; an empty `kind` when there is none, or one of another type."""
    text = _read_text(path)
    try:
        found = json.loads(text) if text else kind()
    except ValueError as error:
        raise ConfigError(f"{path.parent.name}/{path.name}: not JSON: {error}") from error
    return found if isinstance(found, kind) else kind()


def _read_text(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.parent.name}/{path.name}: cannot be read: {error}") from error
