"""Frozen records that the rooms exchange.

Every record is plain data (numbers, strings, tuples), so it can be logged, sent to another process,
replayed and compared. Units are in the names: `_s` seconds, `_ms` milliseconds, `_j` joules,
`_bytes`, `_tokens`, `_ratio` in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Task(StrEnum):
    """What an SLM is asked for; an SLM has exactly one of the first three (`SLMSpec.task`)."""

    GENERATE = "generate"  # text, as chat, completion, response or message
    EMBED = "embed"  # vectors
    RERANK = "rerank"  # relevance of documents to a query
    ANY = "any"  # only a request has it: its tokenizer answers, and every SLM has one


class DecisionPath(StrEnum):
    """Which stage of the decision named the SLM."""

    PINNED = "pinned"  # the client named an SLM or an adapter
    RULE = "rule"  # stage 1: a deterministic rule
    CONVERSATION = "conversation"  # stage 1: the SLM of the conversation's last answer
    SCORED = "scored"  # stage 2: the objective over LightGBM's predictions
    PRIOR = "prior"  # stage 2 with priors only: no predictor has been published yet
    BASELINE = "baseline"  # stage 2 by another selection policy, for comparison
    UNFAMILIAR = "unfamiliar"  # what is known of the SLMs, because the prompt is unfamiliar
    LOAD = "load"  # no text is generated: priors of latency and energy at the present load
    EXPLORED = "explored"  # a logged deviation from the best score, to keep estimates unbiased
    FALLBACK = "fallback"  # the winner failed before its first byte


# Paths that took the best score; the same with exploration; all that chose between SLMs. The other
# paths (rule, conversation, pinned, fallback) had no choice.
BEST_SCORE_PATHS = frozenset((DecisionPath.SCORED, DecisionPath.PRIOR))
SCORED_PATHS = BEST_SCORE_PATHS | {DecisionPath.EXPLORED}
FREE_PATHS = SCORED_PATHS | {DecisionPath.BASELINE, DecisionPath.UNFAMILIAR}

# Spread of a time before it is measured: root mean square of log(measured / predicted). It is the
# middle of the 0.3 to 0.7 of served fleets.
PRIOR_SPREAD = 0.5


class DecisionReason(StrEnum):
    """Why an SLM was chosen; few values, because they are a metric label and a header."""

    REQUESTED = "requested"
    RULE_MATCH = "rule_match"
    SAFETY_PIN = "safety_pin"
    TOOL_LOOP = "tool_loop"
    FOLLOW_UP = "follow_up"
    ONLY_CANDIDATE = "only_candidate"
    BEST_SCORE = "best_score"
    BEST_PRIOR = "best_prior"
    FIRST_LISTED = "first_listed"  # the answer depends on the SLM's tokenizer: always the same one
    UNFAMILIAR = "unfamiliar"  # a generalist, or the operator's `default_slm`
    UNFAMILIAR_NO_GENERALIST = "unfamiliar_no_generalist"  # so the score decided all the same
    EXPLORATION = "exploration"
    BASELINE = "baseline"
    FAILOVER = "failover"


class OutputShape(StrEnum):
    """Form of the answer that the client requested."""

    TEXT = "text"
    JSON = "json"
    JSON_SCHEMA = "json_schema"
    TOOLS = "tools"
    GUIDED = "guided"  # regex, grammar or choice


class Residency(StrEnum):
    """Residency tier of an SLM."""

    HOT = "hot"
    STARTING = "starting"
    ASLEEP = "asleep"
    COLD = "cold"
    DEAD = "dead"


UNKNOWN_LANGUAGE = "und"  # ISO 639-2's code for it

# Ids of `PromptFeatures.buckets`: hashed words from FIRST_WORD on, pairs of words from FIRST_PAIR
# on. Lower ids were those of an earlier layout; they are not used again, so that a record shows the
# layout that it was written in.
FIRST_WORD, WORD_BUCKETS = 1024, 4096
FIRST_PAIR = FIRST_WORD + WORD_BUCKETS
SEEN_BITS = 1 << 16  # of the bitmap of seen words and pairs of words; 8 KiB
# The higher, the fewer prompts are taken from the specialists. In-sample: chosen on the standard
# workload (decision 0042).
DOUBT_POWER = 4


@dataclass(frozen=True, slots=True)
class PromptFeatures:
    """All that a predictor reads of a prompt: numbers, no text."""

    numbers: tuple[float, ...] = ()  # in the order of `requests.NUMBER_NAMES`
    buckets: tuple[int, ...] = ()  # ids of the hashed words present, sorted, unique
    bits: tuple[int, ...] = ()  # the same hashes as indices below SEEN_BITS, sorted, unique


@dataclass(frozen=True, slots=True)
class Novelty:
    """How unlike the prompts of training a prompt is."""

    ratio: float  # share of its words and pairs that no training prompt had, in [0, 1)
    threshold: float  # a prompt above it is unfamiliar

    @property
    def unfamiliar(self) -> bool:
        """Whether predictions for the prompt say little, because nothing like it was trained on."""
        return self.ratio > self.threshold

    def outweighs(self, quality: float) -> bool:
        """Whether the best predicted quality, in [0, 1], is too little for a prompt as new as this.

        Above the threshold every quality is, at half of it one below a sixteenth: unlikely success
        at a prompt that is not quite like those of training is a guess.
        """
        return self.ratio > 0.0 and (self.ratio / self.threshold) ** DOUBT_POWER > min(quality, 1.0)


@dataclass(frozen=True, slots=True)
class GeneralTerms:
    """What is known of an SLM whatever the prompt; it decides about unfamiliar prompts."""

    generality: float  # as in the fleet file
    quality: float  # measured on unfamiliar prompts, or the prior


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """Service level objectives in a request's headers; None where there is none."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class RoutingContext:
    """All that a decision reads of a request: plain fields, no prompt text.

    Built once per request by `requests.ContextBuilder`, in bounded time, without a tokenizer.
    `features` are empty until a prediction or the log needs them (`requests.fill_features`).
    """

    request_id: str
    task: Task = Task.GENERATE
    tokenizer_only: bool = False  # the tokenizer answers; the model does not run
    route: str = ""  # of the engine, such as "/v1/embeddings"; "" when it does not matter
    requested_model: str = "auto"  # or an SLM id, or "slm:adapter"
    prompt_chars: int = 0
    prompt_tokens: int = 0  # estimated, unless the prompt is token ids
    sequence_tokens: int = 0  # of the longest of several prompts; 0: there is one
    is_token_ids: bool = False  # the prompt has no text
    truncates_prompt: bool = False  # the engine cuts the prompt to the context
    max_output_tokens: int | None = None
    output_shape: OutputShape = OutputShape.TEXT
    needs: tuple[str, ...] = ()  # fields of `Capabilities` that the SLM must have
    ignored_fields: tuple[str, ...] = ()  # fields of the body that vLLM does not read any more
    embedding_space: str = ""  # key of the vector space to stay in, "" for any
    turns: int = 1
    stream: bool = False
    language: str = UNKNOWN_LANGUAGE  # ISO 639-1; unknown too where nothing depends on it
    language_ratio: float = 0.0  # probability of `language`
    has_code: bool = False
    safety_class: str = "none"  # or the name of the safety pattern that matched
    markers: tuple[str, ...] = ()  # names of the marker patterns found, sorted
    session_key: str = ""  # hash, "" when the request names no session
    conversation_key: int = 0  # by which its next turn finds the SLM of this one
    previous_slm: str = ""  # SLM of the conversation's last answer, "" when unknown
    history_tokens: int = 0  # estimated, of the prompt up to the end of that answer
    tool_loop: bool = False  # the last messages are results of tools
    follows_up: bool = False  # the user's last message continues one before it
    prefix_family: str = ""  # hash of the first blocks of the prompt
    prefix_chain: tuple[int, ...] = ()  # chained hashes of the prompt's first blocks
    slo: ServiceLevel = ServiceLevel()
    local_only: bool = False
    quality_floor: float = 0.0
    features: PromptFeatures = PromptFeatures()

    @property
    def generates(self) -> bool:
        """Whether the answer is text, so that predictors, goals and learning concern it."""
        return self.task is Task.GENERATE and not self.tokenizer_only

    @property
    def slm_id(self) -> str:
        """Id of the pinned SLM, "" when the router chooses."""
        return "" if self.requested_model in ("", "auto") else self.requested_model.split(":", 1)[0]

    @property
    def adapter(self) -> str:
        """Name of the pinned adapter, "" for none."""
        return self.requested_model.partition(":")[2]


