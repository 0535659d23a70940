"""Command line `calm`. Owner: command line. May block.

Takes arguments, prints text. Reads configuration, predictor, log and table files, and speaks HTTP
to a running service; commands here need neither Ray nor vLLM. The entry point is `main.main`.
"""
