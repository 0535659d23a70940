"""SLM deployment: an engine or a remote upstream. Owner: SLM replica. Blocks at its start only.

Imports nothing of learning or of the knowledge service. Public: `deployment.slm_class`,
`remote.RemoteSLM`, `environment.process_environment`, and `autoscaling.ColdTierPolicy`, which
Serve imports by its name.
"""
