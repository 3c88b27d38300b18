"""What users do with evaluations: submit, cancel, retry; list, get, explain."""
