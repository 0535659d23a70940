"""The knowledge actor and its clients. Owner: knowledge actor, any. Clients never block.

Takes outcomes, feedback, demand and settings of routers and the launcher; gives topics. The outbox
writes the spool of outcomes. Public: `actor.start_knowledge`, `client.KnowledgeClient`,
`outcome_outbox.OutcomeOutbox`, `registration.Registration`, and `address`, which imports nothing.
Each is imported from its module, so that no process imports what it does not run.
"""
