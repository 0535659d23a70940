"""Router deployment: the HTTP ingress. Owner: router process. Never blocks its event loop."""
