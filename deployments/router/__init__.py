"""Router deployment: the HTTP ingress. Owner: router process. Never blocks its event loop.

Takes HTTP requests; sends them to SLM replicas through Serve's handles, and outcomes, feedback and
demand to the knowledge actor. It touches one file, the spool of outcomes.
Public: `deployment.Router`, and `request_router.ReplicaRouter`, which Serve imports by its name.
"""
