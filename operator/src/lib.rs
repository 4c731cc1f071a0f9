//! Kubernetes operator that serves ERNIE 4.5 models.
