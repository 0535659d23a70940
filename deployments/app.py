"""The Serve applications: router, one deployment per SLM, knowledge actor.

    router (HTTP ingress, N replicas) ──► slm-<id> (one deployment per SLM, one engine per replica)
          └──────────────► knowledge actor (detached; outcomes in, predictors out)

`build_app` is one fleet as one application. `build_slm` is a further SLM as an application of its
own: adding it restarts nothing, and the routers receive it from the knowledge actor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from calm_serve.config import (
    ClusterResources,
    Fleet,
    RouterOptions,
    ServeArgs,
    SLMSpec,
    check_resources,
    load_args,
)
from calm_serve.routing import weights_of
from deployments.knowledge.actor import start_knowledge
from deployments.knowledge.registration import Registration
from deployments.launch import check_engine_arguments
from deployments.router.admission import ADMINISTRATION_SLOTS
from deployments.router.deployment import Router
from deployments.wire import deployment_name

APP_NAME = "calm"
ROUTING_STATS_PERIOD_S = 1.0
HEALTH_PERIOD_S = 2.0


def build_app(args: dict[str, Any]) -> serve.Application:
    """Build the application from serve_config.yaml's `args`. Raises ConfigError."""
    typed, fleet = load_args(args, Path.cwd())
    check_engine_arguments(fleet)
    _check_cluster(fleet, typed.router.total_cpus)
    # The actor's working directory differs, so paths are made absolute here.
    learning = typed.learning.model_copy(
        update={"state_dir": str(Path(typed.learning.state_dir).expanduser().absolute())}
    )
    typed = typed.model_copy(update={"learning": learning})
    # Started before the SLMs, so that it receives their start-up reports.
    knowledge = start_knowledge(APP_NAME, fleet, learning)
    knowledge.configure_goals.remote(typed.goals)
    weights = weights_of(typed.goals)
    knowledge.configure_residency.remote(
        typed.residency, weights.latency_per_s, weights.energy_per_j
    )
    drain_s = typed.router.request_timeout_s
    handles = {spec.id: bind_slm(spec, APP_NAME, drain_s) for spec in fleet.slms}
    return bind_router(typed, fleet, handles)


def build_slm(args: dict[str, Any]) -> serve.Application:
    """Build one SLM as an application that joins the one named by `joins` (default calm).

    The rest of `args` is the SLM's entry as in a fleet file. Raises ConfigError.
    """
    data = dict(args)
    app_name = str(data.pop("joins", APP_NAME))
    fleet = load_args({"fleet": {"slms": [data]}}, Path.cwd())[1]
    check_engine_arguments(fleet)
    _check_cluster(fleet)
    (spec,) = fleet.slms
    return (
        serve.deployment(Registration)
        .options(name="registration", ray_actor_options={"num_cpus": 0})
        .bind(spec, app_name, bind_slm(spec, app_name))
    )


def bind_router(
    args: ServeArgs, fleet: Fleet, handles: dict[str, DeploymentHandle]
) -> serve.Application:
    """Return the ingress.

    The router itself refuses requests for SLMs beyond `max_ongoing_requests`. Serve, behind whose
    bound every request waits without an answer, gets a higher one, so that health, metrics and
    administration answer while generation is saturated.
    """
    options: RouterOptions = args.router
    return (
        serve.deployment(Router)
        .options(
            name="router",
            num_replicas=options.replicas,
            max_ongoing_requests=options.max_ongoing_requests + ADMINISTRATION_SLOTS,
            ray_actor_options={"num_cpus": options.num_cpus},
            health_check_period_s=HEALTH_PERIOD_S,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=options.request_timeout_s,
        )
        .bind(args, fleet, APP_NAME, handles)
    )


def bind_slm(
    spec: SLMSpec, app_name: str, drain_s: float = RouterOptions().request_timeout_s
) -> serve.Application:
    """Return the deployment of one SLM; it reports to the knowledge actor of `app_name`.

    A replica that stops has `drain_s` seconds for its running requests: the longest allowed one.
    """
    # Imported here, because the router imports this module and needs none of it.
    from deployments.slm.deployment import slm_class
    from deployments.slm.remote import RemoteSLM

    remote = spec.locality == "remote"
    target = RemoteSLM if remote else slm_class(spec.max_resident_adapters)
    limits = spec.limits
    return (
        serve.deployment(target)
        .options(
            name=deployment_name(spec.id),
            ray_actor_options=_actor_options(spec),
            **_scaling(spec),
            max_ongoing_requests=limits.max_ongoing_requests,
            max_queued_requests=limits.max_queued_requests,
            request_router_config=RequestRouterConfig(
                request_router_class="deployments.router.request_router:ReplicaRouter",
                request_routing_stats_period_s=ROUTING_STATS_PERIOD_S,
            ),
            health_check_period_s=HEALTH_PERIOD_S,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=drain_s,
        )
        .bind(spec, app_name)
    )


def _scaling(spec: SLMSpec) -> dict[str, Any]:
    scaling = spec.scaling
    if scaling.min_replicas == scaling.max_replicas:
        # With an autoscaler every handle and replica reports its metrics ten times a second.
        return {"num_replicas": scaling.min_replicas}
    config = AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        target_ongoing_requests=scaling.target_ongoing_requests,
        upscale_delay_s=scaling.upscale_delay_s,
        downscale_delay_s=scaling.downscale_delay_s,
        metrics_interval_s=1.0,
        look_back_period_s=5.0,
        policy={"policy_function": "deployments.slm.autoscaling:LoadPolicy"},
    )
    return {"autoscaling_config": config}


def _actor_options(spec: SLMSpec) -> dict[str, Any]:
    if spec.locality == "remote":
        return {"num_cpus": 0.05, "memory": 256 << 20}
    from deployments.slm.environment import process_environment

    resources = spec.resources
    return {
        "num_cpus": resources.num_cpus,
        "num_gpus": resources.num_gpus,
        "memory": int(resources.memory_bytes),
        "runtime_env": {"env_vars": process_environment(spec)},
    }


def _check_cluster(fleet: Fleet, router_cpus: float = 0.0) -> None:
    if not ray.is_initialized():
        return
    total = ray.cluster_resources()
    cluster = ClusterResources(
        total.get("CPU", 0.0), total.get("GPU", 0.0), total.get("memory", 0.0)
    )
    check_resources(fleet, cluster, router_cpus)
