"""The knowledge actor and its clients. Owner: knowledge actor, any. Clients never block.

Takes outcomes, feedback, demand and settings of routers and the launcher; gives topics. The outbox
writes the spool of outcomes. `address` imports nothing; import the other modules where needed.
"""
