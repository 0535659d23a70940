"""Fleet: quality and cost of every model of the reference fleet. Owner: benchmark, which serves
the fleet or uses a running one over HTTP; `fit_predictor` is a command of its own. Blocks.
"""
