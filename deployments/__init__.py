"""The edge: what Ray Serve and vLLM run. Owner and "may block": see README.md, by room."""
