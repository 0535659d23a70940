"""Reference fleet: five small specialists and one generalist, trained from scratch."""
