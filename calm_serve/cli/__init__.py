"""Command line: `calm`. Owner: command line. May block.

Commands here need neither Ray nor vLLM. The entry point is `main.main`.
"""
