"""Reference fleet: its corpora, training and grading. Owner: command line. May block.

Five small specialists and one generalist, trained from scratch. A running service reads only the
weights, `models/` and `predictor/`. `corpora` makes the data, `training` the weights, `grading` the
scores. Public: the folders in `paths`; `python -m` commands in `training` and `grading`.
"""
