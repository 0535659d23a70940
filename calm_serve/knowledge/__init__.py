"""Knowledge: a durable log of outcomes, and predictors that are better than the last."""
