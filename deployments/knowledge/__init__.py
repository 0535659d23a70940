"""The knowledge actor and the ways to it. Owner: `actor` the actor, the rest its clients.

`address` alone is light; import the others where they are needed.
"""
