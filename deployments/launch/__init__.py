"""What runs before Ray: checks, ports, the proxy's program. Owner: launcher. May block.

Takes the validated fleet, gives errors, environment variables and a launcher script. Binds sockets
on this machine and writes to a temporary folder; imports neither Ray nor vLLM.
"""

from deployments.launch.engine_arguments import check_engine_arguments
from deployments.launch.haproxy import write_launcher
from deployments.launch.ports import PortClaim

__all__ = [
    "PortClaim",
    "check_engine_arguments",
    "write_launcher",
]
