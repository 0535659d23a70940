"""Clients of other makers, each used as its manual says, against one served fleet."""
