"""Registries: credentials, requests, uploads (OCI distribution-spec)."""
