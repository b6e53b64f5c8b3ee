"""The workload and the pods in it: one template, what a user merges into it, and by which digest a change is seen.

May import what the room around it holds, but for `render`, which asks for it.
"""
