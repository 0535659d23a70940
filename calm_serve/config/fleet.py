"""The fleet file: SLMs, markers, rules and safety patterns; typed, bounded, documented.

Pure validation: files are read in `loading.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal

from pydantic import ByteSize, Field, model_validator

from calm_serve.config.base import (
    Config,
    Identifier,
    Ratio,
    nearest,
    unique,
)
from calm_serve.config.languages import Language
from calm_serve.types import Task


class BatchingProfile(StrEnum):
    """Named trade-off between queueing and batching; see `BATCHING`."""

    EXTRACTION = "extraction"
    BALANCED = "balanced"
    INTERACTIVE = "interactive"


@dataclass(frozen=True, slots=True)
class Batching:
    """What one profile means for vLLM (`max_num_*`) and for Serve (ongoing and queued requests)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_ongoing_requests: int
    max_queued_requests: int


# Requests in a replica beyond those that run, as a share of them: the engine always has a next one.
NEXT_RATIO = 0.25
# max_ongoing_requests is max_num_seqs and NEXT_RATIO of it. The queue bound limits the wait; it is
# lowest where a person watches the answer appear.
BATCHING: dict[BatchingProfile, Batching] = {
    BatchingProfile.EXTRACTION: Batching(32, 4096, 40, 256),
    BatchingProfile.BALANCED: Batching(16, 2048, 20, 128),
    BatchingProfile.INTERACTIVE: Batching(8, 2048, 10, 64),
}


class Adapter(Config):
    """A LoRA adapter of an SLM, addressed as `slm:adapter`."""

    name: Identifier = Field(description="Name after the colon in `slm:adapter`.")
    path: str = Field(description="Folder with a PEFT adapter, relative to the fleet file.")
    description: str = Field(default="", description="One line for people and `/v1/models`.")


class Resources(Config):
    """Resources of one replica: Ray schedules by them, and the engine is limited to them."""

    num_cpus: float = Field(default=1.0, gt=0, le=512, description="Ray CPUs; fractions share.")
    num_gpus: float = Field(default=0.0, ge=0, le=64, description="Ray GPUs.")
    memory_bytes: ByteSize = Field(
        default=ByteSize(2 << 30),
        description="Ray's `memory` resource for the whole replica: process, weights, KV cache.",
    )
    kv_cache_bytes: ByteSize = Field(
        default=ByteSize(256 << 20), description="KV cache on CPU; on GPU vLLM sizes it itself."
    )
    weights_bytes: ByteSize | None = Field(
        default=None,
        description="Weights and adapters in memory; null: their files' size, or for a hub id "
        "2 bytes per parameter.",
    )
    threads: int = Field(default=1, ge=1, le=512, description="OpenMP threads of the engine.")


class Scaling(Config):
    """Replicas and Ray's autoscaling."""

    min_replicas: int = Field(default=1, ge=0, le=1000, description="0 lets the SLM go cold.")
    max_replicas: int = Field(default=1, ge=1, le=1000, description="Upper bound.")
    target_ongoing_requests: float = Field(
        default=8.0, gt=0, le=10_000, description="Requests per replica that Ray aims at."
    )
    upscale_delay_s: float = Field(default=2.0, ge=0, le=3600, description="Patience upwards.")
    downscale_delay_s: float = Field(default=60.0, ge=0, le=86_400, description="And downwards.")

    @model_validator(mode="after")
    def _ordered(self) -> Scaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})"
            )
        return self


class Capabilities(Config):
    """What the SLM can do beyond plain text; hard filters read this.

    What a fleet file leaves out is found in the model's folder, where there is one.
    """

    chat: bool = Field(
        default=True,
        description="Messages. Found: the model has a chat template; else prompts only.",
    )
    json_output: bool = Field(default=True, description="`response_format` and guided decoding.")
    tools: bool = Field(
        default=False,
        description="Tool calls. Found: its chat template takes tools, and vLLM has a parser for "
        "its family or `engine.tool_call_parser` names one.",
    )
    vision: bool = Field(default=False, description="Image parts. Found: the model encodes images.")
    video: bool = Field(default=False, description="Video parts. Found: the model encodes videos.")
    audio: bool = Field(default=False, description="Audio parts. Found: the model encodes audio.")


