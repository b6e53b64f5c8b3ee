"""What is said: why a model is not ready, its conditions, its `.status`, and the Events that tell of changes. Pure.

Whoever asks "why is this model not ready" reads `reasons` (volume, Job, workload), `pod_reasons` and `probe_kills`
(one pod), then `conditions`; what a client meets is `reachability`. May import `plan`, `watch` and `spec`.
"""
