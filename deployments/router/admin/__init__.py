"""Administration endpoints of the router. Owner: router process. Never blocks its event loop.

Each answers from this router's memory; changes go through the knowledge actor to all routers.
Public: `Operations`, `GoalsEndpoint`, `PredictorsEndpoint`, `ResidencyEndpoint`, each from its
module.
"""
