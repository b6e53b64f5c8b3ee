"""Documents: every object that the operator makes, written from decisions that are already made. Pure.

`render` is the door; `workload` is what serves, `download` is what fetches. Decides nothing, and reads no live object.
"""
