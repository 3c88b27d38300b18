"""Proctor on Google Cloud: what service.yaml says, what must exist around it, how a version is released, and whether a
deployment is whole. Everything that asks or changes Google Cloud goes through one seam, the `gcloud` command."""
