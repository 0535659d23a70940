"""Arbitrary but valid inputs of a decision."""

from __future__ import annotations

from random import Random

from hypothesis import strategies as st

from calm_serve.config import SLMSpec
from calm_serve.config.fleet import Capabilities
from calm_serve.requests.features import BUCKETS, NUMBER_NAMES
from calm_serve.testing import make_context, make_spec, make_state
from calm_serve.types import FIRST_WORD, OutputShape, PromptFeatures, Residency, ServiceLevel, Task

RATIO = st.floats(0.0, 1.0)
MARKERS = ("code", "sql", "math")
LANGUAGES = ("en", "de", "und")
SEEDS = st.integers(0, 10_000).map(Random)  # cheaper than drawing every number

CONTEXTS = st.builds(
    make_context,
    prompt_chars=st.integers(0, 1_000_000),
    prompt_tokens=st.integers(1, 250_000),
    max_output_tokens=st.none() | st.integers(1, 2**31 - 1),
    output_shape=st.sampled_from(OutputShape),
    language=st.sampled_from(LANGUAGES),
    task=st.sampled_from(Task),
    route=st.sampled_from(["", "/v1/chat/completions", "/v1/messages"]),
    needs=st.lists(st.sampled_from(sorted(Capabilities.model_fields)), unique=True).map(
        lambda n: tuple(sorted(n))
    ),
    ignored_fields=st.sampled_from([(), ("functions",)]),
    embedding_space=st.sampled_from(["", "example/model@/0//normalised"]),
    sequence_tokens=st.integers(0, 250_000),
    is_token_ids=st.booleans(),
    truncates_prompt=st.booleans(),
    markers=st.lists(st.sampled_from(MARKERS), unique=True).map(lambda m: tuple(sorted(m))),
    requested_model=st.sampled_from(["auto", "small", "small:sql", "other:sql"]),
    local_only=st.booleans(),
    quality_floor=RATIO,
    slo=st.builds(
        ServiceLevel,
        ttft_ms=st.none() | st.floats(0.0, 1e5),
        tpot_ms=st.none() | st.floats(0.0, 1e5),
        deadline_s=st.none() | st.floats(0.0, 3600.0),
    ),
    features=SEEDS.map(
        lambda r: PromptFeatures(
            tuple(r.uniform(0.0, 20.0) for _ in NUMBER_NAMES),
            tuple(sorted(r.sample(range(FIRST_WORD, FIRST_WORD + BUCKETS), r.randrange(60)))),
        )
    ),
)

STATES = st.builds(
    make_state,
    residency=st.sampled_from(Residency),
    replicas=st.integers(0, 8),
    running=st.integers(0, 500),
    waiting=st.integers(0, 500),
    capacity=st.integers(0, 500),
    kv_usage_ratio=RATIO,
    cached_prefix_ratio=RATIO,
    ttft_s=st.none() | st.floats(1e-4, 60.0),
    tpot_s=st.none() | st.floats(1e-5, 10.0),
    energy_j_per_token=st.none() | st.floats(0.0, 1e3),
    failure_ratio=RATIO,
    breaker_open=st.booleans(),
    wake_s=st.floats(0.0, 600.0),
)


def specs(slm_id: str = "small") -> st.SearchStrategy[SLMSpec]:
    """Specs of one id: local or remote, hot or not, with and without capabilities."""

    def build(
        remote: bool, cold: bool, can: bool, languages: list[str], tokens: int, task: Task
    ) -> SLMSpec:
        place = {"locality": "remote", "remote": {"base_url": "http://x/v1"}} if remote else {}
        tier = {"residency": "on_demand", "scaling": {"min_replicas": 0}} if cold else {}
        return make_spec(
            slm_id,
            languages=languages,
            context_tokens=tokens,
            skills=["sql"] if can else [],
            capabilities=dict.fromkeys(Capabilities.model_fields, can),
            task=task,
            adapters=[{"name": "sql", "path": "x"}] if can and not remote else [],
            **place,
            **tier,
        )

    return st.builds(
        build,
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.lists(st.sampled_from(["en", "de"]), unique=True),
        st.integers(64, 100_000),
        st.sampled_from([Task.GENERATE, Task.GENERATE, Task.EMBED, Task.RERANK]),
    )
