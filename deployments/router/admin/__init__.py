"""Administration endpoints of the router. Owner: router process. Never blocks its event loop."""
