"""The only place that writes what a plan says to the cluster. May import `plan`, `watch` and `spec`.

(The Lease, Events and the status are written by `process`, which owns them.)
"""
