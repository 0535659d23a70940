"""Plan: rules, filters, scorers and the objective choose the SLM."""
