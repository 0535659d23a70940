"""Protocol: versioned records that cross a process or a restart. Owner: any process. Never blocks.

Plain dataclasses and the formats in which they are written. It imports neither SQLAlchemy nor
LightGBM, because every process pays for it.
"""
