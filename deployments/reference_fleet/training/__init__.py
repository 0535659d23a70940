"""Training of models, adapters and int8 copies, and their cards. Owner: command line. May block.

One process per model, for minutes. The only room that imports torch. Public: the commands
`train`, `lora`, `quantise` and `cards`; nothing is imported from here.
"""
