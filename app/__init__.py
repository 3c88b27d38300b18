"""Proctor runs long AI agent evaluations and never loses one."""

import os

# gRPC writes past the logs to stderr, of forks and of channels that end; it reads this while it is imported
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
