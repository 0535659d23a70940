"""Metrics: catalogue, exporters, dashboard. Owner: router, SLM replica. Never blocks.

Takes outcomes, the document of GET /v1/fleet and the host's counters; gives Ray's metrics and the
text of `/metrics`. Public: `catalogue.Metric`, `exporters.RouterMetrics` and
`render_fleet_metrics`, `host.HostMonitor`, `ProcessTreeCpu` and `host_cpu_s`.
"""
