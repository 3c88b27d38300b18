"""The HTTP interface. Errors are ``application/problem+json`` (RFC 9457)."""
