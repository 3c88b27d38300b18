"""Proctor runs long AI agent evaluations and never loses one."""

import os

# gRPC writes past the logs to stderr, of forks and of channels that end; it reads this while it is imported
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

# gcsfs reads this while it is imported: unless told not to, it asks by gRPC what kind a bucket is before each operation, and
# never remembers that it got no answer, so that each takes 40 to 80 s where gRPC is not let out
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
