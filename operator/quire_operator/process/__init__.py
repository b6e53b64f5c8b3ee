"""The life of the process: its arguments, settings, Lease, health, metrics and queue; the loop that ties the rooms.

`reconcile` is that loop: observe, plan, apply, status. May import every other room; none imports it.
"""
