"""Runs executions in child processes, away from the database."""
