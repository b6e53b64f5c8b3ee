"""Kinds of attention and feed-forward: what each is, how its weights are named, and which parts it plans.

A new kind is a new file here, and a module in `modules/` that runs it. No torch.
"""
