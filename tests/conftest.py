"""Shared by all tiers. With this file here, pytest makes `tests.…` importable from every test."""
