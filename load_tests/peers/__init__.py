"""Other gateways, run beside ours."""
