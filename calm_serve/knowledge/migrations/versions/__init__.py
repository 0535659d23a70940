"""One module per schema, the oldest first. Owner: knowledge actor. May block.

A migration imports no tables or records of the program: these change, a migration must not.
"""
