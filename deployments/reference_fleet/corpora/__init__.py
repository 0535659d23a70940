"""Corpora: public data sets and templates as training streams and held-out sides.

Owner: command line (training and building `eval/`); the benchmarks use `phrasing` and
`adapter_schemas`. Readers block on files; nothing is downloaded, nothing imports torch.
"""