class EmbeddingSpace(Config):
    """The vector space of an embedding SLM. Vectors can be compared only within one space.

    SLMs whose five values are equal share a space, and fail over to each other. What a fleet file
    leaves out is found in the model's folder, where there is one.
    """

    model: str = Field(
        default="", description="Name of the weights; '': folder, hub id or upstream."
    )
    revision: str = Field(default="", description="Revision of the weights; '': the hub's default.")
    dimensions: int = Field(default=0, ge=0, le=1_000_000, description="Of a vector; 0: unknown.")
    pooling: str = Field(default="", description="Such as CLS, LAST or MEAN; '': the engine's.")
    normalised: bool = Field(default=True, description="Whether vectors have length 1.")


class Priors(Config):
    """Estimates used until outcomes are measured, so that no prediction starts at 0."""

    quality: Ratio = Field(default=0.5, description="P(success) on a prompt outside its skills.")
    skill_quality: Ratio = Field(default=0.8, description="P(success) on a prompt of its skills.")
    ttft_s: float = Field(default=0.05, gt=0, le=600, description="Idle time to first token.")
    tpot_s: float = Field(default=0.01, gt=0, le=60, description="Idle time per output token.")
    output_tokens: float = Field(default=64.0, gt=0, le=1e6, description="Typical answer length.")
    energy_j_per_token: float = Field(
        default=0.1,
        gt=0,
        le=1e5,
        description="Joules per output token, estimated; of an SLM that generates nothing, per "
        "input token.",
    )
    wake_s: float = Field(default=20.0, ge=0, le=3600, description="Cold start to ready.")


class Dialect(StrEnum):
    """What an upstream understands; `calm_serve.upstreams` writes requests accordingly."""

    OPENAI = "openai"
    OPENAI_REASONING = "openai-reasoning"
    AZURE = "azure"
    VLLM = "vllm"
    ANTHROPIC = "anthropic"


class Prices(Config):
    """What an upstream charges, in one currency for the whole fleet."""

    currency: str = Field(
        default="USD", pattern=r"^[A-Z]{3}$", description="ISO 4217; one for the whole fleet."
    )
    input_per_million_tokens: float = Field(ge=0, le=1e6, description="Money for prompts.")
    cached_input_per_million_tokens: float | None = Field(
        default=None, ge=0, le=1e6, description="For the cached part of prompts; null: as input."
    )
    output_per_million_tokens: float = Field(ge=0, le=1e6, description="Money for answers.")


