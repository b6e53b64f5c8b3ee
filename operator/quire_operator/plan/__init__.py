"""What to do: from what is observed to the writes to make, each with its reason. Pure.

Owns acceptance, hardware and accelerators, fit, profiles, rollout, scaling, the pause, and what an `admission` says
when it refuses; `cache` decides about the volume and its download, `resources` renders the documents. May import
`watch` (its data alone) and `spec`.
"""
