"""The whole system on one machine: Postgres, the queue and the service. Not part of the deployed image."""
