"""The edge: what Ray Serve and vLLM run. Owner and "may block": see README.md, by room.

Public: `app.build_app` and `app.build_slm`, which a Serve config names, and `python -m
deployments.serve`.
"""
