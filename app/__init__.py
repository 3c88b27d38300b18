"""Proctor runs long AI agent evaluations and never loses one."""