class PromptEnd(NamedTuple):
    """What a replica tells of a prompt that it accepted, so that every router can find it."""

    blocks: tuple[int, ...]  # the last of its prefix chain; the very last one may be partial
    tokens: int  # of the whole prompt, as the router estimated them


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """Last known state of one replica of an SLM."""

    replica_id: str
    node_id: str = ""
    queue_length: int = 0  # requests in the replica, as far as this process knows
    max_queue_length: int = 1
    running: int = 0
    waiting: int = 0
    kv_usage_ratio: float = 0.0
    cached_prefix_ratio: float = 0.0
    memory_bytes: int = 0  # private memory of all its processes
    recent_prompts: tuple[PromptEnd, ...] = ()  # that it accepted, from all routers, oldest first
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SLMState:
    """Live state of one SLM, aggregated over its replicas."""

    slm_id: str
    residency: Residency = Residency.COLD
    replicas: int = 0
    running: int = 0
    waiting: int = 0
    capacity: int = 1  # requests that may run at once, over all replicas
    kv_usage_ratio: float = 0.0
    cached_prefix_ratio: float = 0.0
    ttft_s: float | None = None  # recent mean, None before the first observation
    tpot_s: float | None = None  # of one more request, at the present load
    energy_j_per_token: float | None = None  # of one more request, at the present load
    failure_ratio: float = 0.0
    breaker_open: bool = False
    wake_s: float = 0.0  # measured time from start to ready
    age_s: float = 0.0
    calibration_factor: float = 1.0  # recent successes over predicted ones; multiplies P(success)
    in_flight: int = 0  # requests in all SLMs, as far as this process knows
    ttft_ratio: float = 1.0  # measured over analytic TTFT at the present load
    ttft_spread: float = PRIOR_SPREAD  # of log(measured / predicted)
    e2e_spread: float = PRIOR_SPREAD
    unfamiliar_answers: float = 0.0  # labelled answers to unfamiliar prompts, of the last ones
    unfamiliar_quality: float = 0.0  # their mean label

    @property
    def load_ratio(self) -> float:
        """Running and waiting requests per slot; above 1 requests queue."""
        return (self.running + self.waiting) / max(self.capacity, 1)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Prediction of one SLM for one request."""

    slm_id: str
    success_ratio: float  # P(success | prompt, SLM)
    output_tokens: float
    ttft_s: float
    tpot_s: float
    energy_j: float
    # Standard deviations of log(measured / predicted), for the probability of missing an SLO.
    ttft_spread: float = PRIOR_SPREAD
    e2e_spread: float = PRIOR_SPREAD

    @property
    def e2e_s(self) -> float:
        """Predicted end-to-end latency in seconds."""
        return self.ttft_s + self.tpot_s * max(self.output_tokens - 1.0, 0.0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One SLM in a decision: excluded by a filter, or scored, with the terms of its score."""

    slm_id: str
    excluded_by: str = ""  # name of the filter, "" when none excluded it
    prediction: Prediction | None = None
    quality: float = 0.0
    latency: float = 0.0
    energy: float = 0.0
    switching: float = 0.0
    score: float = 0.0
    general: GeneralTerms | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of a decision, in quality points per unit."""

    latency_per_s: float
    energy_per_j: float
    switching: float
    quality: float = 1.0  # above 1 while a quality goal is missed
    # Cost of the seconds beyond `after` only: for p95 goals, which concern slow requests alone.
    late_ttft_per_s: float = 0.0
    late_ttft_after_s: float = 0.0
    late_e2e_per_s: float = 0.0
    late_e2e_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GoalStatus:
    """State of one target. None: unknown, because of too few requests."""

    name: str  # field of Goals
    target: float
    measured: float | None  # quality: predicted; power: this router's, times the routers
    held: bool | None  # measured within a tenth of the target
    feasible: bool | None  # by the predictions some choice holds it without missing stronger goals
    samples: int


@dataclass(frozen=True, slots=True)
class PredictorVersion:
    """Versions of the champion and of what replaces its prior."""

    champion: str = ""  # version of the champion's artifact; "prior" before one was published
    cold_start: str = ""  # version of the boosters of cold-start SLMs, "" without any
    shipped: bool = False  # the champion came with the fleet; nothing was learned here yet

    def __str__(self) -> str:
        """One text for headers and dashboards."""
        parts = (self.champion, self.cold_start, "shipped" if self.shipped else "")
        return "+".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions behind a decision: equal versions and equal input give the same decision."""

    predictor: PredictorVersion = PredictorVersion()
    goals: str = ""
    fleet: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """The chosen SLM, and all that is needed to explain and replay the choice."""

    decision_id: str
    slm_id: str
    adapter: str
    path: DecisionPath
    reason: DecisionReason
    rule: str  # name of the rule that matched, "" otherwise
    propensity: float  # probability with which this SLM was chosen, in (0, 1]
    candidates: tuple[Candidate, ...]
    ranking: tuple[str, ...]  # SLM ids that passed every filter, best first
    context: RoutingContext
    versions: Versions
    decided_in_s: float = 0.0
    weights: Weights | None = None  # None where no score was needed
    preferred: str = ""  # SLM that would have been chosen had all been hot
    # Further SLMs that passed every filter, in the fleet's order. They have no score, because a
    # rule named others; `ModelSelector.rank_unscored` orders them when a failover needs one.
    unscored: tuple[str, ...] = ()
    novelty: Novelty | None = None  # None: the predictor has no bitmap, or the prompt no words


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Facts that only the engine knows of one answer; sent with the SLM's last item."""

    replica_id: str = ""  # the replica that answered
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_s: float | None = None  # wait inside the engine; None when it reported nothing
    ttft_s: float = 0.0
    energy_j: float | None = None  # None when the engine reported nothing
    energy_source: str = "estimate"  # "counter", "rapl" or "estimate"
    running: int = 0
    waiting: int = 0
    kv_usage_ratio: float = 0.0


