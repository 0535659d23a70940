"""One module per schema, the oldest first. Owner: knowledge actor. May block.

A migration never imports the tables or records of the program: they change, it does not.
"""
