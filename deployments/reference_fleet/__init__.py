"""Reference fleet: five small specialists and one generalist, trained from scratch.

Owner: command line and benchmarks; a running service reads only its weights, `models/` and
`predictor/`. `corpora` makes the data, `training` the weights, `grading` the scores. May block.
"""