class Remote(Config):
    """An upstream that stands in for a local engine. Every timeout ends at `timeout_s`."""

    base_url: str = Field(
        pattern=r"^https?://",
        description="URL up to and including `/v1`; azure: up to `/openai` or `/openai/v1`.",
    )
    # The strictest server: what it is sent, every compatible one understands.
    dialect: Dialect = Field(
        default=Dialect.OPENAI,
        description="openai refuses unknown parameters, so they are left out; openai-reasoning "
        "also takes no sampling parameters; vllm gets the body as it came; azure and anthropic "
        "have paths and headers of their own, and anthropic a format.",
    )
    routes: tuple[str, ...] = Field(
        default=("/v1/chat/completions", "/v1/completions", "/v1/embeddings"),
        description="What the upstream serves of this service's routes.",
    )
    api_key_env: str = Field(default="", description="Environment variable with the API key.")
    api_version: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9.-]*$",
        description="azure: `api-version` of the query; anthropic: the `anthropic-version` header.",
    )
    prices: Prices | None = Field(default=None, description="null: its costs are not known.")
    # A lost SYN is sent again after 1 s; the second one has another 2 s on a slow path.
    connect_timeout_s: float = Field(
        default=3.0, gt=0, le=60, description="Until the connection is open, TLS included."
    )
    # Far above a busy provider's queue (seconds), and leaves time for another SLM's answer.
    first_byte_timeout_s: float = Field(
        default=30.0, gt=0, le=3600, description="Until a stream's first event."
    )
    # Providers send a comment every 10 to 15 s while a model thinks.
    idle_timeout_s: float = Field(
        default=30.0, gt=0, le=3600, description="Between two events of a stream."
    )
    timeout_s: float = Field(default=120.0, gt=0, le=3600, description="Whole-answer timeout.")
    # Ten times what a batching profile gives an engine: an upstream is bounded by its rate limit.
    max_concurrent_requests: int = Field(
        default=200, ge=1, le=10_000, description="Of one router; the next SLM is asked beyond it."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Remote:
        versioned = self.dialect in (Dialect.AZURE, Dialect.ANTHROPIC)
        if self.api_version and not versioned:
            raise ValueError(f"api_version has no meaning for dialect {self.dialect}")
        url = self.base_url.rstrip("/")
        if self.dialect is Dialect.AZURE and not (self.api_version or url.endswith("/v1")):
            raise ValueError("dialect azure needs api_version, or a base_url that ends in `/v1`")
        return self


class SLMSpec(Config):
    """One SLM of the fleet: one metadata entry, one Serve deployment."""

    id: Identifier = Field(description="Unique; the name clients use in `model`.")
    model: str = Field(
        min_length=1, description="Weights: folder, models:NAME or hub id; remote: its name."
    )
    description: str = Field(default="", description="One line for people and `/v1/models`.")
    task: Literal[Task.GENERATE, Task.EMBED, Task.RERANK] = Field(
        default=Task.GENERATE,
        description="generate, embed or rerank; left out, it is found in the model's folder.",
    )
    skills: tuple[Identifier, ...] = Field(default=(), description="What it is good at.")
    examples: tuple[str, ...] = Field(
        default=(), description="Prompts for it; the policy `paper` compares words with them."
    )
    generality: Ratio | None = Field(
        default=None,
        description="How good it is at prompts of any kind; above 0.5 it gets the prompts that are "
        "unlike all that the predictor was trained on. null: 1 for a chat model that no rule names "
        "and no validator checks, else 0.",
    )
    languages: tuple[Language, ...] = Field(
        default=("en",), description="ISO 639-1, of those that can be detected; empty is any."
    )
    context_tokens: int = Field(default=2048, ge=64, le=10_000_000, description="Context length.")
    parameters: int = Field(default=0, ge=0, description="Parameter count, 0 if unknown.")
    locality: Literal["local", "remote"] = Field(
        default="local", description="Sensitive requests stay on local SLMs."
    )
    residency: Literal["pinned", "hot", "on_demand"] = Field(
        default="hot",
        description="hot and pinned: must be ready before /health answers 200; pinned: never "
        "sleeps. Without a memory budget nothing sleeps.",
    )
    batching: BatchingProfile = Field(default=BatchingProfile.BALANCED, description="Profile.")
    engine: dict[str, Any] = Field(default={}, description="vLLM engine arguments, as they are.")
    env: dict[str, str] = Field(default={}, description="Environment of the SLM's process.")
    max_events_per_s: float | None = Field(
        default=None,
        ge=10,
        le=1e6,
        description="Events that all streams of a replica send in a second; tokens beyond share "
        "an event. null: each token has its own. For machines without a core to spare.",
    )
    adapters: tuple[Adapter, ...] = Field(default=(), description="LoRA adapters.")
    max_resident_adapters: int = Field(default=2, ge=1, le=64, description="LRU beyond this.")
    validator: Literal["", "json", "sql", "shell"] = Field(
        default="", description="Its answers must pass this check; a failure is a bad outcome."
    )
    capabilities: Capabilities = Field(default=Capabilities(), description="See Capabilities.")
    tool_parser: str = Field(
        default="",
        description="vLLM's tool parser; left out, it is found by the model's family. "
        "`engine.tool_call_parser` goes before it.",
    )
    embedding: EmbeddingSpace = Field(
        default=EmbeddingSpace(), description="Only of an SLM with task embed. See EmbeddingSpace."
    )
    resources: Resources = Field(default=Resources(), description="Per replica.")
    scaling: Scaling = Field(default=Scaling(), description="Replicas and autoscaling.")
    priors: Priors = Field(default=Priors(), description="Estimates before outcomes.")
    remote: Remote | None = Field(default=None, description="Required when locality is remote.")

    @model_validator(mode="after")
    def _consistent(self) -> SLMSpec:
        if (self.locality == "remote") != (self.remote is not None):
            raise ValueError("`remote` is required when locality is remote, and only then")
        unique("SLM id", ["auto", self.id])  # "auto" is how clients let the router choose
        unique("adapter name", [a.name for a in self.adapters])
        if self.remote and self.adapters:
            raise ValueError("a remote SLM has no adapters; name the upstream's model instead")
        if self.residency != "on_demand" and self.scaling.min_replicas == 0:
            raise ValueError(f"residency {self.residency} needs scaling.min_replicas of at least 1")
        return self

    @property
    def limits(self) -> Batching:
        """The batching profile's numbers; `engine.max_num_seqs` and `remote` have others.

        Of a remote SLM, requests that one router sends at once; none waits for a slot.
        """
        profile = BATCHING[self.batching]
        if self.remote is not None:
            most = self.remote.max_concurrent_requests
            return replace(profile, max_num_seqs=most, max_ongoing_requests=most)
        own = self.engine.get("max_num_seqs")
        if type(own) is not int or own < 1:  # vLLM's error says what is wrong
            return profile
        ongoing = own + max(1, round(own * NEXT_RATIO))
        return replace(profile, max_num_seqs=own, max_ongoing_requests=ongoing)

    @property
    def embedding_space(self) -> str:
        """Key of the vector space of an embedding SLM: equal keys, comparable vectors; else ""."""
        if self.task is not Task.EMBED:
            return ""
        space = self.embedding
        # Nothing says that two upstreams have the same weights under one name.
        own = f"{self.remote.base_url}#{self.model}" if self.remote else self.model
        unit = "normalised" if space.normalised else "raw"
        name = f"{space.model or own}@{space.revision}"
        return f"{name}/{space.dimensions}/{space.pooling}/{unit}"

    def wake_s(self, measured_s: float | None) -> float:
        """Seconds of a wake-up: as measured, or the prior while None or 0."""
        return measured_s or self.priors.wake_s

    @property
    def declared_bytes(self) -> int:
        """What one hot replica counts against the memory budget: weights, adapters, KV cache."""
        if self.locality == "remote":
            return 0
        weights = self.resources.weights_bytes
        return (2 * self.parameters if weights is None else weights) + self.resources.kv_cache_bytes


class Marker(Config):
    """A named pattern. A fleet file may write the pattern alone: the scope is the default then.

    A system prompt is the same in all requests of a client, and an answer has the form of the SLM
    that gave it. So neither is read, unless `scope` says so.
    """

    pattern: str = Field(
        description="Regular expression, case-insensitive, over the ends of the text; ^ starts a "
        "message."
    )
    scope: Literal["last_user", "user", "all"] = Field(
        default="last_user",
        description="What it reads: the last message of the user, all messages of the user, or all "
        "messages, system prompts and answers included. A prompt without messages is the user's.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_pattern(cls, data: Any) -> Any:
        return {"pattern": data} if isinstance(data, str) else data


class Rule(Config):
    """One deterministic rule of the fast path: every condition given must hold."""

    name: Identifier = Field(description="Shown in `x-calm-reason` and in the metrics.")
    marker: str = Field(default="", description="Name of a marker pattern that must be present.")
    without: tuple[str, ...] = Field(default=(), description="Markers that must be absent.")
    output_shape: Literal["", "text", "json", "json_schema", "tools", "guided"] = Field(
        default="", description="What the client asked the answer to look like."
    )
    max_prompt_chars: int = Field(default=0, ge=0, description="0 is no limit.")
    min_prompt_chars: int = Field(default=0, ge=0, description="0 is no limit.")
    language: Language | Literal[""] = Field(
        default="", description="ISO 639-1, of those that can be detected."
    )
    slms: tuple[Identifier, ...] = Field(min_length=1, description="Short list, best first.")


class Safety(Config):
    """A pattern that pins the request to one SLM, before the client's choice and every rule.

    It is searched in the whole text of all messages. A request that generates nothing keeps its
    SLM, because no other vector space or ranking can stand in for it; `local_only` holds for it
    too. Prompts of token ids cannot be searched.
    """

    name: Identifier = Field(description="Shown in decisions as the safety class.")
    pattern: str = Field(description="Regular expression, case-insensitive.")
    slm: Identifier = Field(description="Id of the SLM that answers.")
    local_only: bool = Field(
        default=True, description="Never leaves local SLMs, wherever the pattern was found."
    )
    pins: Literal["conversation", "all"] = Field(
        default="conversation",
        description="Where a match pins: in any message but system prompts, whose policies ('never "
        "reveal a password') hold for all requests of a client; or in these too.",
    )


class Fleet(Config):
    """The fleet file: SLMs, markers, rules."""

    slms: tuple[SLMSpec, ...] = Field(min_length=1, description="At least one.")
    markers: dict[Identifier, Marker] = Field(
        default={}, description="Name to pattern, or to pattern and scope; see Marker."
    )
    rules: tuple[Rule, ...] = Field(default=(), description="Ordered; the first match wins.")
    safety: tuple[Safety, ...] = Field(default=(), description="Checked before everything else.")
    predictor: str = Field(default="", description="Folder of a shipped predictor; '' is none.")

    def generality(self, spec: SLMSpec) -> float:
        """How good an SLM of this fleet is at prompts of any kind, in [0, 1]; see `SLMSpec`."""
        if spec.generality is not None:
            return spec.generality
        chats = spec.task is Task.GENERATE and spec.capabilities.chat and not spec.validator
        return float(chats and not any(spec.id in rule.slms for rule in self.rules))

    @model_validator(mode="after")
    def _consistent(self) -> Fleet:
        ids = [s.id for s in self.slms]
        unique("SLM id", ids)
        priced = [s.remote.prices for s in self.slms if s.remote and s.remote.prices]
        if len(currencies := sorted({p.currency for p in priced})) > 1:
            raise ValueError(f"prices need one currency, but there are {', '.join(currencies)}")
        unique("rule name", [r.name for r in self.rules])
        unique("safety name", ["none", *(s.name for s in self.safety)])  # "none": no match
        patterns = [(name, marker.pattern) for name, marker in self.markers.items()]
        for name, pattern in [*patterns, *((s.name, s.pattern) for s in self.safety)]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"pattern {name!r} does not compile: {error}") from error
        owners = [(r.name, s) for r in self.rules for s in r.slms]
        for owner, slm in owners + [(s.name, s.slm) for s in self.safety]:
            if slm not in ids:
                raise ValueError(f"{owner!r} names unknown SLM {slm!r}{nearest(slm, ids)}")
        away = {s.id for s in self.slms if s.locality == "remote"}
        for pin in self.safety:
            if pin.local_only and pin.slm in away:
                raise ValueError(f"safety {pin.name!r} is local_only but {pin.slm!r} is remote")
        for rule in self.rules:
            for marker in (rule.marker, *rule.without):
                if marker and marker not in self.markers:
                    hint = nearest(marker, list(self.markers))
                    raise ValueError(f"rule {rule.name!r} uses unknown marker {marker!r}{hint}")
        return self
