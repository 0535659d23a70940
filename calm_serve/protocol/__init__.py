"""Protocol: versioned records that cross a process or a restart. Owner: any process. Never blocks.

Takes and gives dataclasses and bytes; touches nothing else. It imports neither SQLAlchemy nor
LightGBM, because every process imports it.
"""
