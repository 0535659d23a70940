"""Corpora: training streams and held-out sides from data sets. Owner: command line. May block.

Used for training and for building `eval/`; the benchmarks use `phrasing` and `adapter_schemas`.
Readers block on files; nothing is downloaded, nothing imports torch.
Public: what `training` and `grading` read, `examples` first; a module for each kind of data.
"""
