"""One module per schema, the oldest first. Owner: knowledge actor. May block.

A migration imports no tables or records of the program, because these change and it must not.
"""