# Sources of quality signals: a person or test that saw the answer; a check of its form.
FEEDBACK = "feedback"
VALIDATOR_PREFIX = "validator:"


@dataclass(frozen=True, slots=True)
class QualitySignal:
    """One statement about an answer's quality, with its source."""

    source: str  # "feedback", "validator:json", "validator:sql", "validator:label", ...
    value: float  # in [0, 1]
    at: float = 0.0  # Unix time in seconds


@dataclass(frozen=True, slots=True)
class LoadAtDecision:
    """The load at a decision, its request included."""

    running: float  # requests per replica of the SLM
    in_flight: int  # requests inside all SLMs
    ttft_ratio: float  # measured over analytic TTFT, as the prediction had it


@dataclass(frozen=True, slots=True)
class LoggedCandidate:
    """One candidate of a choice in the log: its prediction, and what else its score depends on."""

    prediction: Prediction
    hot: bool  # False where the score had a switching cost
    calibration_factor: float
    general: GeneralTerms | None = None


@dataclass(frozen=True, slots=True)
class DecisionTerms:
    """Input of a choice among predicted candidates; enough to replay it."""

    candidates: tuple[LoggedCandidate, ...]  # the chosen one first
    weights: Weights
    left_out: int = 0  # further candidates that are not logged
    slo: ServiceLevel = ServiceLevel()
    quality_floor: float = 0.0  # of the request; the goals have their own


