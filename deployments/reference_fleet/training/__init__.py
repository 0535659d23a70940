"""Training: models, adapters and int8 copies, and their model cards.

Owner: command line, one process per model, for minutes. Blocks. The only room that imports torch.
"""
