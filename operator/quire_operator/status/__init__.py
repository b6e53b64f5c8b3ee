"""What is said: why a model is not ready, its conditions, its `.status`, and the Events that tell of changes. Pure.

Whoever asks "why is this model not ready" reads `reasons` (volume, Job, workload), `pod_reasons` (one pod), then
`conditions`. May import `plan`, `watch` and `spec`.
"""
