"""The knowledge actor and its clients. Owner: knowledge actor, any. Clients never block.

`address` alone is light; import the others where they are needed.
"""