@dataclass(frozen=True, slots=True)
class ShadowChoice:
    """Choice of a challenger in the shadow for one request."""

    version: str  # of the challenger's artifact
    slm_id: str
    agrees: bool  # with the champion's best choice
    success_ratio: float  # its P(success) of the SLM that was chosen
    gain: float  # score of its choice less that of the champion's, both by its own predictions


@dataclass(frozen=True, slots=True)
class DecisionSummary:
    """The part of a decision that its outcome logs."""

    path: str = ""  # DecisionPath
    reason: str = ""  # DecisionReason
    rule: str = ""
    propensity: float = 1.0
    versions: Versions = Versions()
    predicted: Prediction | None = None  # of the SLM that answered; None for a rule
    load_features: tuple[float, ...] = ()  # in the order of `prediction.LOAD_NAMES`
    load: LoadAtDecision | None = None
    terms: DecisionTerms | None = None  # None unless it chose among predictions
    preferred: str = ""  # SLM that would have been chosen had all been hot; "" without a budget
    preferred_hot: bool | None = None
    shadow: ShadowChoice | None = None
    novelty: Novelty | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one request as the router measured them; None where it did not get so far."""

    ttft_s: float | None = None
    e2e_s: float | None = None
    tpot_s: float | None = None
    decision_s: float = 0.0
    cold: bool = False  # it waited for a wake-up, so its times are not those of an awake SLM


@dataclass(frozen=True, slots=True)
class Cost:
    """Money that an upstream charges for one request."""

    amount: float
    currency: str  # ISO 4217; the same for all prices of a fleet


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """One SLM that was asked, or could have been, and gave no answer."""

    slm_id: str
    failure: str  # kind: one of `upstreams.FailureKind`, or "asleep"
    took_s: float = 0.0  # since the request was sent to it
    cost: float | None = None  # what it charged all the same, in the outcome's currency


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one request: one durable row. `outcome_id` makes delivery idempotent."""

    outcome_id: str  # equals the decision's id
    slm_id: str  # SLM that answered, else the chosen one; "" when none could be chosen
    at: float = 0.0  # Unix time in seconds
    adapter: str = ""
    status: str = "ok"  # "ok", "error", "cancelled", "rejected"
    http_status: int = 200
    failure: str = ""  # kind of what the client was told, "" when it got an answer
    failed_attempts: tuple[FailedAttempt, ...] = ()  # in order; the last ones of many
    cost: float | None = None  # of all attempts; None: no upstream reported what it charges for
    currency: str = ""  # of the costs
    retries: int = 0
    predicted_replica: str = ""
    task: str = ""  # label the client gave (x-calm-task)
    decision: DecisionSummary = DecisionSummary()
    features: PromptFeatures = PromptFeatures()
    timing: Timing = Timing()
    engine: EngineFacts = EngineFacts()
    signals: tuple[QualitySignal, ...] = ()
    prompt_text: str | None = None  # only with `learning.keep_prompts`
