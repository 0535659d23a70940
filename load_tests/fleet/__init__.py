"""What every model of the fleet answers, and what it costs, as served."""
